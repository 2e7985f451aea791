"""The tensor algebra: where every byte of a tensor comes from. Knows bytes, no torch.

A `Tensor` is never loaded. It is a dtype, a shape and *bands* stacked from top to bottom; a band is
a few *pieces* of equal height side by side; a piece is a strided rectangle of a file (`Region`),
bytes at hand or made on demand (`Literal`) or a repeated pattern (`Const`). Leading axes fold into rows and the last
axis is the width, so a `[2, 3, 4]` bf16 tensor has 6 rows of 8 bytes; a 1-D tensor of n elements is n
rows of one element; a 0-dim one is a single row.

Slicing, stacking and reshaping such tensors gives such tensors, so every layout of a model (fused
QKV, tensor-parallel shards, padded vocabularies) is a value of this type, and converting is writing
that value out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

from ckptkit.dtypes import DType

Origin = TypeVar("Origin")
MAX_AXES = 64
"""The most axes of a tensor, as in torch."""


class _Strided(NamedTuple, Generic[Origin]):
    """`rows` runs of `width` bytes of `origin`, the first at `offset`, `pitch` bytes apart."""

    origin: Origin
    offset: int
    rows: int
    pitch: int
    width: int

    @property
    def contiguous(self) -> bool:
        """Whether the rows follow one another without gaps."""
        return self.pitch == self.width or self.rows == 1

    def cut(self, top: int, bottom: int, left: int, right: int) -> Self:
        """Rows `top:bottom` and bytes `left:right` of this rectangle."""
        start = self.offset + top * self.pitch + left
        return type(self)(self.origin, start, bottom - top, self.pitch, right - left)


class Region(_Strided[str]):
    """`rows` runs of `width` bytes in `file`, the first at `offset`, `pitch` bytes apart."""

    __slots__ = ()

    @property
    def file(self) -> str:
        """The file's path."""
        return self.origin


class Made(Protocol):
    """Bytes that are made when they are wanted: a large random matrix never lies in memory as a whole.

    Equal ranges give equal bytes however often and in whatever order they are read, from any thread.
    """

    @property
    def digest(self) -> str:
        """A digest that identifies the bytes, computed without making them."""

    @property
    def files(self) -> tuple[str, ...]:
        """The files that they are made from."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> bytes | memoryview:
        """Bytes `start:stop`, which stay as they are."""


class Literal(_Strided[bytes | Made]):
    """`rows` runs of `width` bytes of `data`, `pitch` bytes apart, the first at `offset`."""

    __slots__ = ()

    @property
    def data(self) -> bytes | Made:
        """The bytes."""
        return self.origin


class Const(NamedTuple):
    """`rows` rows of `width` bytes, filled with one element's `pattern` (padding, ones)."""

    pattern: bytes
    rows: int
    width: int

    @property
    def contiguous(self) -> bool:
        """A constant has no gaps."""
        return True

    def cut(self, top: int, bottom: int, left: int, right: int) -> Const:
        """Rows `top:bottom` and bytes `left:right`; both are whole elements."""
        return Const(self.pattern, bottom - top, right - left)


Piece = Region | Literal | Const


class Band(NamedTuple):
    """Pieces of equal height, side by side."""

    rows: int
    pieces: tuple[Piece, ...]

    def cut(self, top: int, bottom: int) -> Band:
        """Rows `top:bottom`."""
        if (top, bottom) == (0, self.rows):
            return self
        return Band(bottom - top, tuple(piece.cut(top, bottom, 0, piece.width) for piece in self.pieces))

    def columns(self, left: int, right: int) -> Band:
        """Bytes `left:right` of every row."""
        pieces: list[Piece] = []
        start = 0
        for piece in self.pieces:
            a, b = max(left - start, 0), min(right - start, piece.width)
            if a < b:
                pieces.append(piece.cut(0, self.rows, a, b))
            start += piece.width
        return Band(self.rows, tuple(pieces))


