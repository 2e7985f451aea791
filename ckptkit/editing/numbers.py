"""Tensors that are computed from several tensors of one shape, tile by tile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ckptkit.dtypes import DType
from ckptkit.io.computed import as_matrix, computed, numbers
from ckptkit.tensors import Tensor

if TYPE_CHECKING:
    from ckptkit.io.computed import Values

WIDE = ("F32", "F64")
"""Types in which an error of float32 sums would show."""


def elementwise(
    dtype: DType, inputs: Sequence[Tensor], what: object, values: Callable[[list[Values]], Values], *, double: bool
) -> Tensor:
    """A tensor whose elements are each computed from the elements at the same place of some tensors.

    Args:
        dtype: Its type.
        inputs: The tensors, of one shape.
        what: What is computed, as a value whose `repr` says it in full.
        values: Rows of every input, in float32 or float64 -> rows of the result. It may change its arguments.
        double: Whether the inputs come in float64.
    """
    shape = inputs[0].shape
    rows = [as_matrix(tensor) for tensor in inputs]

    def make(start: int, stop: int) -> Values:
        return values([numbers(tensor.rows(start, stop), double=double) for tensor in rows])

    return computed(dtype, rows[0].shape, inputs, (what, double), make).reshape(shape)


def weighted_mean(tensors: Sequence[Tensor], weights: Sequence[float], dtype: DType, *, double: bool) -> Tensor:
    """`sum(weight * tensor) / sum(weight)`, summed in this order in float32 or float64, rounded once.

    Args:
        tensors: The tensors, of one shape.
        weights: A weight for each; their sum is not 0.
        dtype: Type of the result.
        double: Whether to sum in float64.
    """
    whole = sum(weights)

    def mean(values: list[Values]) -> Values:
        total, *others = values
        if weights[0] != 1:
            total = total * total.dtype.type(weights[0])
        for weight, value in zip(weights[1:], others, strict=True):
            total = total + (value if weight == 1 else value * value.dtype.type(weight))
        return total if whole == 1 else total / total.dtype.type(whole)

    return elementwise(dtype, tensors, ("mean", tuple(weights)), mean, double=double)
