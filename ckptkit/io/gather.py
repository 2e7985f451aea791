"""Bringing pieces of files into a staging buffer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckptkit.io.source import Sources
from ckptkit.tensors import Literal, Piece, Region

Bytes = NDArray[np.uint8]

# Rows of which less than a quarter is wanted are read one by one, but only if a read saves more than
# the pages that the kernel fetches anyway.
_SPARSE = 4
_GAP = 16 << 10
# The same for a store, where a read takes as long as a megabyte.
_GAP_IN_STORE = 1 << 20


@dataclass(frozen=True, slots=True)
class Placement:
    """A piece and where its rows go: the first to byte `start` of a buffer, `pitch` bytes apart."""

    piece: Piece
    start: int
    pitch: int

    @property
    def solid(self) -> bool:
        """Whether it is one run of bytes on both sides."""
        piece = self.piece
        return piece.rows == 1 or (piece.contiguous and self.pitch == piece.width)


class Gatherer:
    """Fills staging buffers from files, with one scratch buffer that is used again and again."""

    def __init__(self, sources: Sources, scratch: int) -> None:
        self._sources = sources
        self._scratch = np.empty(scratch, np.uint8)

    def fill(self, placements: Sequence[Placement], out: Bytes) -> None:
        """Puts every piece at its place in `out`.

        Raises:
            InputError: A source file is gone or ends early.
            StorageError: A source cannot be read.
        """
        for group in _by_block(placements):
            first = group[0]
            if isinstance(first.piece, Region):
                self._read(group, first.piece, out)
            elif isinstance(first.piece, Literal):
                self._fill_literal(first.piece, _rows(out, first))
            else:
                _fill_pattern(_rows(out, first), first.piece.pattern)

    def _fill_literal(self, piece: Literal, rows: Bytes) -> None:
        """Bytes at hand; those that are made on demand are made here, and of wide rows a few at a time."""
        strides = (piece.pitch, 1)
        if isinstance(piece.data, bytes):
            rows[...] = np.ndarray((piece.rows, piece.width), np.uint8, piece.data, piece.offset, strides)
            return
        step = piece.rows if piece.contiguous else max(1, len(self._scratch) // piece.pitch)
        for top in range(0, piece.rows, step):
            part = piece.cut(top, min(top + step, piece.rows), 0, piece.width)
            span = (part.rows - 1) * part.pitch + part.width
            made = piece.data.read(part.offset, part.offset + span)
            rows[top : top + part.rows] = np.ndarray((part.rows, part.width), np.uint8, made, 0, strides)

    def _read(self, group: Sequence[Placement], first: Region, out: Bytes) -> None:
        if len(group) == 1 and group[0].solid:
            start = group[0].start
            self._sources.read(first.file, out.data[start : start + first.rows * first.width], first.offset)
            return
        regions = [placement.piece for placement in group if isinstance(placement.piece, Region)]
        left = min(region.offset for region in regions)
        span = max(region.offset + region.width for region in regions) - left
        wanted = sum(region.width for region in regions)
        gap = _GAP if self._sources.remote(first.file) is None else _GAP_IN_STORE
        sparse = wanted * _SPARSE < first.pitch and first.pitch - wanted > gap
        if sparse or span > len(self._scratch):
            for placement, region in zip(group, regions, strict=True):
                self._read_rows(region, _rows(out, placement))
        else:
            self._read_block(regions, [_rows(out, placement) for placement in group], left, span)

    def _read_rows(self, region: Region, rows: Bytes) -> None:
        for index in range(region.rows):
            self._sources.read(region.file, rows[index].data, region.offset + index * region.pitch)

    def _read_block(self, regions: Sequence[Region], targets: Sequence[Bytes], left: int, span: int) -> None:
        """Reads whole rows and copies the columns out: while they are in the cache that costs little."""
        first = regions[0]
        step = max(1, (len(self._scratch) - span) // first.pitch + 1)
        for top in range(0, first.rows, step):
            count = min(step, first.rows - top)
            block = self._scratch[: (count - 1) * first.pitch + span]
            self._sources.read(first.file, block.data, left + top * first.pitch)
            for region, target in zip(regions, targets, strict=True):
                shape, strides = (count, region.width), (first.pitch, 1)
                target[top : top + count] = np.ndarray(shape, np.uint8, block, region.offset - left, strides)


def _rows(out: Bytes, placement: Placement) -> Bytes:
    """The bytes of `out` that a placement covers, as rows."""
    piece = placement.piece
    return np.ndarray((piece.rows, piece.width), np.uint8, out, placement.start, (placement.pitch, 1))


def _fill_pattern(rows: Bytes, pattern: bytes) -> None:
    if not any(pattern):
        rows[...] = 0
        return
    unit = np.frombuffer(pattern, np.uint8)
    rows.reshape(len(rows), -1, len(unit))[...] = unit


def _by_block(placements: Sequence[Placement]) -> Iterator[list[Placement]]:
    """Groups neighbours that are columns of the same rows of a file, so that these are read once."""
    group: list[Placement] = []
    for placement in placements:
        if group and not _same_block(group, placement):
            yield group
            group = []
        group.append(placement)
    if group:
        yield group


def _same_block(group: Sequence[Placement], placement: Placement) -> bool:
    first, last, new = group[0].piece, group[-1].piece, placement.piece
    if not (isinstance(first, Region) and isinstance(last, Region) and isinstance(new, Region)):
        return False
    rows = (first.file, first.rows, first.pitch) == (new.file, new.rows, new.pitch)
    return rows and last.offset + last.width <= new.offset and new.offset + new.width <= first.offset + first.pitch
