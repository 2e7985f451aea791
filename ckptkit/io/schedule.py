"""Divides a plan into units of work. Units are made lazily, and each fits into one staging buffer.

A unit reads some pieces and writes runs of bytes. Most units have one write. Where several outputs take columns of the
same source rows (a row-parallel weight on its tensor parallel ranks), one unit serves all of them. So every byte of the
source is read once, whatever the number of ranks.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ckptkit.dtypes import DType
from ckptkit.io.cores import MOST_MOVERS
from ckptkit.io.gather import Placement
from ckptkit.io.plan import OutputFile
from ckptkit.io.segments import Segment
from ckptkit.tensors import Band, Const, Region, Tensor, flat

Cast = tuple[DType, DType]

_MOST_WORKERS = 3  # on one file: one writes, and meanwhile the others read and sum up what they write next


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes in bytes, measured with `benchmarks/engine.py`; each is a multiple of 8.

    Attributes:
        staging: Size of the buffer that a unit fills. Where many threads run, fewer and larger units are better than
            units that fit into a core's cache, because threads wait for Python's lock after every call.
        scratch: Size of the buffer for rows from which columns are taken.
        casting: A unit that is cast fills this much of the buffer, because a cast needs room, too.
        direct: A run of at least this size is copied inside the kernel, unless a cast or a checksum needs its bytes.
        extent: Largest copy inside the kernel in one call.
    """

    staging: int = 4 << 20
    scratch: int = 1 << 20
    casting: int = 512 << 10
    direct: int = 1 << 20
    extent: int = 8 << 20

    @classmethod
    def of(cls, threads: int) -> Limits:
        """The sizes for a number of threads: more than eight share the memory of eight."""
        usual, parts = cls(), max(1, -(-threads // MOST_MOVERS))
        return replace(
            usual,
            staging=usual.staging // parts & -8,
            scratch=usual.scratch // parts & -8,
            casting=usual.casting // parts & -8,
        )


@dataclass(frozen=True, slots=True)
class Write:
    """Bytes `start:stop` of the staging buffer, before a cast, go to `offset` of a file.

    Attributes:
        file: Index among the files of the plan.
    """

    file: int
    offset: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Unit:
    """Pieces to gather in `size` bytes of staging, and the writes that empty it."""

    placements: Sequence[Placement]
    writes: Sequence[Write]
    size: int
    cast: Cast | None = None
    direct: bool = False

    def written(self, write: Write) -> int:
        """Bytes of one of its writes, after the cast."""
        return _written(write.stop - write.start, self.cast)


class _Run(NamedTuple):
    """A band at an offset of a file; `grain` bytes of it stay together."""

    offset: int
    band: Band
    grain: int
    cast: Cast | None

    @property
    def nbytes(self) -> int:
        return self.band.rows * _width(self.band)

    @property
    def region(self) -> Region | None:
        """The region of the source, if the run is a single contiguous one."""
        piece = self.band.pieces[0]
        return piece if isinstance(piece, Region) and self.band.rows == 1 and len(self.band.pieces) == 1 else None


class _Column(NamedTuple):
    """Columns of a source block that go to `offset` of a file."""

    file: int
    offset: int
    region: Region


@dataclass
class _Block:
    """Columns of the same source rows that go to different places."""

    columns: list[_Column]
    cast: Cast | None
    taken: bool = field(default=False)

    @property
    def width(self) -> int:
        return sum(column.region.width for column in self.columns)

    def units(self, limits: Limits, file: int) -> Iterator[Unit]:
        """The units of the whole block for the first file that comes to it, and none for later ones."""
        if self.taken:
            return
        self.taken = True
        rows = self.columns[0].region.rows
        step = _source_limit(limits, self.cast) // self.width
        for top in range(0, rows, step):
            yield self._unit(top, min(rows, top + step))

    def _unit(self, top: int, bottom: int) -> Unit:
        placements: list[Placement] = []
        writes: list[Write] = []
        start = 0
        for file, offset, region in self.columns:
            stop = start + (bottom - top) * region.width
            placements.append(Placement(region.cut(top, bottom, 0, region.width), start, region.width))
            writes.append(Write(file, offset + _written(top * region.width, self.cast), start, stop))
            start = stop
        return Unit(placements, writes, start, self.cast)


@dataclass
class _Meeting(_Block):
    """A block whose units are made when all of its files have come to it; until then they wait."""

    arrived: set[int] = field(default_factory=set)
    apart: bool = field(default=False)

    def units(self, limits: Limits, file: int) -> Iterator[Unit]:
        """The units of the whole block for the last file that comes to it; `_WAIT` for the others before."""
        self.arrived.add(file)
        while not self.apart and len(self.arrived) < len(self.columns):
            yield _WAIT
        if not self.apart:
            yield from super().units(limits, file)
            return
        mine = [column for column in self.columns if column.file == file]
        yield from _Block(mine, self.cast).units(limits, file)


_WAIT = Unit((), (), 0)


class _Filler:
    """Fills units with runs that follow one another in a file."""

    def __init__(self, file: int, limits: Limits, direct: bool) -> None:
        self._file = file
        self._limits = limits
        self._direct = direct
        self._placements: list[Placement] = []
        self._used = 0
        self._offset = 0
        self._cast: Cast | None = None

    def units(self, layout: Iterable[_Run | _Block]) -> Iterator[Unit]:
        for item in layout:
            if isinstance(item, _Block):
                yield from self._flush()
                yield from item.units(self._limits, self._file)
            elif self._passes(item):
                yield from self._flush()
                yield from self._extents(item)
            else:
                yield from self._add(item)
        yield from self._flush()

    def _passes(self, run: _Run) -> bool:
        return self._direct and run.cast is None and run.region is not None and run.nbytes >= self._limits.direct

    def _extents(self, run: _Run) -> Iterator[Unit]:
        size = run.nbytes
        for start in range(0, size, self._limits.extent):
            stop = min(size, start + self._limits.extent)
            piece = run.band.pieces[0].cut(0, 1, start, stop)
            write = Write(self._file, run.offset + start, 0, stop - start)
            yield Unit([Placement(piece, 0, stop - start)], [write], stop - start, direct=True)

    def _add(self, run: _Run) -> Iterator[Unit]:
        if run.cast != self._cast:
            yield from self._flush()
            self._cast = run.cast
        limit = _source_limit(self._limits, run.cast)
        width, done, size = _width(run.band), 0, run.nbytes
        grain = run.grain if run.band.rows == 1 else width
        while done < size:
            room = min(size - done, limit - self._used)
            room -= room % grain
            if not room:
                yield from self._flush()
                continue
            if not self._placements:
                self._offset = run.offset + _written(done, run.cast)
            self._place(run.band, width, done, done + room)
            done += room

    def _place(self, band: Band, width: int, start: int, stop: int) -> None:
        if band.rows == 1:
            piece = band.pieces[0].cut(0, 1, start, stop)
            self._placements.append(Placement(piece, self._used, stop - start))
        else:
            left = self._used
            for piece in band.pieces:
                part = piece.cut(start // width, stop // width, 0, piece.width)
                self._placements.append(Placement(part, left, width))
                left += piece.width
        self._used += stop - start

    def _flush(self) -> Iterator[Unit]:
        if self._placements:
            write = Write(self._file, self._offset, 0, self._used)
            yield Unit(self._placements, [write], self._used, self._cast)
        self._placements, self._used = [], 0


class Schedule:
    """Hands out the units of some files to several workers.

    A worker has a file of its own while there are enough, because writers to one file wait for each other in the
    kernel. After that it helps with the files of other workers, where few do: more would only wait. The output does not
    depend on the division of work.
    """

    def __init__(self, files: Sequence[OutputFile], chosen: Iterable[int], limits: Limits) -> None:
        live = list(chosen)
        blocks = _find_blocks(files, live, limits)
        self._waiting = deque(_units(index, files[index], blocks, limits) for index in live)
        self._running: dict[Iterator[Unit], int] = {}  # and how many workers each has
        self._own: dict[int, Iterator[Unit]] = {}
        self._lock = threading.Lock()

    def next(self, worker: int) -> Unit | None:
        """The next unit for a worker, or None when all are handed out."""
        with self._lock:
            while (stream := self._stream(worker)) is not None:
                unit = next(stream, None)
                if unit is not None:
                    return unit
                self._running.pop(stream, None)
                del self._own[worker]
            return None

    def _stream(self, worker: int) -> Iterator[Unit] | None:
        if worker not in self._own:
            if self._waiting:
                stream = self._waiting.popleft()
                self._running[stream] = 0
            elif self._running:
                stream = min(self._running, key=self._running.__getitem__)
            else:
                return None
            if self._running[stream] == _MOST_WORKERS:
                return None
            self._running[stream] += 1
            self._own[worker] = stream
        return self._own.get(worker)


def in_order(files: Sequence[OutputFile], chosen: Sequence[int], limits: Limits) -> Iterator[Unit]:
    """The units of some files, so that each file is filled from its start to its end.

    A unit that serves several files is made when each of them is filled up to there. So of a file there is never more
    to remember than the bytes around the place that is being filled.

    Args:
        files: The files of a plan.
        chosen: Indices of those to write.
        limits: Sizes of the buffers; bytes are never copied inside the kernel.
    """
    blocks = _find_blocks(files, chosen, limits, meet=True)
    streams = [_units(index, files[index], blocks, limits, direct=False) for index in chosen]
    while streams:
        moved = False
        for stream in list(streams):
            for unit in stream:
                if unit is _WAIT:
                    break
                moved = True
                yield unit
            else:
                moved = True
                streams.remove(stream)
        if not moved:  # two files have two blocks in different orders, so each column is read by itself
            for block in blocks.values():
                if isinstance(block, _Meeting) and block.arrived:
                    block.apart = True


def tensor_units(tensor: Tensor, limits: Limits) -> Iterator[Unit]:
    """The units of one tensor, in order; the offsets of their writes count from 0."""
    segments = (Segment(0, tensor),) if tensor.nbytes else ()
    return _Filler(0, limits, False).units(_layout(0, OutputFile("", tensor.nbytes, segments), {}, limits))


def _units(
    index: int, file: OutputFile, blocks: dict[tuple[int, int], _Block], limits: Limits, direct: bool = True
) -> Iterator[Unit]:
    direct = direct and not file.checksums  # a checksum needs to see the bytes that it covers
    return _Filler(index, limits, direct).units(_layout(index, file, blocks, limits))


def _layout(
    index: int, file: OutputFile, blocks: dict[tuple[int, int], _Block], limits: Limits
) -> Iterator[_Run | _Block]:
    """The runs and blocks of a file, in order. Neighbours that are also neighbours in their source become one run."""
    last: _Run | None = None
    for item in _items(index, file, blocks, limits):
        if isinstance(item, _Run) and last is not None and (joined := _joined(last, item)) is not None:
            last = joined
            continue
        if last is not None:
            yield last
        last = None
        if isinstance(item, _Run):
            last = item
        else:
            yield item
    if last is not None:
        yield last


def _items(
    index: int, file: OutputFile, blocks: dict[tuple[int, int], _Block], limits: Limits
) -> Iterator[_Run | _Block]:
    end = 0
    for segment in file.segments:
        if segment.offset > end:
            yield _zeros(end, segment.offset - end)
        for offset, band in _band_offsets(segment):
            block = blocks.get((index, offset))
            if block is None:
                yield from _runs(offset, band, segment.tensor, limits)
            else:
                yield block
        end = segment.offset + segment.tensor.nbytes
    if end < file.size:
        yield _zeros(end, file.size - end)


def _zeros(offset: int, size: int) -> _Run:
    return _Run(offset, Band(1, (Const(b"\0", 1, size),)), 1, None)


def _band_offsets(segment: Segment) -> Iterator[tuple[int, Band]]:
    """Every band with the byte of the file at which it starts."""
    offset, cast = segment.offset, _cast(segment.tensor)
    for band in segment.tensor.bands:
        yield offset, band
        offset += _written(band.rows * _width(band), cast)


def _runs(offset: int, band: Band, tensor: Tensor, limits: Limits) -> Iterator[_Run]:
    """A band as rows that fit into a staging buffer, or as flat runs."""
    grain, cast, width = tensor.dtype.itemsize, _cast(tensor), _width(band)
    if len(band.pieces) == 1 and band.pieces[0].contiguous:
        yield _Run(offset, Band(1, (flat(band.pieces[0]),)), grain, cast)
    elif band.rows > 1 and width <= _source_limit(limits, cast):
        yield _Run(offset, band, grain, cast)
    else:
        for row in range(band.rows):
            for piece in band.pieces:
                yield _Run(offset, Band(1, (flat(piece.cut(row, row + 1, 0, piece.width)),)), grain, cast)
                offset += _written(piece.width, cast)


def _joined(upper: _Run, lower: _Run) -> _Run | None:
    """Two runs that follow one another in the output as one, if they do in their source, too."""
    a, b = upper.region, lower.region
    if a is None or b is None or upper.cast is not None or lower.cast is not None:
        return None
    if (a.file, a.offset + a.width) != (b.file, b.offset):
        return None
    size = a.width + b.width
    return _Run(upper.offset, Band(1, (Region(a.file, a.offset, 1, size, size),)), 1, None)


def _find_blocks(
    files: Sequence[OutputFile], chosen: Iterable[int], limits: Limits, meet: bool = False
) -> dict[tuple[int, int], _Block]:
    """Blocks by the (file, offset) of each of their columns.

    Args:
        files: The files of a plan.
        chosen: Indices of those to write.
        limits: Sizes of the buffers.
        meet: Files are to meet at each block; a block with two columns of one file is none.
    """
    candidates: dict[tuple[str, int, int, Cast | None], list[_Column]] = defaultdict(list)
    for index in chosen:
        for segment in files[index].segments:
            cast = _cast(segment.tensor)
            for offset, band in _band_offsets(segment):
                region = band.pieces[0]
                if len(band.pieces) == 1 and isinstance(region, Region) and not region.contiguous:
                    key = (region.file, region.pitch, region.rows, cast)
                    candidates[key].append(_Column(index, offset, region))
    found: dict[tuple[int, int], _Block] = {}
    for (*_, cast), columns in candidates.items():
        for group in _side_by_side(columns, _source_limit(limits, cast)):
            if meet and len({column.file for column in group}) < len(group):
                continue
            block = _Meeting(group, cast) if meet else _Block(group, cast)
            found.update({(column.file, column.offset): block for column in group})
    return found


def _side_by_side(columns: list[_Column], limit: int) -> Iterator[list[_Column]]:
    """Groups of two or more columns within one row of a source, of at most `limit` bytes."""
    group: list[_Column] = []
    for column in sorted(columns, key=lambda item: item.region.offset):
        if group and not _beside(group, column, limit):
            if len(group) > 1:
                yield group
            group = []
        group.append(column)
    if len(group) > 1:
        yield group


def _beside(group: list[_Column], column: _Column, limit: int) -> bool:
    first, last, new = group[0].region, group[-1].region, column.region
    fits = sum(item.region.width for item in group) + new.width <= limit
    apart = last.offset + last.width <= new.offset
    return fits and apart and new.offset + new.width <= first.offset + first.pitch


def _cast(tensor: Tensor) -> Cast | None:
    return None if tensor.cast is None else (tensor.dtype, tensor.cast)


def _written(size: int, cast: Cast | None) -> int:
    """Bytes that `size` bytes of a source become."""
    return size if cast is None else size // cast[0].itemsize * cast[1].itemsize


def _source_limit(limits: Limits, cast: Cast | None) -> int:
    """How many bytes of a source fit into a staging buffer, on both sides of a cast."""
    if cast is None:
        return limits.staging
    return min(limits.staging, limits.casting) // max(cast[0].itemsize, cast[1].itemsize) * cast[0].itemsize


def _width(band: Band) -> int:
    return sum(piece.width for piece in band.pieces)
