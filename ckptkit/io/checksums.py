"""The CRC-32s that a file holds of its own bytes, summed up while these pass in any order, by any thread."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ckptkit.io.crc import crc32, crc32_combine
from ckptkit.io.segments import Checksum


class Sum(NamedTuple):
    """The CRC-32 of `size` bytes of a file from byte `start` on, which checksum `number` covers."""

    number: int
    start: int
    crc: int
    size: int


class Checksums:
    """The checksums of one file; they do not overlap and are in the order of their bytes."""

    def __init__(self, checksums: Sequence[Checksum]) -> None:
        self._checksums = checksums
        self._stops = [checksum.stop for checksum in checksums]
        self._parts: list[list[tuple[int, int, int]]] = [[] for _ in checksums]

    def add(self, view: memoryview, offset: int) -> None:
        """Adds bytes of the file, which begin at `offset`, to the checksums that cover them."""
        for index, start, stop in self.covering(offset, offset + len(view)):
            part = view[start - offset : stop - offset]
            self._parts[index].append((start, crc32(part), stop - start))

    def parts(self) -> list[Sum]:
        """All that was added, neighbours joined: what another process needs to know of these bytes."""
        return [Sum(index, *part) for index, parts in enumerate(self._parts) for part in _joined(parts)]

    def join(self, sums: Iterable[Sum]) -> None:
        """Adds what another process knows."""
        for number, start, crc, size in sums:
            self._parts[number].append((start, crc, size))

    def covering(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Each checksum that covers some of the bytes `start:stop`: its index, and the first and last byte covered."""
        for index in range(bisect_right(self._stops, start), len(self._stops)):
            checksum = self._checksums[index]
            if checksum.start >= stop:
                break
            first, last = max(checksum.start, start), min(checksum.stop, stop)
            if first < last:
                yield index, first, last

    def value(self, index: int) -> bytes:
        """A checksum as the file holds it, once all of its bytes have been added."""
        value = 0
        for _, crc, size in sorted(self._parts[index]):
            value = crc32_combine(value, crc, size)
        return value.to_bytes(4, "little")


def _joined(parts: Iterable[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    """Runs of bytes (start, CRC, size), where each continues the one before as one."""
    run: tuple[int, int, int] | None = None
    for start, crc, size in sorted(parts):
        if run is not None and run[0] + run[2] == start:
            run = (run[0], crc32_combine(run[1], crc, size), run[2] + size)
            continue
        if run is not None:
            yield run
        run = (start, crc, size)
    if run is not None:
        yield run
