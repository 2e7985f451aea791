"""Computed tensors: bytes that are made, tile by tile, while they are written.

A tile is a number of whole rows, which depends on the tensor alone. So every element comes from the same computation
whoever asks for it, and any number of threads gives the same bytes. Finished tiles stay in a small cache that all
threads share: a range of bytes rarely ends where a tile does.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Generic, TypeVar

from ckptkit.dtypes import DType
from ckptkit.io.cache import Cache
from ckptkit.io.plan import Plan, source_files
from ckptkit.io.segments import origins
from ckptkit.tensors import Literal, Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = NDArray[np.float32] | NDArray[np.float64]
    Bytes = NDArray[np.uint8]

Found = TypeVar("Found")
TILE = 1 << 20
"""Elements of a tile: about as many as this, in whole rows."""
BLOCK = 1 << 15
"""Elements of a block, in which a tile is computed element by element."""
READ = 1 << 17
"""Elements of each tensor that are read at a time for blocks, in whole rows."""
CACHE = 64 << 20
"""Bytes of finished tiles, and of values from which tiles are made, that stay in memory."""

MEMORY = CACHE + (64 << 20)
"""Bytes of memory that computed tensors take beside the buffers that move bytes: caches, and a tile in every thread."""


_tiles: Cache[memoryview] = Cache(CACHE // 2, len)
_operands: Cache[Values] = Cache(CACHE // 2, lambda values: values.nbytes)


def operand(tensor: Tensor, digest: str, *, double: bool = False) -> Values:
    """A small tensor as float32 (or float64) numbers, which stays in memory while tiles need it.

    Args:
        tensor: The tensor, of a floating-point type.
        digest: `digest_of` it.
        double: Whether to give float64.
    """
    return _operands.get((digest, double), lambda: numbers(tensor, double=double))


def numbers(tensor: Tensor, *, double: bool = False) -> Values:
    """The elements of a tensor of floating-point numbers, in its shape.

    Returns:
        float32; float64 if the tensor is F64, or with `double`.
    """
    import numpy as np

    from ckptkit.io.casts import decode
    from ckptkit.io.reading import read_tensor

    found = decode(read_tensor(tensor), tensor.out_dtype).reshape(tensor.shape)
    return found.astype(np.float64, copy=False) if double else found


def holds_computed(plan: Plan) -> bool:
    """Whether any bytes of a plan are computed."""
    tensors = origins(file.segments for file in plan.files)
    pieces = (piece for tensor in tensors for band in tensor.bands for piece in band.pieces)
    return any(isinstance(piece, Literal) and isinstance(piece.data, _Computed) for piece in pieces)


def digest_of(tensors: Sequence[Tensor], *what: object) -> str:
    """A digest of bytes that are made from tensors, for `Made.digest`."""
    recipe = hashlib.sha256(repr(what).encode())
    for tensor in tensors:
        recipe.update(repr(tensor).encode())
    return recipe.hexdigest()


def computed(
    dtype: DType, shape: Sequence[int], inputs: Sequence[Tensor], what: object, values: Callable[[int, int], Values]
) -> Tensor:
    """A tensor of numbers that are computed in float32 or float64, and rounded once to its type.

    Args:
        dtype: Its type: F64, F32, F16 or BF16.
        shape: Its shape; it has at least one axis.
        inputs: The tensors that it is computed from.
        what: Everything else that its values depend on, as a value whose `repr` says it in full.
        values: (first row, row after the last) -> the values of rows, as a matrix. Equal arguments give equal values.
    """

    def make(start: int, stop: int) -> Bytes:
        from ckptkit.io.casts import encode

        return encode(values(start, stop), dtype)

    return made(dtype, tuple(shape), inputs, ("computed", what), make)


def elementwise(
    dtype: DType,
    inputs: Sequence[Tensor],
    what: object,
    values: Callable[[int, list[Values]], Values],
    *,
    double: bool,
) -> Tensor:
    """A tensor whose elements are each computed from the elements at the same place of tensors of its shape.

    Tiles are computed in blocks that stay in the caches of a core.

    Args:
        dtype: Its type: F64, F32, F16 or BF16.
        inputs: The tensors, of one shape.
        what: Everything else that its values depend on, as a value whose `repr` says it in full.
        values: (index of the first element in row-major order, elements of each input from there) -> as many elements.
            Equal arguments give equal values. It may change its arguments.
        double: Whether the inputs come in float64.
    """
    matrices = [as_matrix(tensor) for tensor in inputs]

    def make(start: int, stop: int) -> Bytes:
        import numpy as np

        from ckptkit.io.casts import encode

        return np.concatenate(
            [encode(values(at, some), dtype) for at, some in blocks(matrices, start, stop, double=double)]
        )

    return made(dtype, matrices[0].shape, inputs, ("elementwise", what, double), make).reshape(inputs[0].shape)


def tiles(shape: Sequence[int]) -> list[tuple[int, int]]:
    """The tiles of a vector or matrix of this shape: (first row, row after the last)."""
    width = shape[-1] if len(shape) > 1 else 1
    height = _tile_rows(width, 1)
    return [(row, min(row + height, shape[0])) for row in range(0, shape[0] if width else 0, height)]


def blocks(
    matrices: Sequence[Tensor], start: int, stop: int, *, double: bool, size: int | None = None
) -> Iterator[tuple[int, list[Values]]]:
    """Rows of tensors of one shape, block by block: (index of the first element, elements of each tensor from there).

    Args:
        matrices: Vectors or matrices.
        start: First row.
        stop: Row after the last.
        double: Whether to give float64.
        size: Elements of a block; None for those of `elementwise`.
    """
    import numpy as np

    from ckptkit.io.casts import decode
    from ckptkit.io.reading import read_tensor

    width = matrices[0].shape[-1] if len(matrices[0].shape) > 1 else 1
    size = size or BLOCK
    height = max(max(size, READ) // width, 1)
    for top in range(start, stop, height):
        bottom = min(top + height, stop)
        raw = [read_tensor(tensor.rows(top, bottom)) for tensor in matrices]
        for first in range(0, (bottom - top) * width, size):
            found = []
            for data, tensor in zip(raw, matrices, strict=True):
                item = tensor.out_dtype.itemsize
                some = decode(data[first * item : (first + size) * item], tensor.out_dtype)
                found.append(some.astype(np.float64, copy=False) if double else some)
            yield top * width + first, found


class Once(Generic[Found]):
    """A value that is found when it is first wanted, by one thread; others wait for it."""

    def __init__(self, find: Callable[[], Found]) -> None:
        self._find = find
        self._lock = threading.Lock()
        self._found: list[Found] = []

    def __call__(self) -> Found:
        """The value."""
        with self._lock:
            if not self._found:
                self._found.append(self._find())
        return self._found[0]


def recast(tensor: Tensor, dtype: DType, *, double: bool = False) -> Tensor:
    """A tensor in another type, as a computed one: what is joined with computed tensors must not be a cast.

    Args:
        tensor: The tensor, of a floating-point type.
        dtype: The other type.
        double: Whether the numbers pass as float64.
    """
    matrix = as_matrix(tensor)

    def values(start: int, stop: int) -> Values:
        return numbers(matrix.rows(start, stop), double=double)

    return computed(dtype, matrix.shape, [tensor], ("cast", double), values).reshape(tensor.shape)


def as_matrix(tensor: Tensor) -> Tensor:
    """The same elements in whole rows, of which tiles consist. A vector stays one."""
    if len(tensor.shape) == 1:
        return tensor
    width = tensor.shape[-1] if tensor.shape else 1
    return tensor.reshape((tensor.numel // width if width else 0, width))


def permuted(tensor: Tensor, axes: tuple[int, int, int]) -> Tensor:
    """A tensor of three axes in another order of its axes, as `numpy.transpose` has it."""
    source = tensor.shape
    if tensor.cast is not None or len(source) != 3:
        raise ValueError("only tensors of three axes, and no casts, are permuted")
    shape = tuple(source[axis] for axis in axes)

    def make(start: int, stop: int) -> Bytes:
        import numpy as np

        from ckptkit.io.reading import read_tensor

        first, last = start // shape[1], -(-stop // shape[1])
        slab = _slab(tensor, axes[0], first, last)
        cut = tuple(last - first if axis == axes[0] else size for axis, size in enumerate(source))
        block = read_tensor(slab).reshape(*cut, tensor.dtype.itemsize).transpose(*axes, 3)
        rows = np.ascontiguousarray(block).reshape((last - first) * shape[1], -1)
        return rows[start - first * shape[1] : stop - first * shape[1]].reshape(-1)

    return made(tensor.dtype, shape, [tensor], ("permuted", axes), make, unit=shape[1])


def _slab(tensor: Tensor, axis: int, start: int, stop: int) -> Tensor:
    """Indices `start` to `stop` of one of three axes."""
    first, middle, last = tensor.shape
    if axis == 0:
        return tensor.rows(start, stop)
    if axis == 1:
        return tensor.reshape((first, middle * last)).cols(start * last, stop * last)
    return tensor.cols(start, stop)


def made(
    dtype: DType,
    shape: tuple[int, ...],
    inputs: Sequence[Tensor],
    what: object,
    make: Callable[[int, int], Bytes],
    unit: int = 1,
    tile: int | None = None,
) -> Tensor:
    """A tensor whose bytes are made.

    Args:
        dtype: Type of its elements.
        shape: Its shape; it has at least one axis.
        inputs: The tensors that it is computed from.
        what: Everything else that its bytes depend on, as a value whose `repr` says it in full.
        make: (first row, row after the last) -> the bytes of rows. Equal arguments give equal bytes.
        unit: A tile has a multiple of this number of rows.
        tile: Elements of a tile, about; None for `TILE`.
    """
    if not prod(shape):
        return Tensor.full(dtype, shape)
    return Tensor.from_bytes(_Computed(dtype, shape, tuple(inputs), what, make, unit, tile or TILE), dtype, shape)


def _tile_rows(width: int, unit: int, tile: int | None = None) -> int:
    """Rows of `width` elements in a tile: a multiple of `unit`."""
    return max((tile or TILE) // (width * unit), 1) * unit


@dataclass(frozen=True, eq=False, repr=False)
class _Computed:
    """The bytes of a computed tensor, as `ckptkit.tensors.Made` asks for them.

    Attributes:
        dtype: Type of its elements.
        shape: Its shape.
        inputs: The tensors that it is computed from.
        what: Everything else that its bytes depend on.
        make: (first row, row after the last) -> the bytes of rows.
        unit: A tile has a multiple of this number of rows.
        tile: Elements of a tile, about.
    """

    dtype: DType
    shape: tuple[int, ...]
    inputs: tuple[Tensor, ...]
    what: object
    make: Callable[[int, int], Bytes]
    unit: int
    tile: int

    def __repr__(self) -> str:
        return f"computed {self.digest}"

    @cached_property
    def digest(self) -> str:
        """A digest that identifies the bytes, computed without making them."""
        return digest_of(self.inputs, self.what, self.dtype, self.shape)

    @property
    def files(self) -> tuple[str, ...]:
        """The files that they are made from."""
        return tuple(sorted(source_files(self.inputs)))

    def __len__(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def read(self, start: int, stop: int) -> bytes | memoryview:
        """Bytes `start:stop`, cut out of whole tiles; a part of one tile is not copied."""
        size = self._rows * self._width
        tiles = range(start // size, -(-stop // size))
        pieces = [self._tile(tile)[max(start - tile * size, 0) : stop - tile * size] for tile in tiles]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    @cached_property
    def _width(self) -> int:
        """Bytes of a row."""
        return (self.shape[-1] if len(self.shape) > 1 else 1) * self.dtype.itemsize

    @cached_property
    def _rows(self) -> int:
        """Rows of a tile."""
        return _tile_rows(self._width // self.dtype.itemsize, self.unit, self.tile)

    def _tile(self, number: int) -> memoryview:
        start = number * self._rows
        stop = min(start + self._rows, len(self) // self._width)
        return _tiles.get((self.digest, start, stop), lambda: memoryview(self.make(start, stop)).cast("B"))
