"""Floating-point casts on raw bytes, with the results of torch's `Tensor.to(dtype)` on a CPU.

All casts round to nearest, ties to even. Types narrower than F32 go through F32, as they do in
torch; so an F64 rounds twice on its way to BF16 or F16.

A NaN stays a NaN: it is made quiet and keeps its sign and the leading bits of its payload (what the
hardware does), but BF16 to F32 keeps the bits as they are, and every NaN becomes `0x7FC0` in BF16.
There torch has no single answer (0x7FC0 or 0xFFFF, depending on where in a tensor the element lies),
and ours is the one of its scalar code.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptkit.dtypes import DType, rounded_to_bf16
from ckptkit.io.castable import check_cast

Bytes = NDArray[np.uint8]

_QUIET = np.uint32(0x0040_0000)
_BF16_NAN = np.uint16(0x7FC0)


def convert(data: Bytes, source: DType, target: DType) -> Bytes:
    """The elements of `data` as `target`.

    Args:
        data: Whole elements of `source`, contiguous.
        source: Their type.
        target: The type to get.

    Returns:
        Contiguous bytes; `data` itself if both types are the same.

    Raises:
        UnsupportedError: There is no such cast.
    """
    check_cast(source, target)
    if source == target:
        return data
    with np.errstate(all="ignore"):
        return _encode(decode(data, source), target).view(np.uint8)


def encode(values: NDArray[np.float32] | NDArray[np.float64], target: DType) -> Bytes:
    """Numbers as the bytes of elements of `target`, each rounded once, to nearest even.

    Args:
        values: float32 or float64, of any shape.
        target: F64, F32, F16 or BF16.
    """
    with np.errstate(all="ignore"):
        if values.dtype == np.float64 and target.name in ("F16", "BF16"):
            values = _narrowed(values.astype(np.float64, copy=False), _BELOW_TIES[target.name])
        return np.ascontiguousarray(_encode(values, target)).reshape(-1).view(np.uint8)


def rounded(values: NDArray[np.float32] | NDArray[np.float64], target: DType) -> NDArray[Any]:
    """Numbers rounded to a type once, and kept in the type that `decode` gives for it.

    Args:
        values: float32; float64 for F64.
        target: F64, F32, F16 or BF16.
    """
    if target.name in ("F64", "F32"):
        return values
    with np.errstate(all="ignore"):
        single = values.astype(np.float32, copy=False)
        if target.name == "F16":
            return single.astype(np.float16).astype(np.float32)
        bits = rounded_to_bf16(single.view(np.uint32)) << np.uint32(16)
        nan = np.isnan(single)
        if nan.any():
            bits[nan] = np.uint32(_BF16_NAN) << np.uint32(16)
        return bits.view(np.float32)


_BELOW_TIES = {"F16": np.uint32(0x0FFF), "BF16": np.uint32(0x7FFF)}
"""Bits of a float32 that are 0 in every number halfway between two neighbours of a narrower type."""


def _narrowed(values: NDArray[np.float64], below: np.uint32) -> NDArray[np.float32]:
    """float64 as float32, such that rounding that to a narrower type gives what rounding at once gives.

    Rounding twice differs only where the float32 lies halfway between two narrower numbers, and the float64 did not.
    There the float32 is "rounded to odd": towards zero, and the last bit says that something was cut off.

    Args:
        values: The numbers.
        below: See `_BELOW_TIES`.
    """
    near = values.astype(np.float32)
    bits = near.view(np.uint32)
    halfway = np.flatnonzero((bits & below).reshape(-1) == 0)
    if not halfway.size:
        return near
    exact, some = values.reshape(-1)[halfway], near.reshape(-1)[halfway]
    wide, odd = some.astype(np.float64), some.view(np.uint32)
    inexact = np.isfinite(some) & (wide != exact)
    odd[inexact & (np.abs(wide) > np.abs(exact))] -= np.uint32(1)
    odd[inexact] |= np.uint32(1)
    bits.reshape(-1)[halfway] = odd
    return near


def decode(data: Bytes, source: DType) -> NDArray[np.float32] | NDArray[np.float64]:
    """The elements of `data` as NumPy's floats: F64 as float64, F32, F16 and BF16 as float32."""
    if source.name == "F64":
        return data.view(np.float64)
    if source.name == "F32":
        return data.view(np.float32)
    if source.name == "F16":
        return _quiet(data.view(np.float16).astype(np.float32))
    bits = data.view(np.uint16).astype(np.uint32)
    bits <<= np.uint32(16)
    return bits.view(np.float32)


def _encode(values: NDArray[np.float32] | NDArray[np.float64], target: DType) -> NDArray[np.generic]:
    if target.name == "F64":
        return values.astype(np.float64, copy=False)
    single = values.astype(np.float32, copy=False)
    if target.name == "F32":
        return single
    if target.name == "F16":
        return _quiet(single).astype(np.float16)
    return _to_bf16(single)


def _quiet(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same values with every NaN quiet; NumPy would carry a signalling one over."""
    nan = np.isnan(values)
    if not nan.any():
        return values
    bits = values.view(np.uint32).copy()
    bits[nan] |= _QUIET
    return bits.view(np.float32)


def _to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    result = rounded_to_bf16(values.view(np.uint32)).astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        result[nan] = _BF16_NAN
    return result
