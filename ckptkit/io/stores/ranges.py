"""Sets of bytes of a file, as ranges."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator


class Ranges:
    """A set of bytes: ranges in order, none of which touch."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        for start, stop in ranges:
            self.add(start, stop)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._starts, self._stops, strict=True)

    @property
    def nbytes(self) -> int:
        """How many bytes are in it."""
        return sum(self._stops) - sum(self._starts)

    def add(self, start: int, stop: int) -> None:
        """Puts bytes `start:stop` in."""
        if start >= stop:
            return
        first, last = bisect_left(self._stops, start), bisect_right(self._starts, stop)
        if first < last:
            start, stop = min(start, self._starts[first]), max(stop, self._stops[last - 1])
        self._starts[first:last], self._stops[first:last] = [start], [stop]

    def split(self, start: int, stop: int) -> Iterator[tuple[int, int, bool]]:
        """Bytes `start:stop` as ranges that are all in it (True) or all not (False), in order."""
        at = start
        for index in range(bisect_right(self._stops, start), len(self._starts)):
            left, right = max(start, self._starts[index]), min(stop, self._stops[index])
            if left >= stop:
                break
            if at < left:
                yield at, left, False
            yield left, right, True
            at = right
        if at < stop:
            yield at, stop, False

    def missing(self, start: int, stop: int) -> list[tuple[int, int]]:
        """What of bytes `start:stop` is not in it."""
        return [(left, right) for left, right, inside in self.split(start, stop) if not inside]
