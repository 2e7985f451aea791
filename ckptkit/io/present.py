"""Whether a directory already holds the output of a plan: a run may be killed after its commit, before it says so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ckptkit.dtypes import DTYPES
from ckptkit.io.plan import OutputFile, Plan, literal
from ckptkit.io.reading import TensorReader, first_difference, read_tensor
from ckptkit.io.segments import Checksum
from ckptkit.tensors import Tensor

_U8 = DTYPES["U8"]


def resembles(plan: Plan, directory: Path) -> bool:
    """Whether a directory holds exactly the files of a plan, by name and size. Reads none of them.

    Raises:
        OSError: It cannot be looked at.
    """
    return dict(_sizes(directory)) == {file.path: file.size for file in plan.files}


def holds(plan: Plan, directory: Path) -> bool:
    """Whether a directory holds exactly the files of a plan, byte for byte. Reads them and the sources once.

    Raises:
        InputError: A source is gone or ends early.
        StorageError: The disk answers with an error.
        OSError: The directory cannot be looked at.
    """
    return resembles(plan, directory) and all(holds_file(file, directory / file.path) for file in plan.files)


def _sizes(directory: Path) -> Iterator[tuple[str, int]]:
    """Path and size of everything below a directory except directories. Empty if there is no such directory.

    A link gets the size -1, which no file has, because the file behind it is not part of the output.
    """
    for folder, folders, files in os.walk(directory):
        for name in (*files, *(name for name in folders if os.path.islink(os.path.join(folder, name)))):
            place = Path(folder, name)
            size = -1 if place.is_symlink() else place.stat().st_size
            yield place.relative_to(directory).as_posix(), size


def holds_file(file: OutputFile, path: Path) -> bool:
    """Whether a file of the right size holds what a plan would write into it; errors as `holds`."""
    place = str(path)
    sums = {at: _crc32(place, checksum) for checksum in file.checksums for at in checksum.at}
    return all(
        first_difference(tensor, Tensor.from_file(place, offset, tensor.out_dtype, tensor.shape)) is None
        for offset, tensor in _expected(file, sums)
    )


def _expected(file: OutputFile, sums: dict[int, bytes]) -> Iterator[tuple[int, Tensor]]:
    """The content of a file: its segments with the checksums filled in, and zeros between them."""
    end = 0
    for segment in file.segments:
        yield from _zeros(end, segment.offset)
        end = segment.offset + segment.tensor.nbytes
        inside = {at - segment.offset: crc for at, crc in sums.items() if segment.offset <= at < end}
        yield segment.offset, _filled_in(segment.tensor, inside) if inside else segment.tensor
    yield from _zeros(end, file.size)


def _zeros(start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
    if start < stop:
        yield start, Tensor.full(_U8, (1, stop - start))


def _filled_in(tensor: Tensor, sums: dict[int, bytes]) -> Tensor:
    data = bytearray(read_tensor(tensor))
    for at, crc in sums.items():
        data[at : at + len(crc)] = crc
    return literal(bytes(data))


def _crc32(place: str, checksum: Checksum) -> bytes:
    """The checksum of the bytes in the file. Whether these bytes are right is checked segment by segment."""
    with TensorReader() as reader:
        value = reader.crc32(Path(place), checksum.start, checksum.stop - checksum.start)
    return value.to_bytes(4, "little")
