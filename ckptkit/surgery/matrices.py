"""Matrices that are made row by row: an adapter of any size never lies in memory as a whole."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckptkit.dtypes import DTYPES, DType
from ckptkit.tensors import Tensor

Rows = NDArray[np.float32]

_TILE = 1 << 16
"""Elements that are made at a time."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix whose rows are made when they are wanted.

    Attributes:
        shape: Rows and columns.
        rows: (start, stop) -> these rows, float32 [stop - start, columns]. May be called from any thread, and always
            with the same ranges for the same matrix.
        recipe: Names all that decides about the values: it is what tells a resumed run that the bytes are the same.
        files: The files that the values come from.
    """

    shape: tuple[int, int]
    rows: Callable[[int, int], Rows]
    recipe: str
    files: tuple[str, ...] = ()

    def tensor(self, dtype: DType) -> Tensor:
        """The matrix as a tensor, rounded to `dtype` while the bytes pass."""
        return Tensor.from_bytes(_Bytes(self), DTYPES["F32"], self.shape).astype(dtype)

    def array(self) -> Rows:
        """The whole of it, float32 [rows, columns]."""
        data = _Bytes(self)
        return np.frombuffer(data.read(0, len(data)), np.float32).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class _Bytes:
    """The row-major float32 bytes of a matrix, as `ckptkit.tensors.Made` asks for them."""

    matrix: Matrix

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.matrix.recipe} {self.matrix.shape}".encode()).hexdigest()

    @property
    def files(self) -> tuple[str, ...]:
        return self.matrix.files

    def __len__(self) -> int:
        return 4 * self.matrix.shape[0] * self.matrix.shape[1]

    def read(self, start: int, stop: int) -> bytes:
        """Bytes `start:stop`, cut out of whole tiles: the same row is always made in the same company."""
        height, width = self.matrix.shape
        step = max(1, _TILE // width)
        first = start // (4 * width * step)
        last = -(-stop // (4 * width * step))
        tiles = [self.matrix.rows(n * step, min(height, (n + 1) * step)) for n in range(first, last)]
        data = b"".join(np.ascontiguousarray(tile, np.float32).tobytes() for tile in tiles)
        base = first * step * 4 * width
        return data[start - base : stop - base]


def of_array(values: NDArray[np.floating], recipe: str) -> Matrix:
    """A matrix that is at hand."""
    height, width = values.shape
    return Matrix((height, width), lambda start, stop: values[start:stop].astype(np.float32), recipe)


def identity(rows: int, columns: int) -> Matrix:
    """Ones on the diagonal."""

    def make(start: int, stop: int) -> Rows:
        rows: Rows = (np.arange(start, stop)[:, None] == np.arange(columns)).astype(np.float32)
        return rows

    return Matrix((rows, columns), make, "identity")


def zeros(rows: int, columns: int) -> Matrix:
    """Nothing but zeros."""
    return Matrix((rows, columns), lambda start, stop: np.zeros((stop - start, columns), np.float32), "zeros")


def negative(matrix: Matrix) -> Matrix:
    """The matrix with all signs changed."""
    return Matrix(matrix.shape, lambda start, stop: -matrix.rows(start, stop), f"-({matrix.recipe})", matrix.files)


def above(matrices: Sequence[Matrix]) -> Matrix:
    """Matrices of equal width, one below the other."""
    edges = np.cumsum([0, *(matrix.shape[0] for matrix in matrices)]).tolist()

    def make(start: int, stop: int) -> Rows:
        parts = [
            matrix.rows(max(start, top) - top, min(stop, bottom) - top)
            for matrix, top, bottom in zip(matrices, edges, edges[1:], strict=False)
            if max(start, top) < min(stop, bottom)
        ]
        rows: Rows = np.concatenate(parts)
        return rows

    return Matrix((edges[-1], matrices[0].shape[1]), make, _joined("above", matrices), _files(matrices))


def beside(matrices: Sequence[Matrix]) -> Matrix:
    """Matrices of equal height, side by side."""

    def make(start: int, stop: int) -> Rows:
        return np.concatenate([matrix.rows(start, stop) for matrix in matrices], axis=1)

    width = sum(matrix.shape[1] for matrix in matrices)
    return Matrix((matrices[0].shape[0], width), make, _joined("beside", matrices), _files(matrices))


def uniform(rows: int, columns: int, bound: float, seed: int, stream: int) -> Matrix:
    """Random numbers, uniform in [-bound, bound).

    Every row has its own part of the stream of a counter-based generator, so that it does not matter which rows are
    made when. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011), as `numpy.random.Philox`.

    Args:
        rows: Number of rows.
        columns: Number of columns.
        bound: Largest absolute value.
        seed: Which of the many matrices.
        stream: Tells matrices of one seed apart.
    """
    blocks = -(-columns // 4)  # Philox gives four words at each count

    def make(start: int, stop: int) -> Rows:
        words = _words(seed, stream, start * blocks, (stop - start) * blocks)
        unit = (words.reshape(stop - start, 4 * blocks)[:, :columns] >> np.uint64(11)) * 2.0**-53
        return ((2 * unit - 1) * bound).astype(np.float32)

    return Matrix((rows, columns), make, f"uniform({bound!r}, {seed}, {stream})")


def orthogonal(rows: int, columns: int, seed: int) -> Matrix:
    """A random matrix with orthonormal columns (rows, if it has more columns than rows).

    It is the corner of H D3 H D2 H D1, with the orthonormal Hartley transform H and random signs D: orthogonal by
    construction, and a row takes three fast transforms, where a QR decomposition needs the whole matrix. Source: the
    structured rotations of Choromanski et al., "The Unreasonable Effectiveness of Structured Random Orthogonal
    Embeddings" (2017), with Hartley's transform for Hadamard's, which exists for powers of two only.

    Args:
        rows: Number of rows.
        columns: Number of columns.
        seed: Which of the many matrices.
    """
    size = max(rows, columns)
    signs = 1.0 - 2.0 * (_words(seed, 0, 0, 3 * -(-size // 4))[: 3 * size].reshape(3, size) & np.uint64(1))

    def make(start: int, stop: int) -> Rows:
        vectors = np.zeros((stop - start, size))
        vectors[np.arange(stop - start), np.arange(start, stop)] = 1.0
        for row in signs:
            vectors = _hartley(vectors) * row
        return vectors[:, :columns].astype(np.float32)

    return Matrix((rows, columns), make, f"orthogonal({seed})")


def _words(seed: int, stream: int, start: int, count: int) -> NDArray[np.uint64]:
    """`4 * count` random words from the count `start` on."""
    generator = np.random.Philox(key=np.array([seed, stream], np.uint64)).advance(start)
    return np.asarray(generator.random_raw(4 * count), np.uint64)


def _hartley(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """The orthonormal discrete Hartley transform of every row; it is its own inverse."""
    spectrum = np.fft.fft(vectors, axis=1, norm="ortho")
    return np.asarray(spectrum.real - spectrum.imag)


def _joined(name: str, matrices: Sequence[Matrix]) -> str:
    return f"{name}({', '.join(f'{matrix.recipe} {matrix.shape}' for matrix in matrices)})"


def _files(matrices: Sequence[Matrix]) -> tuple[str, ...]:
    return tuple(sorted({file for matrix in matrices for file in matrix.files}))
