"""A matrix with its two axes swapped, made while it is read.

The algebra's regions are rows; a column is as many regions as the matrix has rows. So a matrix is transposed in memory,
a few columns at a time: as many as are asked for at once, which is never more than a staging buffer.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from ckptkit.io.plan import origins_of
from ckptkit.tensors import Region, Tensor


def transposed(matrix: Tensor) -> Tensor:
    """The transpose of a stored matrix.

    Raises:
        ValueError: It is no matrix, or not made of regions of files alone.
    """
    pieces = [piece for band in matrix.bands for piece in band.pieces]
    if len(matrix.shape) != 2 or matrix.cast is not None or not all(isinstance(piece, Region) for piece in pieces):
        raise ValueError("only stored matrices are transposed")
    if not matrix.numel:
        return Tensor.full(matrix.dtype, matrix.shape[::-1])
    return Tensor.from_bytes(_Columns(matrix), matrix.dtype, matrix.shape[::-1])


@dataclass(frozen=True)
class _Columns:
    """The bytes of a matrix, column after column, as `ckptkit.tensors.Made` asks for them."""

    matrix: Tensor

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"columns of {self.matrix}".encode()).hexdigest()

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(sorted(origins_of([self.matrix])))

    def __len__(self) -> int:
        return self.matrix.nbytes

    def read(self, start: int, stop: int) -> bytes:
        """Bytes `start:stop`, cut out of whole columns."""
        # With NumPy, which commands that look at headers do not wait for.
        from ckptkit.io.reading import read_tensor

        rows, itemsize = self.matrix.shape[0], self.matrix.dtype.itemsize
        column = rows * itemsize
        first, last = start // column, -(-stop // column)
        block = read_tensor(self.matrix.cols(first, last)).reshape(rows, last - first, itemsize)
        base = first * column
        return block.transpose(1, 0, 2).tobytes()[start - base : stop - base]
