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
        # In place: a new array for each step costs more than the step, most of it in the kernel.
        for weight, value in zip(weights, values, strict=True):
            if weight != 1:
                value *= value.dtype.type(weight)
        total, *others = values
        for value in others:
            if value.dtype == total.dtype:
                total += value
            else:
                total = total + value
        if whole != 1:
            total /= total.dtype.type(whole)
        return total

    return elementwise(dtype, tensors, ("mean", tuple(weights)), mean, double=double, any_rows=True)
