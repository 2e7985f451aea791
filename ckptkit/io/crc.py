"""CRC-32 arithmetic: the checksum of a whole from the checksums of its parts.

A CRC is the remainder of a polynomial over GF(2), so appending n zero bytes multiplies it by x^(8n) modulo the CRC
polynomial, and the CRC of `a + b` is that product for a, plus (exclusive or) the CRC of b. Parts can therefore be
checksummed in any order, by any thread. Source: RFC 1952, section 8 (the polynomial); the algebra is the textbook one.
"""

from __future__ import annotations

from functools import lru_cache

try:
    # Intel's library, which also serves ARM, does many times what zlib does.
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

__all__ = ["crc32", "crc32_combine"]

_POLYNOMIAL = 0xEDB88320  # reflected: the most significant bit is the coefficient of x^0
_ONE = 0x80000000
_X8 = 0x00800000


def crc32_combine(crc_a: int, crc_b: int, len_b: int) -> int:
    """The CRC-32 of `a + b`.

    Args:
        crc_a: CRC-32 of `a`.
        crc_b: CRC-32 of `b`.
        len_b: Length of `b` in bytes.

    Raises:
        ValueError: `len_b` is negative.
    """
    if len_b < 0:
        raise ValueError(f"a part of {len_b} bytes")
    return _multiply(_zeros(len_b), crc_a) ^ crc_b


@lru_cache(maxsize=4096)
def _zeros(length: int) -> int:
    """The operator that appends `length` zero bytes: x^(8 * length). Chunks have few distinct lengths."""
    operator, bit = _ONE, 0
    while length:
        if length & 1:
            operator = _multiply(_doublings(bit), operator)
        length >>= 1
        bit += 1
    return operator


@lru_cache(maxsize=128)
def _doublings(bit: int) -> int:
    """x^(8 * 2^bit)."""
    return _X8 if bit == 0 else _multiply(_doublings(bit - 1), _doublings(bit - 1))


def _multiply(a: int, b: int) -> int:
    """The product of two polynomials modulo the CRC polynomial."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product
