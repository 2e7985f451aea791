"""Computed tensors: bytes that are made, tile by tile, while they are written.

A tile is a number of whole rows, which depends on the tensor alone. So every element comes from the same computation
whoever asks for it, and any number of threads gives the same bytes. Finished tiles stay in a small cache that all
threads share: a range of bytes rarely ends where a tile does.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ckptkit.dtypes import DType
from ckptkit.io.cache import Cache
from ckptkit.io.plan import Plan, origins_of, source_files
from ckptkit.io.segments import origins
from ckptkit.io.stores.mirror import mirrored, shown
from ckptkit.tensors import Literal, Made, Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = NDArray[np.float32] | NDArray[np.float64]
    Bytes = NDArray[np.uint8]

Found = TypeVar("Found")
TILE = 1 << 20
"""Elements of a tile: about as many as this, in whole rows."""
TURNED = 1 << 21
"""Elements of a tile of columns that become rows: for each tile, all rows of the source pass through a buffer."""
BLOCK = 1 << 17
"""Elements of a block, in which a tile is computed element by element. With smaller ones, threads that take turns at
Python's lock wait longer; larger ones are beyond the caches of a core."""
READ = 1 << 20
"""Elements that are read at a time for blocks, of all tensors together, in whole rows."""
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
    key = (digest, _state_of(source_files([tensor])), double)
    return _operands.get(key, lambda: numbers(tensor, double=double))


def _state_of(files: Iterable[str]) -> tuple[tuple[int, ...] | None, ...]:
    """What tells whether files were written anew: what is kept of a path is not for the next file there."""
    found: list[tuple[int, ...] | None] = []
    for file in sorted(files):
        if (remote := mirrored(file)) is not None:
            found.append(remote.about.version)
            continue
        try:
            state = os.stat(file)
        except OSError:
            found.append(None)  # whoever reads it says so
        else:
            found.append((state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns))
    return tuple(found)


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
        recipe.update(shown(repr(tensor)).encode())
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
    any_rows: bool = False,
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
        any_rows: Whether `values` gives an element the same value in whatever block it lies. Then threads need not wait
            for each other's tiles.
    """
    matrices = [as_matrix(tensor) for tensor in inputs]
    width = _width_of(matrices[0])

    def make(start: int, stop: int) -> Bytes:
        import numpy as np

        from ckptkit.io.casts import encode

        first, size = start * width, dtype.itemsize
        out = np.empty((stop - start) * width * size, np.uint8)
        for at, some in blocks(matrices, start, stop, double=double):
            found = values(at, some)
            out[(at - first) * size : (at - first + found.size) * size] = encode(found, dtype)
        return out

    recipe = ("elementwise", what, double)
    return made(dtype, matrices[0].shape, inputs, recipe, make, any_rows=any_rows).reshape(inputs[0].shape)


def tiles(shape: Sequence[int]) -> list[tuple[int, int]]:
    """The tiles of a vector or matrix of this shape: (first row, row after the last)."""
    width = shape[-1] if len(shape) > 1 else 1
    height = tile_rows(width, 1)
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
    from ckptkit.io.source import Sources

    width = _width_of(matrices[0])
    size = size or BLOCK
    height = max(max(size, READ // len(matrices)) // width, 1)
    with Sources() as sources:
        for top in range(start, stop, height):
            bottom = min(top + height, stop)
            raw = [read_tensor(tensor.rows(top, bottom), sources=sources) for tensor in matrices]
            for first in range(0, (bottom - top) * width, size):
                found = []
                for data, tensor in zip(raw, matrices, strict=True):
                    item = tensor.out_dtype.itemsize
                    some = decode(data[first * item : (first + size) * item], tensor.out_dtype)
                    found.append(some.astype(np.float64, copy=False) if double else some)
                yield top * width + first, found


def _width_of(matrix: Tensor) -> int:
    """Elements of a row of a vector or matrix."""
    return matrix.shape[-1] if len(matrix.shape) > 1 else 1


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


@dataclass(frozen=True)
class Apart:
    """The recipe of every `count`th column of a matrix from column `at` on, each as a row."""

    at: int
    count: int


@dataclass(frozen=True)
class Together:
    """The recipe of a matrix whose columns are the rows of some matrices, which take turns."""


def columns_apart(matrix: Tensor, count: int) -> list[Tensor]:
    """The columns of a stored matrix as rows: the first, and every `count`th after it; those from the second on; ...

    Args:
        matrix: [height, count * width]. A cast passes on to the results.
        count: How many tensors.

    Returns:
        `count` tensors, [width, height]. Of `columns_together` they are what that was made of.
    """
    height, columns = matrix.shape
    width, raw = columns // count, matrix.astype(matrix.dtype)
    if (recipe := whole_recipe(raw)) is not None and isinstance(recipe[0], Together) and len(recipe[1]) == count:
        return [part if matrix.cast is None else part.astype(matrix.cast) for part in recipe[1]]

    def taking(at: int) -> Callable[[int, int], Bytes]:
        def make(start: int, stop: int) -> Bytes:
            import numpy as np

            block = _elements(raw.cols(start * count, stop * count)).reshape(height, stop - start, count)
            out = np.empty((stop - start, height), block.dtype)
            _turn(block[:, :, at], out)
            return out.reshape(-1).view(np.uint8)

        return make

    parts = [made(raw.dtype, (width, height), [raw], Apart(at, count), taking(at), tile=TURNED) for at in range(count)]
    return [part if matrix.cast is None else part.astype(matrix.cast) for part in parts]


def columns_together(parts: Sequence[Tensor]) -> Tensor:
    """The inverse of `columns_apart`.

    Args:
        parts: Matrices [width, height] of one dtype, with one cast or none.

    Returns:
        [height, count * width]; of the results of `columns_apart`, the matrix that they are from.

    Raises:
        ValueError: Their dtypes, casts or shapes differ.
    """
    count, cast = len(parts), parts[0].cast
    if any((part.dtype, part.cast, part.shape) != (parts[0].dtype, cast, parts[0].shape) for part in parts):
        raise ValueError(f"cannot join {', '.join(f'{part.out_dtype}{list(part.shape)}' for part in parts)}")
    width, height = parts[0].shape
    raw = [part.astype(part.dtype) for part in parts]
    recipes = [whole_recipe(part) for part in raw]
    first = recipes[0]
    if first is not None and [recipe and recipe[0] for recipe in recipes] == [Apart(at, count) for at in range(count)]:
        sources = [recipe[1][0] for recipe in recipes if recipe is not None]
        if all(source.same_bytes_as(sources[0]) for source in sources):
            return sources[0] if cast is None else sources[0].astype(cast)

    def make(start: int, stop: int) -> Bytes:
        import numpy as np

        out = np.empty((stop - start, width, count), f"u{raw[0].dtype.itemsize}")
        for at, part in enumerate(raw):
            _turn(_elements(part.cols(start, stop)).reshape(width, stop - start), out[:, :, at])
        return out.reshape(-1).view(np.uint8)

    joined = made(raw[0].dtype, (height, count * width), raw, Together(), make, tile=TURNED)
    return joined if cast is None else joined.astype(cast)


def recipe_of(data: bytes | Made) -> tuple[object, tuple[Tensor, ...]] | None:
    """The recipe by which bytes are computed, and the tensors that they are computed from; None for other bytes."""
    return (data.what, data.inputs) if isinstance(data, _Computed) else None


def whole_recipe(tensor: Tensor) -> tuple[object, tuple[Tensor, ...]] | None:
    """`recipe_of` the bytes that a tensor consists of, if they are all of one recipe's."""
    runs = list(itertools.islice(tensor.runs(), 2))
    if len(runs) != 1 or not isinstance(runs[0], Literal):
        return None
    return recipe_of(runs[0].data) if (runs[0].offset, runs[0].width) == (0, len(runs[0].data)) else None