@dataclass(slots=True, unsafe_hash=True)
class Tensor:
    """A tensor as a recipe over bytes. It is never changed; `frozen` would triple the time to make one of 200,000.

    Attributes:
        dtype: Element type of the bytes that the bands describe.
        shape: Sizes in elements.
        bands: Its bands, top to bottom.
        cast: Element type to convert to while the bytes pass, or None.
    """

    dtype: DType
    shape: tuple[int, ...]
    bands: tuple[Band, ...]
    cast: DType | None = None

    @classmethod
    def from_file(cls, file: str, offset: int, dtype: DType, shape: Sequence[int], pitch: int | None = None) -> Tensor:
        """A row-major tensor stored in `file` at byte `offset`.

        Args:
            file: Path of the file.
            offset: Byte at which the first element lies.
            dtype: Element type.
            shape: Sizes in elements.
            pitch: Bytes from one row to the next; by default rows touch.
        """
        return cls.alike(file, dtype, shape, pitch)(offset)

    @classmethod
    def alike(cls, file: str, dtype: DType, shape: Sequence[int], pitch: int | None = None) -> Callable[[int], Tensor]:
        """`from_file` for many tensors of one type and shape: a function from their offsets to them."""
        axes = tuple(shape)
        rows, width = _fold(axes, dtype.itemsize)
        between = width if pitch is None else pitch
        if not (rows and width):
            return lambda offset: cls(dtype, axes, ())
        return lambda offset: cls(dtype, axes, (Band(rows, (Region(file, offset, rows, between, width),)),))

    @classmethod
    def from_bytes(cls, data: bytes | Made, dtype: DType, shape: Sequence[int]) -> Tensor:
        """A row-major tensor whose bytes are at hand, or made when they are wanted.

        Raises:
            ValueError: `data` has not the size that dtype and shape ask for.
        """
        rows, width = _fold(tuple(shape), dtype.itemsize)
        if len(data) != rows * width:
            raise ValueError(f"{len(data)} bytes for {dtype}{list(shape)}")
        return cls(dtype, tuple(shape), (Band(rows, (Literal(data, 0, rows, width, width),)),) if data else ())

    @classmethod
    def full(cls, dtype: DType, shape: Sequence[int], pattern: bytes | None = None) -> Tensor:
        """A tensor of one repeated element, zero by default."""
        rows, width = _fold(tuple(shape), dtype.itemsize)
        piece = Const(pattern or bytes(dtype.itemsize), rows, width)
        return cls(dtype, tuple(shape), (Band(rows, (piece,)),) if rows and width else ())

    @property
    def out_dtype(self) -> DType:
        """Element type as written."""
        return self.cast or self.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes as written."""
        return self.numel * self.out_dtype.itemsize

    @property
    def row_width(self) -> int:
        """Bytes in a row of the source."""
        return _fold(self.shape, self.dtype.itemsize)[1]

    def rows(self, start: int, stop: int) -> Tensor:
        """`self[start:stop]`: indices `start` to `stop` of the first axis."""
        if not self.shape or not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"rows {start}:{stop} of {list(self.shape)}")
        inner = prod(self.shape[1:-1])
        bands = tuple(_cut_rows(self.bands, start * inner, stop * inner))
        return Tensor(self.dtype, (stop - start, *self.shape[1:]), bands if prod(self.shape[1:]) else (), self.cast)

    def cols(self, start: int, stop: int) -> Tensor:
        """`self[..., start:stop]`: indices `start` to `stop` of the last axis."""
        if len(self.shape) < 2:
            return self.rows(start, stop)
        if not 0 <= start <= stop <= self.shape[-1]:
            raise IndexError(f"columns {start}:{stop} of {list(self.shape)}")
        size = self.dtype.itemsize
        bands = tuple(band.columns(start * size, stop * size) for band in self.bands)
        return Tensor(self.dtype, (*self.shape[:-1], stop - start), bands if start < stop else (), self.cast)

    def reshape(self, shape: Sequence[int]) -> Tensor:
        """The same elements in the same order under another shape."""
        target = tuple(shape)
        if prod(target) != self.numel:
            raise ValueError(f"cannot reshape {list(self.shape)} to {list(target)}")
        width = _fold(target, self.dtype.itemsize)[1]
        same = width == self.row_width or not self.bands
        return Tensor(self.dtype, target, self.bands if same else tuple(_reflow(self.bands, width)), self.cast)

    def astype(self, dtype: DType) -> Tensor:
        """Converted to `dtype` while the bytes pass; the same dtype is no cast."""
        return Tensor(self.dtype, self.shape, self.bands, None if dtype == self.dtype else dtype)

    def runs(self) -> Iterator[Piece]:
        """Contiguous pieces in row-major order; two descriptions of the same bytes give the same runs."""
        return iter(_coalesce(run for band in self.bands for run in _runs(band)))

    def same_bytes_as(self, other: Tensor) -> bool:
        """Whether both name the very same bytes (equal without reading them)."""
        return (self.dtype, self.shape, self.cast) == (other.dtype, other.shape, other.cast) and (
            self.bands == other.bands or self._same_runs(other)
        )

    def _same_runs(self, other: Tensor) -> bool:
        """Whether the runs are equal. Columns have a run for each row; mostly the first of them already differs."""
        return all(one == another for one, another in zip_longest(self.runs(), other.runs()))


def vstack(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenates along the first axis.

    Raises:
        ValueError: The dtypes or the remaining axes differ.
    """
    first = _common(tensors, lambda t: t.shape[1:])
    bands = _join_bands([band for tensor in tensors for band in tensor.bands])
    height = sum([tensor.shape[0] for tensor in tensors])
    return Tensor(first.dtype, (height, *first.shape[1:]), tuple(bands), first.cast)


