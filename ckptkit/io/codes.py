"""The arithmetic of quantised numbers on NumPy arrays: codes and scales -> numbers, and numbers -> codes and scales.

Formulas, with every product in float32 and one rounding to the wanted type:

- FP8: number = E4M3(code) * scale of its block. E4M3 has no infinities; codes 0x7F and 0xFF are NaN, of either sign.
- MXFP4: number = E2M1(code) * 2^(byte - 127) for 32 numbers in a row; the low four bits of a byte come first. A byte of
  255 is NaN (Open Compute Project, Microscaling Formats 1.0).
- INT4: number = (code - 8) * scale of its group; eight codes in an int32, the lowest four bits first
  (compressed-tensors, `pack-quantized`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptkit.dtypes import DType
from ckptkit.io.casts import decode, encode, rounded

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

MXFP4_GROUP = 32
E4M3_MAX = 448.0
"""The largest number of E4M3."""
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_CHUNK = 1 << 16
"""Elements that are dequantised at a time: what this takes stays in the caches of a core."""
_LOOKED_UP = 512
"""Elements of a block from which on a table of its 256 numbers is worth its memory."""
_KINDS = 1 << 10
"""Scales that differ, at most, for which a table of all pairs of four bits is worth its memory: 1 KiB for each."""
_SMALL = 1 << 16
"""Elements that are quantised at a time."""


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
    if height * width < _LOOKED_UP:
        return _each_product(codes, scales, block, dtype, above)
    # A block has few different numbers: each is rounded once, and the elements are looked up.
    with np.errstate(all="ignore"):
        products = scales[..., None] * e4m3()
    table = encode(products, dtype).view(_unsigned(dtype)).reshape(products.shape)
    table[..., 255] |= _sign(dtype)  # so that numbers tell the two codes of NaN apart
    table[..., 127] &= ~_sign(dtype)
    table = table.reshape(len(scales), -1)
    out = np.empty((rows, columns), table.dtype)
    narrow = np.uint16 if table.shape[1] <= 1 << 16 else np.uint32  # sums in `intp` take twice as long
    across = (np.arange(columns) // width * 256).astype(narrow)
    if height == 1:  # each row has numbers of its own
        table, down = table.reshape(1, -1), np.arange(rows)[:, None] * table.shape[1]
    size = (max(_CHUNK // max(columns, 1), 1), columns)
    index, sums = np.empty(size, np.intp), np.empty(size, narrow)
    for top, bottom, strip in _strips(rows, columns, height, above):
        place = index[: bottom - top]
        np.add(codes[top:bottom], across, out=sums[: bottom - top])
        place[...] = sums[: bottom - top]
        if height == 1:
            place += down[top:bottom]
        np.take(table[strip], place, out=out[top:bottom], mode="wrap")
    return out.reshape(-1).view(np.uint8)


def _each_product(codes: Bytes, scales: Floats, block: tuple[int, int], dtype: DType, above: int) -> Bytes:
    """As `from_fp8`, number by number: a block this small has no more numbers than a table of them would."""
    rows, columns = codes.shape
    across, down = np.arange(columns) // block[1], (above + np.arange(rows)) // block[0]
    height, made = max(_CHUNK // max(columns, 1), 1), []
    for top in range(0, rows, height):
        with np.errstate(all="ignore"):
            numbers = e4m3()[codes[top : top + height]] * scales[down[top : top + height]][:, across]
        found = encode(numbers, dtype).view(_unsigned(dtype)).reshape(numbers.shape)
        found[codes[top : top + height] == 255] |= _sign(dtype)
        found[codes[top : top + height] == 127] &= ~_sign(dtype)
        made.append(found.reshape(-1).view(np.uint8))
    return np.concatenate(made) if made else np.empty(0, np.uint8)


def from_mxfp4(codes: Bytes, scales: Bytes, dtype: DType) -> Bytes:
    """MXFP4 numbers.

    Args:
        codes: [rows, groups * 16].
        scales: E8M0, [rows, groups].
        dtype: The type to round to.

    Returns:
        The bytes of [rows, groups * 32].
    """
    return _from_nibbles(codes, e8m0()[scales], e2m1(), MXFP4_GROUP, dtype)


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
    return _from_nibbles(codes, scales, np.arange(-8, 8, dtype=np.float32), group, dtype)


def _from_nibbles(codes: Bytes, scales: Floats, numbers: Floats, group: int, dtype: DType) -> Bytes:
    """Numbers of four bits, two in a byte, the low ones first.

    Args:
        codes: [rows, groups * group / 2].
        scales: [rows, groups].
        numbers: The 16 numbers of the codes.
        group: Numbers that share a scale.
        dtype: The type to round to.
    """
    kinds = _few_kinds(scales) if dtype.name == "BF16" else None
    if kinds is None:
        return _each_nibble(codes, scales, _pairs(numbers), group, dtype)
    # Few scales differ: the pairs of each are rounded once, and the bytes are looked up.
    rows, groups = scales.shape
    places, different = kinds
    with np.errstate(all="ignore"):
        products = encode(different[:, None] * numbers, dtype).view(np.uint16).reshape(-1, 16).astype(np.uint32)
    table = (products[:, None, :] | products[:, :, None] << np.uint32(16)).reshape(-1)
    out = np.empty((rows, codes.shape[1]), np.uint32)
    size = (max(2 * _CHUNK // max(codes.shape[1], 1), 1), codes.shape[1])
    index, sums = np.empty(size, np.intp), np.empty(size, places.dtype)
    for top in range(0, rows, size[0]):
        some = codes[top : top + size[0]]
        place, total = index[: len(some)], sums[: len(some)].reshape(len(some), groups, -1)
        np.add(some.reshape(total.shape), places[top : top + size[0], :, None], out=total)
        place[...] = total.reshape(place.shape)
        np.take(table, place, out=out[top : top + size[0]], mode="wrap")
    return out.reshape(-1).view(np.uint8)


def _few_kinds(scales: Floats) -> tuple[NDArray[Any], Floats] | None:
    """For each scale the place of its first pair in a table of 256 for each that differs, and those that differ.

    None if they are more than a table is worth, or if they are no numbers of bfloat16.
    """
    bits = scales.view(np.uint32)
    if (bits & np.uint32(0xFFFF)).any():
        return None
    upper = (bits >> np.uint32(16)).astype(np.uint16)
    known = np.zeros(1 << 16, np.bool_)
    known[upper] = True
    different = np.flatnonzero(known)
    if len(different) > min(_KINDS, scales.size // 4):
        return None
    place = np.zeros(1 << 16, np.uint16 if len(different) <= 256 else np.uint32)
    place[different] = np.arange(len(different)) * 256
    return place[upper], (different.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _each_nibble(codes: Bytes, scales: Floats, pairs: NDArray[np.uint64], group: int, dtype: DType) -> Bytes:
    """As `_from_nibbles`, number by number."""
    rows, groups = scales.shape
    out = np.empty((rows, groups * group * dtype.itemsize), np.uint8)
    step = max(_CHUNK // max(groups * group, 1), 1)
    found = np.empty((step, codes.shape[1]), np.uint64)
    with np.errstate(all="ignore"):
        for top in range(0, rows, step):
            some = codes[top : top + step]
            np.take(pairs, some, out=found[: len(some)], mode="wrap")  # which is faster than `pairs[some]`
            numbers = found[: len(some)].view(np.float32).reshape(-1, groups, group)
            numbers *= scales[top : top + step, :, None]
            out[top : top + step] = encode(numbers, dtype).reshape(len(numbers), -1)
    return out.reshape(-1)


def _pairs(numbers: Floats) -> NDArray[np.uint64]:
    """The two numbers of each byte, as one element."""
    codes = np.arange(256)
    return np.ascontiguousarray(np.stack([numbers[codes & 15], numbers[codes >> 4]], axis=1)).view(np.uint64)[:, 0]


def _unsigned(dtype: DType) -> type[Any]:
    return {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[dtype.itemsize]


def _sign(dtype: DType) -> Any:
    """The bit of the sign in a floating-point type."""
    return _unsigned(dtype)(1 << 8 * dtype.itemsize - 1)


def largest_of_blocks(values: Floats, block: tuple[int, int]) -> Floats:
    """The largest magnitude of each block, [ceil(rows / block height), ceil(columns / block width)].

    Args:
        values: [rows, columns]; the first row begins a block.
        block: Height and width of a block.
    """
    height, width = block
    across = np.arange(0, values.shape[1], width)
    found = np.empty((-(-len(values) // height), len(across)), np.float32)
    for number, top in enumerate(range(0, len(values), height)):
        strip = values[top : top + height]
        largest = np.maximum(strip.max(axis=0), -strip.min(axis=0))
        found[number] = np.maximum.reduceat(largest, across)
    return found


def largest_of_groups(values: Floats, group: int) -> Floats:
    """The largest magnitude of each group of a row, [rows, columns / group]; NaN where there is one.

    Args:
        values: Contiguous, [rows, columns].
        group: Numbers in a group.
    """
    # Magnitudes are ordered as their bits are, of which the maximum is found in a third of the time. NaN is largest.
    given, found = values.reshape(-1).view(np.int32), np.empty(values.size // group, np.int32)
    step = max(_SMALL // group, 1)
    bits, starts = np.empty(step * group, np.int32), np.arange(step) * group
    for first in range(0, len(found), step):
        some = given[first * group : (first + step) * group]
        part = bits[: len(some)]
        np.bitwise_and(some, np.int32(0x7FFFFFFF), out=part)
        out = found[first : first + step]
        np.maximum.reduceat(part, starts[: len(out)], out=out)
    return found.view(np.float32).reshape(len(values), -1)


def fp8_scales(largest: Floats, *, powers: bool = False) -> Floats:
    """The scales of new FP8 codes: the largest magnitude of a block / 448; 1 where all is zero.

    Args:
        largest: The largest magnitude of each block.
        powers: Whether each scale is the next power of two instead.
    """
    scales = np.where(largest > 0, largest / np.float32(E4M3_MAX), np.float32(1))
    if powers:
        mantissa, exponent = np.frexp(scales)  # 0.5 <= mantissa < 1
        scales = np.ldexp(np.float32(1), exponent - (mantissa == 0.5)).astype(np.float32)
    return np.maximum(scales, np.finfo(np.float32).tiny)


def to_fp8(values: Floats, scales: Floats, block: tuple[int, int], above: int = 0) -> Bytes:
    """FP8 codes for numbers in blocks with known scales, rounded to nearest even; what is too large becomes 448.

    NaN stays NaN, with its sign.

    Args:
        values: [rows, columns].
        scales: As of `from_fp8`, and so are the others.
        block: Height and width of a block.
        above: Rows of the first blocks that are above the first row.
    """
    rows, columns = values.shape
    out = np.empty((rows, columns), np.uint8)
    across = np.repeat(scales, block[1], axis=1)[:, :columns]
    encoder = _Encoder(_codes_of_e4m3())
    with np.errstate(all="ignore"):
        for top, bottom, strip in _strips(rows, columns, block[0], above, _SMALL):
            divided = encoder.room(bottom - top, columns)
            np.divide(values[top:bottom], across[strip if block[0] > 1 else slice(top, bottom)], out=divided)
            encoder.codes(divided, out[top:bottom])
    return out.reshape(-1)


def mxfp4_scales(largest: Floats) -> Bytes:
    """The scales of new MXFP4 codes, 2^(floor(log2(largest magnitude of a group)) - 2), as E8M0.

    Args:
        largest: The largest magnitude of each group, [rows, groups].
    """
    exponent = (largest.view(np.uint32) >> 23).astype(np.int32) - 2
    found: Bytes = exponent.clip(0, 254).astype(np.uint8)
    return found


def to_mxfp4(values: Floats, scales: Bytes) -> Bytes:
    """MXFP4 codes for numbers with known scales, rounded to nearest even; what is too large becomes 6.

    Args:
        values: [rows, groups * 32].
        scales: E8M0, [rows, groups].
    """
    return _packed(values, e8m0()[scales], MXFP4_GROUP, _Encoder(_codes_of_e2m1()))


def int4_scales(largest: Floats, dtype: DType) -> Floats:
    """The scales of new INT4 codes, as compressed-tensors has them: the largest magnitude of a group / 7.5.

    Args:
        largest: The largest magnitude of each group, [rows, groups].
        dtype: Type of the scales, to which they are rounded.
    """
    scales = rounded(largest / np.float32(7.5), dtype)
    return np.where(scales == 0, np.float32(_EPS[dtype.name]), scales)


def to_int4(values: Floats, scales: Floats, group: int) -> Bytes:
    """INT4 codes for numbers with known scales, rounded to nearest even; what is too large becomes -8 or 7.

    Args:
        values: [rows, columns].
        scales: [rows, columns / group].
        group: Numbers that share a scale.
    """
    return _packed(values, scales, group, _Rounder())


_EPS = {"BF16": 2.0**-7, "F16": 2.0**-10, "F32": 2.0**-23}
"""The scale of a group of zeros in compressed-tensors: the step above 1 of each type."""


def _packed(values: Floats, scales: Floats, group: int, encoder: _Encoder | _Rounder) -> Bytes:
    """Codes of four bits, two in a byte, the low ones first.

    Args:
        values: [rows, columns].
        scales: [rows, columns / group].
        group: Numbers that share a scale.
        encoder: What finds the codes.
    """
    rows, columns = values.shape
    out = np.empty((rows, columns // 2), np.uint8)
    step = max(_SMALL // max(columns, 1), 1)
    found = np.empty((step, columns), np.uint8)
    with np.errstate(all="ignore"):
        for top in range(0, rows, step):
            some = values[top : top + step]
            divided, groups = encoder.room(len(some), columns), (len(some), -1, group)
            np.divide(some.reshape(groups), scales[top : top + step, :, None], out=divided.reshape(groups))
            encoder.codes(divided, found[: len(some)])
            pairs = found[: len(some)].view("<u2")
            out[top : top + step] = pairs | pairs >> np.uint16(4)  # of which the lower byte is kept
    return out.reshape(-1)


@lru_cache(maxsize=1)
def _codes_of_e4m3() -> Bytes:
    found = _nearest(e4m3()[:127], 7)
    found[np.isnan(_upper_halves())] |= np.uint8(127)
    return found


@lru_cache(maxsize=1)
def _codes_of_e2m1() -> Bytes:
    return _nearest(e2m1()[:8], 3)


def _upper_halves() -> Floats:
    """The 65,536 numbers of float32 whose lower 16 bits are zero, by their upper bits."""
    return (np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)).view(np.float32)


def _nearest(numbers: Floats, sign: int) -> Bytes:
    """The codes of `_upper_halves`: of the nearest number, of the even one of two as near, of the largest at most.

    Args:
        numbers: The numbers without sign, ascending; each one's place is its code.
        sign: The bit of the sign.
    """
    halves = _upper_halves()
    with np.errstate(all="ignore"):
        size = np.abs(halves.astype(np.float64))
    borders = (numbers[1:].astype(np.float64) + numbers[:-1]) / 2
    below = np.searchsorted(borders, size)  # NaN is beyond all
    tie = (below < len(borders)) & (borders[below.clip(max=len(borders) - 1)] == size)
    found: Bytes = (below + (tie & (below % 2 == 1))).astype(np.uint8)
    return found | np.signbit(halves).astype(np.uint8) << np.uint8(sign)


_WHOLE = np.float32(3 << 22 | 8)
"""From 2^23 to 2^24, numbers of float32 are a whole one apart; and 8 more, which is how INT4 stores -8 as 0."""


class _Buffer:
    """Room for numbers to encode, which is used again and again."""

    def __init__(self) -> None:
        self._numbers = np.empty(0, np.float32)

    def room(self, rows: int, columns: int) -> Floats:
        """A buffer for so many numbers."""
        size = rows * columns
        if len(self._numbers) < size:
            self._numbers = np.empty(size, np.float32)
        return self._numbers[:size].reshape(rows, columns)


class _Rounder(_Buffer):
    """The codes of INT4: whole numbers from -8 to 7, and 8 more."""

    def codes(self, values: Floats, out: Bytes) -> None:
        """Puts the codes of numbers, which are in `room` and are lost, into `out`."""
        np.clip(values, -8, 7, out=values)
        values += _WHOLE  # where float32 has whole numbers alone: they are rounded, and the lowest byte is the code
        np.copyto(out, values.view(np.uint32), casting="unsafe")


class _Encoder(_Buffer):
    """Looks codes of few bits up by the upper 16 bits of float32 numbers.

    The last of these bits is set where the lower ones are not all zero (rounding to odd). The borders between codes
    have at least two bits fewer, so a number stays on its side of each.

    Args:
        table: The code of each of `_upper_halves`.
    """

    def __init__(self, table: Bytes) -> None:
        super().__init__()
        self._table = table
        self._bits, self._index = np.empty(0, np.uint32), np.empty(0, np.intp)

    def codes(self, values: Floats, out: Bytes) -> None:
        """Puts the codes of numbers, which are in `room`, into `out`."""
        size = values.size
        if len(self._bits) < size:
            self._bits, self._index = np.empty(size, np.uint32), np.empty(size, np.intp)
        bits, upper, index = values.reshape(-1).view(np.uint32), self._bits[:size], self._index[:size]
        np.bitwise_and(bits, np.uint32(0xFFFF), out=upper)
        upper += np.uint32(0xFFFF)  # bit 16 says whether they were not all zero
        upper |= bits
        upper >>= np.uint32(16)
        index[...] = upper
        np.take(self._table, index.reshape(out.shape), out=out, mode="wrap")


def _strips(rows: int, columns: int, height: int, above: int, chunk: int = _CHUNK) -> Iterator[tuple[int, int, int]]:
    """Rows in small numbers that lie in one row of blocks: (first, row after the last, number of the row of blocks)."""
    step = max(chunk // max(columns, 1), 1)
    if height == 1:
        yield from ((top, min(top + step, rows), 0) for top in range(0, rows, step))
        return
    top = 0
    while top < rows:
        strip = (top + above) // height
        bottom = min(top + step, (strip + 1) * height - above, rows)
        yield top, bottom, strip
        top = bottom