def _elements(tensor: Tensor) -> NDArray[Any]:
    """The elements of a tensor without a cast, whatever their type, in numbers of their size."""
    from ckptkit.io.reading import read_tensor

    return read_tensor(tensor).view(f"u{tensor.dtype.itemsize}")


def _turn(matrix: NDArray[Any], out: NDArray[Any]) -> None:
    """Copies the transpose of a matrix, a few rows at a time: those stay in the caches of a core."""
    for top in range(0, len(matrix), 64):
        out[:, top : top + 64] = matrix[top : top + 64].T


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
    any_rows: bool = False,
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
        any_rows: Whether `make` gives a row the same bytes with whatever rows it is made.
    """
    if not prod(shape):
        return Tensor.full(dtype, shape)
    found = _Computed(dtype, shape, tuple(inputs), what, make, unit, tile or TILE, any_rows)
    return Tensor.from_bytes(found, dtype, shape)


def tile_rows(width: int, unit: int, tile: int | None = None) -> int:
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
        any_rows: Whether `make` gives a row the same bytes with whatever rows it is made.
    """

    dtype: DType
    shape: tuple[int, ...]
    inputs: tuple[Tensor, ...]
    what: object
    make: Callable[[int, int], Bytes]
    unit: int
    tile: int
    any_rows: bool

    def __repr__(self) -> str:
        return f"computed {self.digest}"

    @cached_property
    def digest(self) -> str:
        """A digest that identifies the bytes, computed without making them."""
        return digest_of(self.inputs, self.what, self.dtype, self.shape)

    @property
    def files(self) -> tuple[str, ...]:
        """The files that they are made from."""
        return tuple(sorted(origins_of(self.inputs)))

    def __len__(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def read(self, start: int, stop: int) -> bytes | memoryview:
        """Bytes `start:stop`, cut out of whole tiles; a part of one tile is not copied."""
        size = self._rows * self._width
        if self.any_rows and stop - start >= size:
            first, last = start // self._width, -(-stop // self._width)
            return memoryview(self.make(first, last)).cast("B")[start - first * self._width :][: stop - start]
        tiles = range(start // size, -(-stop // size))
        # Those that another thread is making come last: by then it has made them.
        found = {tile: self._tile(tile) for tile in sorted(tiles, key=lambda tile: _tiles.makes(self._key(tile)))}
        pieces = [found[tile][max(start - tile * size, 0) : stop - tile * size] for tile in tiles]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    @cached_property
    def _width(self) -> int:
        """Bytes of a row."""
        return (self.shape[-1] if len(self.shape) > 1 else 1) * self.dtype.itemsize

    @cached_property
    def _rows(self) -> int:
        """Rows of a tile."""
        return tile_rows(self._width // self.dtype.itemsize, self.unit, self.tile)

    @cached_property
    def _state(self) -> tuple[tuple[int, ...] | None, ...]:
        """The state of the files. A plan notices by itself if they change while it is carried out."""
        return _state_of(source_files(self.inputs))

    def _key(self, tile: int) -> tuple[int, int, str, object]:
        """The first row of a tile, the row after its last, the digest, and the state of the files."""
        start = tile * self._rows
        return start, min(start + self._rows, len(self) // self._width), self.digest, self._state

    def _tile(self, number: int) -> memoryview:
        key = self._key(number)
        return _tiles.get(key, lambda: memoryview(self.make(*key[:2])).cast("B"))
