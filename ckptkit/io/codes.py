"""The arithmetic of quantised numbers on NumPy arrays: codes and scales -> numbers, and numbers -> codes and scales.

Formulas, with every product in float32 and one rounding to the wanted type:

- FP8: number = E4M3(code) * scale of its block. E4M3 has no infinities; codes 0x7F and 0xFF are NaN.
- MXFP4: number = E2M1(code) * 2^(byte - 127) for 32 numbers in a row; the low four bits of a byte come first. A byte of
  255 is NaN (Open Compute Project, Microscaling Formats 1.0).
- INT4: number = (code - 8) * scale of its group; eight codes in an int32, the lowest four bits first
  (compressed-tensors, `pack-quantized`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptkit.dtypes import DType
from ckptkit.io.casts import decode, encode

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

MXFP4_GROUP = 32
E4M3_MAX = 448.0
"""The largest number of E4M3."""
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_CHUNK = 1 << 16
"""Elements that are dequantised at a time: what this takes stays in the caches of a core."""


@lru_cache(maxsize=1)
def e4m3() -> Floats:
    """The numbers of the 256 codes of E4M3."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    numbers = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8.0 + mantissa, exponent - 10))
    numbers[codes & 127 == 127] = np.nan
    found: Floats = np.where(codes < 128, numbers, -numbers).astype(np.float32)
    return found


@lru_cache(maxsize=1)
def e2m1() -> Floats:
    """The numbers of the 16 codes of E2M1."""
    return np.array([*_FP4, *(-number for number in _FP4)], np.float32)


@lru_cache(maxsize=1)
def e8m0() -> Floats:
    """The numbers of the 256 codes of E8M0: powers of two, and NaN."""
    numbers: Floats = np.ldexp(np.float32(1), np.arange(-127, 129).clip(max=127)).astype(np.float32)
    numbers[255] = np.nan
    return numbers


def scale_numbers(data: Bytes, dtype: DType) -> Floats:
    """Scales as float32.

    Args:
        data: Their bytes.
        dtype: F32, F16, BF16, F8_E8M0, or U8 for E8M0.
    """
    if dtype.name in ("F8_E8M0", "U8"):
        return e8m0()[data]
    return decode(data, dtype).astype(np.float32, copy=False)


def from_fp8(codes: Bytes, scales: Floats, block: tuple[int, int], dtype: DType, above: int = 0) -> Bytes:
    """FP8 numbers in blocks.

    Args:
        codes: E4M3, [rows, columns].
        scales: A scale for each block, [ceil((above + rows) / block height), ceil(columns / block width)].
        block: Height and width of a block.
        dtype: The type to round to.
        above: Rows of the first blocks that are above the first row.

    Returns:
        The bytes of [rows, columns].
    """
    rows, columns = codes.shape
    height, width = block
    # A block has few different numbers: each is rounded once, and the elements are looked up.
    with np.errstate(all="ignore"):
        products = scales[..., None] * e4m3()
    table = encode(products, dtype).view(_unsigned(dtype)).reshape(len(scales), -1)
    out = np.empty((rows, columns), table.dtype)
    across = np.arange(columns) // width * 256
    step = max(_CHUNK // max(columns, 1), 1)
    index = np.empty((min(step, rows), columns), np.intp)
    if height == 1:  # each row has numbers of its own
        table, down = table.reshape(-1), np.arange(rows)[:, None] * table.shape[1]
        for top in range(0, rows, step):
            some = codes[top : top + step]
            place = index[: len(some)]
            np.add(some, across, out=place)
            place += down[top : top + step]
            np.take(table, place, out=out[top : top + step], mode="wrap")
        return out.reshape(-1).view(np.uint8)
    for strip, numbers in enumerate(table):
        bottom = min((strip + 1) * height - above, rows)
        for top in range(max(strip * height - above, 0), bottom, step):
            some = codes[top : min(top + step, bottom)]
            place = index[: len(some)]
            np.add(some, across, out=place)
            np.take(numbers, place, out=out[top : top + len(some)], mode="wrap")
    return out.reshape(-1).view(np.uint8)


def from_mxfp4(codes: Bytes, scales: Bytes, dtype: DType) -> Bytes:
    """MXFP4 numbers.

    Args:
        codes: [rows, groups * 16].
        scales: E8M0, [rows, groups].
        dtype: The type to round to.

    Returns:
        The bytes of [rows, groups * 32].
    """
    return _from_nibbles(codes, e8m0()[scales], _pairs_of_e2m1(), MXFP4_GROUP, dtype)


def from_int4(codes: Bytes, scales: Floats, group: int, dtype: DType) -> Bytes:
    """INT4 numbers.

    Args:
        codes: [rows, columns / 2]: the bytes of the packed int32.
        scales: [rows, columns / group].
        group: Numbers that share a scale.
        dtype: The type to round to.

    Returns:
        The bytes of [rows, columns].
    """
    return _from_nibbles(codes, scales, _pairs_of_int4(), group, dtype)


def _from_nibbles(codes: Bytes, scales: Floats, pairs: NDArray[np.uint64], group: int, dtype: DType) -> Bytes:
    """Numbers of four bits, two in a byte, the low ones first."""
    rows, groups = scales.shape
    out = np.empty((rows, groups * group * dtype.itemsize), np.uint8)
    step = max(_CHUNK // max(groups * group, 1), 1)
    with np.errstate(all="ignore"):
        for top in range(0, rows, step):
            numbers = pairs[codes[top : top + step]].view(np.float32).reshape(-1, groups, group)
            numbers *= scales[top : top + step, :, None]
            out[top : top + step] = encode(numbers, dtype).reshape(len(numbers), -1)
    return out.reshape(-1)


@lru_cache(maxsize=1)
def _pairs_of_e2m1() -> NDArray[np.uint64]:
    return _pairs(e2m1())


@lru_cache(maxsize=1)
def _pairs_of_int4() -> NDArray[np.uint64]:
    return _pairs(np.arange(-8, 8, dtype=np.float32))


def _pairs(numbers: Floats) -> NDArray[np.uint64]:
    """The two numbers of each byte, as one element."""
    codes = np.arange(256)
    return np.ascontiguousarray(np.stack([numbers[codes & 15], numbers[codes >> 4]], axis=1)).view(np.uint64)[:, 0]


def _unsigned(dtype: DType) -> type[Any]:
    return {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[dtype.itemsize]
