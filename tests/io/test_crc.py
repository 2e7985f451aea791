"""CRC arithmetic, and the library that computes CRCs, against zlib."""

from __future__ import annotations

import runpy
import sys
import time
import types
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptkit.io import crc
from ckptkit.io.crc import crc32, crc32_combine


@given(st.binary(max_size=9000), st.integers(0, 2**32 - 1))
def test_the_library_in_use(data: bytes, start: int) -> None:
    assert crc32(memoryview(data)) == zlib.crc32(data)
    assert crc32(data, start) == zlib.crc32(data, start)


@pytest.mark.parametrize("installed", [True, False])
def test_isal_where_it_is_installed(monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    other = types.SimpleNamespace(crc32=lambda data, value=0: 0)
    monkeypatch.setitem(sys.modules, "isal", types.ModuleType("isal"))
    monkeypatch.setitem(sys.modules, "isal.isal_zlib", other if installed else None)
    assert runpy.run_path(crc.__file__)["crc32"] is (other.crc32 if installed else zlib.crc32)


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_two_parts(a: bytes, b: bytes) -> None:
    assert crc32_combine(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(a + b)


@given(st.lists(st.binary(max_size=20), max_size=10))
def test_many_parts_in_any_grouping(parts: list[bytes]) -> None:
    forwards = 0
    for part in parts:
        forwards = crc32_combine(forwards, zlib.crc32(part), len(part))
    backwards, size = 0, 0
    for part in reversed(parts):
        backwards = crc32_combine(zlib.crc32(part), backwards, size)
        size += len(part)
    assert forwards == backwards == zlib.crc32(b"".join(parts))


@pytest.mark.parametrize("length", [1, 255, 256, 65_537, (1 << 20) + 3])
def test_long_parts(length: int) -> None:
    data = bytes(range(251)) * (length // 251 + 1)
    assert crc32_combine(zlib.crc32(b"start"), zlib.crc32(data[:length]), length) == zlib.crc32(
        b"start" + data[:length]
    )


def test_lengths_beyond_memory() -> None:
    """Appending 2^33 zeros in one step and in two."""
    half = 1 << 32
    zeros = 0
    chunk = zlib.crc32(bytes(1 << 20))
    for _ in range(4):
        zeros = crc32_combine(zeros, chunk, 1 << 20)
    size = 4 << 20
    while size < half:
        zeros, size = crc32_combine(zeros, zeros, size), size * 2
    start = zlib.crc32(b"x")
    twice = crc32_combine(zeros, zeros, half)
    assert crc32_combine(crc32_combine(start, zeros, half), zeros, half) == crc32_combine(start, twice, 2 * half)


def test_a_wrong_length_shows() -> None:
    a, b = zlib.crc32(b"one"), zlib.crc32(b"two")
    assert crc32_combine(a, b, 4) != zlib.crc32(b"onetwo")
    with pytest.raises(ValueError, match="-1 bytes"):
        crc32_combine(a, b, -1)


def test_ten_thousand_distinct_lengths_are_quick() -> None:
    start = time.process_time()
    for length in range(10_000_000, 10_010_000):
        crc32_combine(0x12345678, 0x9ABCDEF0, length)
    assert time.process_time() - start < 10
