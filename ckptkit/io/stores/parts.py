"""Which parts the files of a plan have in a store: ranges that are known before the first byte moves.

A part is filled in memory and sent when it is whole. How many are in memory at a time follows from the order in which
the engine moves bytes (`ckptkit.io.schedule.in_order`). Of each file that is being filled there are at most two parts
that are not whole, because a unit of work may lie on a border. A file that holds checksums of its own bytes may have
one more: the part that holds the checksum of a tensor waits until the whole tensor has passed.

Files that share the rows of a matrix (the tensor parallel ranks of a stage) are filled side by side, up to eight of
them, so that these rows are read once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from ckptkit.errors import UnsupportedError, UsageError
from ckptkit.io.plan import OutputFile
from ckptkit.io.segments import Filled
from ckptkit.sizes import human_size

_MIB = 1 << 20
PART_VARIABLE = "CKPTKIT_PART_SIZE"
SMALLEST, LARGEST, MOST = 5 * _MIB, 5 << 30, 10_000
"""What S3 takes: bytes of every part but the last, bytes of any part, and parts of a file."""
_MOST_BESIDE = 8


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes in bytes.

    Attributes:
        part: Parts of usual files. Several of 16 MiB at a time fill a connection of any width, and a small number of
            large ones does not.
        smallest: No part is smaller, but the last of a file.
        memory: All parts in memory.
        held: Small files, which have no parts, are kept in memory until they are put: so many bytes in all.
    """

    part: int = 16 * _MIB
    smallest: int = SMALLEST
    memory: int = 128 * _MIB
    held: int = 8 * _MIB

    @classmethod
    def of_environment(cls) -> Sizes:
        """The sizes that hold for this process: `CKPTKIT_PART_SIZE` sets the bytes of a part.

        Raises:
            UsageError: The variable is no size that a store takes.
        """
        usual, text = cls(), os.environ.get(PART_VARIABLE, "")
        if not text:
            return usual
        if not text.isdecimal() or len(text) > 12 or not SMALLEST <= int(text) <= LARGEST:
            hint = f"a number of bytes from {SMALLEST} (5 MiB) to {LARGEST} (5 GiB)"
            raise UsageError(f"{text[:40]!r} is no size of a part", where=PART_VARIABLE, hint=hint)
        return cls(part=int(text), memory=max(usual.memory, 6 * int(text)))


@dataclass(frozen=True, slots=True)
class Group:
    """Files that are filled side by side.

    Attributes:
        files: Indices among the files of the plan.
        part: Bytes of each part but the last.
    """

    files: tuple[int, ...]
    part: int


@dataclass(frozen=True, slots=True)
class Layout:
    """What becomes of the files of a plan.

    Attributes:
        held: Files that are kept in memory, and put at the end.
        groups: The files that are uploaded by parts.
        memory: Bytes of all parts that may be in memory at a time.
    """

    held: tuple[int, ...]
    groups: tuple[Group, ...]
    memory: int

    def part_of(self, index: int) -> int:
        """Bytes of each part of a file but the last."""
        return next(group.part for group in self.groups if index in group.files)


def lay_out_parts(files: Sequence[OutputFile], sizes: Sizes) -> Layout:
    """The parts of all files. They depend on the arguments alone.

    Raises:
        UnsupportedError: A file is larger than a store takes.
    """
    held: list[int] = []
    groups: list[Group] = []
    room, memory = sizes.held, sizes.memory
    for indices in _side_by_side(files):
        size = sum(files[index].size for index in indices)
        # An upload has at least one part, and not every store takes an empty one.
        if not size or (len(indices) == 1 and size < min(sizes.smallest, room + 1)):
            held += indices
            room -= size
            continue
        part, needed = _part(files, indices, sizes)
        groups.append(Group(indices, part))
        memory = max(memory, needed)
    return Layout(tuple(held), tuple(groups), memory)


def count_of(size: int, part: int) -> int:
    """Parts of a file."""
    return max(1, -(-size // part))


def _part(files: Sequence[OutputFile], indices: Sequence[int], sizes: Sizes) -> tuple[int, int]:
    """Bytes of a part of these files, and of all parts that may have to be in memory at a time."""
    largest = max(files[index].size for index in indices)
    waiting = 3 if any(files[index].checksums for index in indices) else 2
    slots = waiting * len(indices) + 2  # and two on their way, so that bytes move meanwhile
    part = max(sizes.smallest, min(sizes.part, sizes.memory // slots & -4096))
    if largest > part * MOST:
        part = -(-largest // MOST // _MIB) * _MIB + _MIB
    if part > LARGEST:
        hint = "choose smaller shards or a larger grid"
        raise UnsupportedError(f"a file of {human_size(largest)}, more than a store takes", hint=hint)
    return part, slots * part


def _side_by_side(files: Sequence[OutputFile]) -> list[tuple[int, ...]]:
    """Files that take their bytes from the same tensors, up to eight; every other file by itself."""
    groups: list[list[int]] = []
    last: dict[int, list[int]] = {}  # a tensor, and the last group that takes bytes from it
    for index, file in enumerate(files):
        wholes = list(map(id, file.segments.wholes)) if isinstance(file.segments, Filled) and file.size else []
        open_groups = (last[whole] for whole in wholes if whole in last and len(last[whole]) < _MOST_BESIDE)
        group = next(open_groups, None)
        if group is None:
            group = []
            groups.append(group)
        group.append(index)
        last.update(dict.fromkeys(wholes, group))
    return list(map(tuple, groups))
