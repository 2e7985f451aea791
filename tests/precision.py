"""Comparing numbers that two ways of computing gave, on any processor.

How a sum is rounded depends on the processor, the number of threads, and where memory begins. So a test must not need
a rounding error: neither that there is one, nor that there is none, nor its size. Differences that a test has to see
are put in on purpose and are far larger; bits are compared only of what was moved or rounded once.
"""

from __future__ import annotations

import math

import torch

from ckptkit.verification.tokens import default_rows

MANY_ROWS = default_rows(250, rows=8)
"""Token ids for bf16, where errors are judged in units of other errors: their 99th percentile over so many positions
is about the same on every processor; over a hundred it would be that of the two worst ones."""


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest |value|; 0 if both are zero, else infinite where nothing is expected."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    wide, other = (tensor.detach().double() for tensor in (expected, found))
    if not wide.numel():
        return 0.0
    size, difference = float(wide.abs().max()), float((other - wide).abs().max())
    return difference / size if size else (math.inf if difference else 0.0)


def settled(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Which values are rounded to `dtype` alike, whatever the rounding errors of fp32 that they come with.

    Args:
        exact: Values in fp64.
        dtype: A narrower type than fp32.

    Returns:
        Mask in the shape of `exact`: where a value is not close to the middle between two neighbours.
    """
    assert exact.dtype == torch.float64 and torch.finfo(dtype).bits < 32
    slack = exact.abs() * 1e-5
    mask: torch.Tensor = (exact - slack).to(dtype) == (exact + slack).to(dtype)
    assert mask.double().mean() > 0.9
    return mask
