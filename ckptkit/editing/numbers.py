"""Averages, element by element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ckptkit.dtypes import DType
from ckptkit.io.computed import elementwise
from ckptkit.tensors import Tensor

if TYPE_CHECKING:
    from ckptkit.io.computed import Values

WIDE = ("F32", "F64")
"""Types in which an error of float32 sums would show."""


def weighted_mean(tensors: Sequence[Tensor], weights: Sequence[float], dtype: DType, *, double: bool) -> Tensor:
    """`sum(weight * tensor) / sum(weight)`, summed in this order in float32 or float64, rounded once.

    Args:
        tensors: The tensors, of one shape.
        weights: A weight for each; their sum is not 0.
        dtype: Type of the result.
        double: Whether to sum in float64.
    """
    whole = sum(weights)

    def mean(at: int, values: list[Values]) -> Values:
        total, *others = values
        if weights[0] != 1:
            total = total * total.dtype.type(weights[0])
        for weight, value in zip(weights[1:], others, strict=True):
            total = total + (value if weight == 1 else value * value.dtype.type(weight))
        return total if whole == 1 else total / total.dtype.type(whole)

    return elementwise(dtype, tensors, ("mean", tuple(weights)), mean, double=double)
