"""Experts in one tensor, in which the parts of an expert take turns: GPT-OSS has gate and up so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ckptkit.io.computed import columns_apart, columns_together
from ckptkit.tables.spelling import Form
from ckptkit.tensors import Tensor, hstack


@dataclass(frozen=True)
class Alternating(Form):
    """Output by output, one of each part. A part alone is every output.

    Nothing here goes by shapes: GPT-OSS has square matrices.

    Attributes:
        columns: As in `Form`.
    """

    columns: bool

    def shape(self, parts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of the tensor of an expert, from those of its parts: weights or biases."""
        outputs = sum(part[0] for part in parts)
        return (*parts[0][1:], outputs) if self.columns else (outputs, *parts[0][1:])

    def split(self, whole: Tensor, parts: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """The parts of the tensor, from their shapes."""
        if len(whole.shape) > 1 and not self.columns:
            return self.rows_apart(whole, [part[0] for part in parts])
        matrix = whole if len(whole.shape) > 1 else whole.reshape((1, whole.shape[0]))
        apart = columns_apart(matrix, len(parts))
        return [tensor.reshape(shape) for tensor, shape in zip(apart, parts, strict=True)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`.

        Raises:
            ValueError: The parts differ in dtype or shape.
        """
        if len(parts[0].shape) > 1:
            return columns_together(parts) if self.columns else self.rows_together(parts)
        joined = columns_together([part.reshape((part.shape[0], 1)) for part in parts])
        return joined.reshape((joined.shape[1],))

    def rows_apart(self, whole: Tensor, heights: Sequence[int]) -> list[Tensor]:
        """The rows of each part from all rows."""
        width = whole.shape[1]
        turns = whole.reshape((heights[0], len(heights) * width))
        return [turns.cols(at * width, (at + 1) * width) for at in range(len(heights))]

    def rows_together(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `rows_apart`.

        Raises:
            ValueError: The parts differ in dtype or shape.
        """
        turns = hstack(parts)
        return turns.reshape((len(parts) * turns.shape[0], parts[0].shape[1]))
