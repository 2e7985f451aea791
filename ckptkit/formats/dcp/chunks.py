"""Chunks of a tensor, boxes of any arrangement in n dimensions, joined to the tensor without loading it.

The joining is the check: every element must lie in exactly one chunk.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from ckptkit.dtypes import DTYPES, DType
from ckptkit.tensors import Tensor, hstack, vstack

_MAX_PIECES = 4_000_000


class ChunkError(ValueError):
    """Chunks do not make up a tensor; the message says how, as the end of a sentence about the tensor."""


@dataclass(frozen=True, slots=True)
class Box:
    """A chunk: its first index on every axis, and its bytes, whose shape is its size."""

    offsets: tuple[int, ...]
    tensor: Tensor

    @property
    def sizes(self) -> tuple[int, ...]:
        """Its size on every axis."""
        return self.tensor.shape

    def rows(self, start: int, stop: int) -> Box:
        """The part of it between indices `start` and `stop` of the first axis of the whole tensor."""
        at = self.offsets[0]
        if (at, at + self.sizes[0]) == (start, stop):
            return self
        return Box((start, *self.offsets[1:]), self.tensor.rows(start - at, stop - at))

    def inner(self) -> Box:
        """Without its first axis, on which its size is 1."""
        return Box(self.offsets[1:], self.tensor.reshape(self.sizes[1:]))


def join_chunks(dtype: DType, shape: tuple[int, ...], boxes: Iterable[Box]) -> Tensor:
    """The tensor that boxes of its dtype make up.

    Raises:
        ChunkError: One leaves the tensor, two overlap, or some elements are in none.
    """
    ((_, tensor),) = split_chunks(dtype, shape, boxes, 0)
    return tensor


def check_cover(shape: tuple[int, ...], boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    """Whether boxes fill a tensor: every element lies in exactly one of them.

    Args:
        shape: Size of the tensor on every axis.
        boxes: First index and size of each box on every axis.

    Raises:
        ChunkError: One leaves the tensor, two overlap, or some elements are in none.
    """
    if not _is_lattice(shape, boxes):
        byte = DTYPES["U8"]
        join_chunks(byte, shape, (Box(offsets, Tensor.full(byte, sizes)) for offsets, sizes in boxes))


def _is_lattice(shape: tuple[int, ...], boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether boxes are alike and stand on all points of a lattice that fills the tensor, each on one."""
    alike = {sizes for _, sizes in boxes}
    sizes = next(iter(alike), ())
    if len(alike) > 1 or len(sizes) != len(shape) or not all(sizes):
        return False
    points = [range(0, length, size) for length, size in zip(shape, sizes, strict=True)]
    places = {offsets for offsets, _ in boxes}
    return (
        not any(length % size for length, size in zip(shape, sizes, strict=True))
        and len(places) == len(boxes) == prod(map(len, points))
        and all(len(place) == len(shape) for place in places)
        and all(set(values) <= set(axis) for values, axis in zip(zip(*places, strict=True), points, strict=True))
    )


