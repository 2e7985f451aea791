"""Reads raw bytes as numbers: counts those that are not finite, and measures how far two rows are apart."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ckptkit.dtypes import DTYPES, DType
from ckptkit.io.castable import CASTABLE
from ckptkit.io.casts import decode

Bytes = NDArray[np.uint8]

_WORDS: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class _Bits(NamedTuple):
    """The encoding of NaN and infinity in a floating-point type, as integers of the bits without the sign.

    Attributes:
        magnitude: Mask of all bits except the sign.
        largest: The largest finite number.
        infinity: Infinity, for types that have it. Larger integers are NaN.
    """

    magnitude: int
    largest: int
    infinity: int | None


_BITS = {
    "F64": _Bits(2**63 - 1, 0x7FEF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    "F32": _Bits(2**31 - 1, 0x7F7F_FFFF, 0x7F80_0000),
    "F16": _Bits(2**15 - 1, 0x7BFF, 0x7C00),
    "BF16": _Bits(2**15 - 1, 0x7F7F, 0x7F80),
    "F8_E5M2": _Bits(2**7 - 1, 0x7B, 0x7C),
    "F8_E4M3": _Bits(2**7 - 1, 0x7E, None),
    "F8_E8M0": _Bits(2**8 - 1, 0xFE, None),
}
_PARTS = {"C64": DTYPES["F32"]}
"""Types whose elements are several numbers."""


_BLOCK = 16384
"""Elements at a time. Arrays of this size fit into a cache, and into memory that malloc reuses at once."""


@dataclass(frozen=True)
class Survey:
    """Counts of special values in an array. Both parts of a complex number count.

    Attributes:
        nan: How many are not a number.
        inf: How many are infinite.
        zero: Whether all are zero.
    """

    nan: int = 0
    inf: int = 0
    zero: bool = True

    def __add__(self, other: Survey) -> Survey:
        return Survey(self.nan + other.nan, self.inf + other.inf, self.zero and other.zero)


def survey(data: Bytes, dtype: DType) -> Survey:
    """Counts the values that are not finite.

    Args:
        data: Whole elements, contiguous.
        dtype: Their type.
    """
    dtype = _PARTS.get(dtype.name, dtype)
    words: Any = data.view(_WORDS[dtype.itemsize])
    bits = _BITS.get(dtype.name)
    if bits is None:
        return Survey(zero=not words.any())
    words = words & words.dtype.type(bits.magnitude)
    top = int(words.max(initial=0))
    if top <= bits.largest:
        return Survey(zero=top == 0 and dtype.name != "F8_E8M0")
    inf = 0 if bits.infinity is None else int(np.count_nonzero(words == bits.infinity))
    return Survey(int(np.count_nonzero(words > bits.largest)) - inf, inf, False)


@dataclass(frozen=True)
class Gap:
    """How far two rows of elements are apart.

    Attributes:
        differing: How many elements have different bits.
        first: Index of the first of them, or None.
        largest: Largest |difference| of two finite elements, in float64 (float32 for types of 16 bits and less).
    """

    differing: int = 0
    first: int | None = None
    largest: float = 0.0

    def then(self, other: Gap, before: int) -> Gap:
        """Both together, `before` elements being in front of the other's."""
        first = self.first if self.first is not None or other.first is None else before + other.first
        return Gap(self.differing + other.differing, first, max(self.largest, other.largest))


def gap(left: Bytes, right: Bytes, dtype: DType) -> Gap:
    """Compares elements one by one.

    Args:
        left: Whole elements, contiguous.
        right: As many of the same type.
        dtype: Their type.
    """
    word = _WORDS[dtype.itemsize]
    a, b = left.view(word), right.view(word)
    total = Gap()
    if np.array_equal(a, b):
        return total
    for start in range(0, len(a), _BLOCK):
        total = total.then(_gap(a[start : start + _BLOCK], b[start : start + _BLOCK], dtype), start)
    return total


def _gap(a: NDArray[Any], b: NDArray[Any], dtype: DType) -> Gap:
    unequal = a != b
    count = int(np.count_nonzero(unequal))
    if not count:
        return Gap()
    if 2 * count < len(a):
        a, b = a[unequal], b[unequal]
    with np.errstate(all="ignore"):
        apart = np.abs(_numbers(a.view(np.uint8), dtype) - _numbers(b.view(np.uint8), dtype))
    largest = float(apart.max())
    if not np.isfinite(largest):
        largest = float(apart[np.isfinite(apart)].max(initial=0))
    return Gap(count, int(np.argmax(unequal)), largest)


def common_type(left: DType, right: DType) -> DType | None:
    """A type that holds the numbers of both exactly, or None if there is none to which bytes are cast on the way."""
    if left == right:
        return left
    if not {left.name, right.name} <= set(CASTABLE):
        return None
    return DTYPES["F64" if "F64" in (left.name, right.name) else "F32"]


def _numbers(data: Bytes, dtype: DType) -> NDArray[Any]:
    """The elements as numbers that can be subtracted."""
    if dtype.name in CASTABLE:
        values = decode(data, dtype)
        return values.astype(np.float64) if dtype.name == "F32" else values
    if dtype.name == "C64":
        return data.view(np.complex64).astype(np.complex128)
    if dtype.is_float:
        return _float8(dtype.name)[data]
    if dtype.name == "BOOL":
        return data.astype(np.float64)
    kind = "i" if dtype.name.startswith("I") else "u"
    return data.view(f"{kind}{dtype.itemsize}").astype(np.float64)


@cache
def _float8(name: str) -> NDArray[np.float32]:
    """The 256 values of a type of 8 bits. Source: the OCP specifications of 8-bit and of microscaling formats."""
    codes = np.arange(256)
    if name == "F8_E8M0":
        values = np.ldexp(1.0, codes - 127)
        values[255] = np.nan
        return _single(values)
    mantissa_bits, bias = (2, 15) if name == "F8_E5M2" else (3, 7)
    exponent = (codes & 0x7F) >> mantissa_bits
    mantissa = codes & ((1 << mantissa_bits) - 1)
    fraction = (exponent > 0) + mantissa / (1 << mantissa_bits)
    values = np.ldexp(fraction, np.maximum(exponent, 1) - bias) * np.where(codes & 0x80, -1.0, 1.0)
    magnitude, bits = codes & 0x7F, _BITS[name]
    values[magnitude > bits.largest] = np.nan
    if bits.infinity is not None:
        values[magnitude == bits.infinity] = np.inf
    return _single(values)


def _single(values: NDArray[np.float64]) -> NDArray[np.float32]:
    single: NDArray[np.float32] = values.astype(np.float32)
    return single
