"""Tiles of a tensor: pieces of at most 1 MiB, whose borders depend on its type and shape alone.

A tile is a number of whole rows. A row that is longer than a tile is cut into several. So a tile is one run of the
row-major bytes, and cutting it out of a tensor that lies in many places stays cheap.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from ckptkit.tensors import Tensor

TILE = 1 << 20
"""The most bytes of a tile."""


@dataclass(frozen=True)
class Tiling:
    """The tiles of tensors of one size.

    Attributes:
        rows: Rows of the tensor; its leading axes are folded into rows.
        width: Elements of a row.
        itemsize: Bytes of an element.
    """

    rows: int
    width: int
    itemsize: int

    @classmethod
    def of(cls, shape: tuple[int, ...], itemsize: int) -> Tiling:
        """The tiles of tensors with this shape."""
        if len(shape) < 2:
            return cls(prod(shape), 1, itemsize)
        return cls(prod(shape[:-1]), shape[-1], itemsize)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.rows * self.width * self.itemsize

    @property
    def size(self) -> int:
        """Bytes of a tile, but for the last one of the tensor, or of a row that is cut."""
        return max(self._in_height, 1) * min(self.width, self._in_width) * self.itemsize

    @property
    def count(self) -> int:
        """Number of tiles."""
        if not self.nbytes:
            return 0
        return self.rows * self._per_row if self._per_row > 1 else -(-self.rows // self._in_height)

    def span(self, number: int) -> tuple[int, int]:
        """Where a tile begins and ends among the row-major bytes."""
        if self._per_row > 1:
            row, part = divmod(number, self._per_row)
            start = row * self.width + part * self._in_width
            return start * self.itemsize, min(start + self._in_width, (row + 1) * self.width) * self.itemsize
        row = self.width * self.itemsize
        return number * self._in_height * row, min((number + 1) * self._in_height, self.rows) * row

    def at(self, byte: int) -> int:
        """The number of the tile that holds a byte."""
        if self._per_row > 1:
            row, left = divmod(byte // self.itemsize, self.width)
            return row * self._per_row + left // self._in_width
        return byte // (self._in_height * self.width * self.itemsize)

    def cut(self, tensor: Tensor, number: int) -> Tensor:
        """A tile of a tensor of this size."""
        folded = tensor.reshape((self.rows,) if len(tensor.shape) < 2 else (self.rows, self.width))
        start, stop = self.span(number)
        if self._per_row > 1:
            row, left = divmod(start // self.itemsize, self.width)
            return folded.rows(row, row + 1).cols(left, left + (stop - start) // self.itemsize)
        row_bytes = self.width * self.itemsize
        return folded.rows(start // row_bytes, stop // row_bytes)

    @property
    def _in_width(self) -> int:
        """Elements of a row that a tile has room for."""
        return TILE // self.itemsize

    @property
    def _per_row(self) -> int:
        """Tiles that a row is cut into."""
        return -(-self.width // self._in_width)

    @property
    def _in_height(self) -> int:
        """Whole rows that a tile has room for."""
        return self._in_width // max(self.width, 1)