def hstack(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenates along the last axis; 1-D tensors along their only one.

    Raises:
        ValueError: The dtypes or the leading axes differ.
    """
    if not tensors or len(tensors[0].shape) < 2:
        return vstack(tensors)
    first = _common(tensors, lambda t: t.shape[:-1])
    wide = [tensor for tensor in tensors if tensor.bands]
    edges = sorted({edge for tensor in wide for edge in _edges(tensor.bands)})
    columns = [_split_at(tensor.bands, edges) for tensor in wide]
    beside = zip(*columns, strict=True)
    bands = tuple(Band(row[0].rows, tuple(piece for band in row for piece in band.pieces)) for row in beside)
    width = sum([tensor.shape[-1] for tensor in tensors])
    return Tensor(first.dtype, (*first.shape[:-1], width), bands, first.cast)


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Stacks on a new first axis."""
    return vstack([tensor.reshape((1, *tensor.shape)) for tensor in tensors])


def _fold(shape: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """Rows and row width in bytes of a shape."""
    if len(shape) < 2:
        return prod(shape), itemsize
    return prod(shape[:-1]), shape[-1] * itemsize


def _common(tensors: Sequence[Tensor], axes: Callable[[Tensor], tuple[int, ...]]) -> Tensor:
    if not tensors:
        raise ValueError("nothing to stack")
    first = tensors[0]
    if not first.shape:
        raise ValueError("cannot join single numbers")
    for tensor in tensors[1:]:
        if (tensor.dtype, tensor.cast) != (first.dtype, first.cast):
            raise ValueError(f"cannot join {tensor.out_dtype} with {first.out_dtype}")
        if len(tensor.shape) != len(first.shape) or axes(tensor) != axes(first):
            raise ValueError(f"cannot join {list(tensor.shape)} with {list(first.shape)}")
    return first


def _cut_rows(bands: Iterable[Band], start: int, stop: int) -> Iterator[Band]:
    top = 0
    for band in bands:
        a, b = max(start - top, 0), min(stop - top, band.rows)
        if a < b:
            yield band.cut(a, b)
        top += band.rows


def _edges(bands: Iterable[Band]) -> Iterator[int]:
    top = 0
    for band in bands:
        top += band.rows
        yield top


def _split_at(bands: tuple[Band, ...], edges: Sequence[int]) -> list[Band]:
    pieces: list[Band] = []
    source = iter(bands)
    band, top = next(source), 0
    for edge in edges:
        if edge > top + band.rows:
            raise ValueError("bands of different height")
        pieces.append(band.cut(0, edge - top))
        band = next(source, Band(0, ())) if edge - top == band.rows else band.cut(edge - top, band.rows)
        top = edge
    return pieces


def _join_bands(bands: Iterable[Band]) -> list[Band]:
    """Merges neighbours that continue one another, so that plans stay small."""
    joined: list[Band] = []
    for band in bands:
        if joined and (merged := _below(joined[-1], band)):
            joined[-1] = merged
        else:
            joined.append(band)
    return joined


def _below(upper: Band, lower: Band) -> Band | None:
    """Both as one band if every piece of `lower` continues the piece above it."""
    if len(upper.pieces) != len(lower.pieces):
        return None
    pieces: list[Piece] = []
    for a, b in zip(upper.pieces, lower.pieces, strict=True):
        if isinstance(a, Const) and isinstance(b, Const) and (a.pattern, a.width) == (b.pattern, b.width):
            pieces.append(Const(a.pattern, a.rows + b.rows, a.width))
            continue
        if not (isinstance(a, Region) and isinstance(b, Region)):
            return None
        (file, at, rows, pitch, width), (of, start, more, other, wide) = a, b  # fields of their own take longer
        if rows == 1 < more:
            pitch = other
        if start != at + rows * pitch or width != wide or file != of or (more > 1 and other != pitch):
            return None
        pieces.append(Region(file, at, rows + more, pitch, width))
    return Band(upper.rows + lower.rows, tuple(pieces))


def flat(piece: Piece) -> Piece:
    """A contiguous piece as a single row."""
    size = piece.rows * piece.width
    if isinstance(piece, Const):
        return Const(piece.pattern, 1, size)
    return piece._replace(rows=1, pitch=size, width=size)


def _runs(band: Band) -> Iterator[Piece]:
    if len(band.pieces) == 1 and band.pieces[0].contiguous:
        yield flat(band.pieces[0])
        return
    for row in range(band.rows):
        for piece in band.pieces:
            yield flat(piece.cut(row, row + 1, 0, piece.width))


def _coalesce(runs: Iterable[Piece]) -> Iterator[Piece]:
    """Joins single-row pieces that follow one another in their source."""
    last: Piece | None = None
    for run in runs:
        joined = _beside(last, run) if last is not None else None
        if joined is not None:
            last = joined
            continue
        if last is not None:
            yield last
        last = run
    if last is not None:
        yield last


def _beside(a: Piece, b: Piece) -> Piece | None:
    width = a.width + b.width
    if isinstance(a, Region) and isinstance(b, Region) and (a.file, a.offset + a.width) == (b.file, b.offset):
        return a._replace(pitch=width, width=width)
    if isinstance(a, Const) and isinstance(b, Const) and a.pattern == b.pattern:
        return a._replace(width=width)
    if isinstance(a, Literal) and isinstance(b, Literal) and a.data is b.data and a.offset + a.width == b.offset:
        return a._replace(pitch=width, width=width)
    return None


def _reflow(bands: Iterable[Band], width: int) -> Iterator[Band]:
    """The same bytes in rows of `width`: whole rows of a run stay one band, the rest is pieced together."""
    partial: list[Piece] = []
    missing = width
    for run in _coalesce(run for band in bands for run in _runs(band)):
        start = 0
        if missing < width:
            start = min(missing, run.width)
            partial.append(run.cut(0, 1, 0, start))
            missing -= start
            if missing:
                continue
            yield Band(1, tuple(partial))
            partial, missing = [], width
        whole = (run.width - start) // width
        if whole:
            block = run.cut(0, 1, start, start + whole * width)
            yield Band(whole, (_unflat(block, whole, width),))
            start += whole * width
        if start < run.width:
            partial = [run.cut(0, 1, start, run.width)]
            missing = width - (run.width - start)


def _unflat(piece: Piece, rows: int, width: int) -> Piece:
    if isinstance(piece, Const):
        return Const(piece.pattern, rows, width)
    return piece._replace(rows=rows, pitch=width, width=width)