def split_chunks(
    dtype: DType, shape: tuple[int, ...], boxes: Iterable[Box], axes: int
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """The parts of the tensor that boxes make up, one for every index on its first `axes` axes.

    Equal to slicing the joined tensor, in time that does not grow with the number of parts.

    Raises:
        ChunkError: One leaves the tensor, two overlap, or some elements are in none.
    """
    boxes = list(boxes)
    for box in boxes:
        check_inside(shape, box.offsets, box.sizes)
    filled = [box for box in boxes if box.tensor.numel]
    stored = sum(box.tensor.numel for box in filled)
    if stored != prod(shape):
        what = "overlap" if stored > prod(shape) else "leave holes"
        raise ChunkError(f"its chunks {what}: they hold {stored:,} elements, the tensor has {prod(shape):,}")
    return _Joiner(dtype).split(shape, filled, axes, ())


def check_inside(shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> None:
    """Whether a box lies inside a tensor.

    Raises:
        ChunkError: It has other axes, or leaves the tensor.
    """
    fits = len(offsets) == len(sizes) == len(shape) and all(
        min(offset, size) >= 0 and offset + size <= length
        for offset, size, length in zip(offsets, sizes, shape, strict=True)
    )
    if not fits:
        raise ChunkError(f"a chunk at {list(offsets)} of size {list(sizes)} does not lie inside {list(shape)}")


class _Joiner:
    """Cuts boxes into slabs along one axis after the other until they lie side by side."""

    def __init__(self, dtype: DType) -> None:
        self._dtype = dtype
        self._pieces = 0

    def split(
        self, shape: tuple[int, ...], boxes: Sequence[Box], axes: int, at: tuple[int, ...]
    ) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """(index on the first axes, the tensor behind it) for every index."""
        if not axes:
            yield at, self.join(shape, boxes)
            return
        self._count(shape[0] + sum(box.sizes[0] for box in boxes))
        parts: list[list[Box]] = [[] for _ in range(shape[0])]
        for box in boxes:
            for index in range(box.offsets[0], box.offsets[0] + box.sizes[0]):
                parts[index].append(box.rows(index, index + 1).inner())
        for index, part in enumerate(parts):
            yield from self.split(shape[1:], part, axes - 1, (*at, index))

    def join(self, shape: tuple[int, ...], boxes: Sequence[Box]) -> Tensor:
        """The tensor that `boxes` fill."""
        if not prod(shape):
            return Tensor(self._dtype, shape, ())
        if len(boxes) == 1 and boxes[0].sizes == shape:
            return boxes[0].tensor
        if not shape:
            raise ChunkError("its chunks overlap")
        edges = sorted({edge for box in boxes for edge in (box.offsets[0], box.offsets[0] + box.sizes[0])})
        if not edges or edges[0] != 0 or edges[-1] != shape[0]:
            raise ChunkError("its chunks leave holes")
        slabs: list[list[Box]] = [[] for _ in edges[1:]]
        for box in boxes:
            first = bisect_left(edges, box.offsets[0])
            last = bisect_left(edges, box.offsets[0] + box.sizes[0])
            self._count(last - first)
            for number in range(first, last):
                slabs[number].append(box.rows(edges[number], edges[number + 1]))
        return vstack(
            [
                self._slab((stop - start, *shape[1:]), slab)
                for (start, stop), slab in zip(pairwise(edges), slabs, strict=True)
            ]
        )

    def _slab(self, shape: tuple[int, ...], boxes: Sequence[Box]) -> Tensor:
        """The tensor that boxes fill which all span its first axis."""
        if len(boxes) == 1 and boxes[0].sizes == shape:
            return boxes[0].tensor
        if len(shape) == 1:
            raise ChunkError("its chunks overlap" if boxes else "its chunks leave holes")
        if len(shape) == 2:
            return _side_by_side(shape[1], boxes)
        if shape[0] == 1:
            return self.join(shape[1:], [box.inner() for box in boxes]).reshape(shape)
        start = boxes[0].offsets[0] if boxes else 0
        rows = range(start, start + shape[0])
        self._count(len(rows) * len(boxes))
        return vstack([self._slab((1, *shape[1:]), [box.rows(row, row + 1) for box in boxes]) for row in rows])

    def _count(self, pieces: int) -> None:
        """Bounds the work: chunks that interlock without end are no way to store a tensor."""
        self._pieces += pieces
        if self._pieces > _MAX_PIECES:
            raise ChunkError("its chunks interlock in too many places")


def _side_by_side(width: int, boxes: Sequence[Box]) -> Tensor:
    """Columns that must follow one another."""
    ordered = sorted(boxes, key=lambda box: box.offsets[1])
    at = 0
    for box in ordered:
        if box.offsets[1] != at:
            raise ChunkError("its chunks overlap" if box.offsets[1] < at else "its chunks leave holes")
        at += box.sizes[1]
    if at != width:
        raise ChunkError("its chunks leave holes")
    return hstack([box.tensor for box in ordered])
