"""Tiles and their codings: every bit comes back, the shortest coding is taken, and no damage gets through."""

from __future__ import annotations

import lzma
import struct
import tracemalloc
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ckptkit.dtypes import DTYPES
from ckptkit.formats.delta.codec import CHANGES, DIFFERENCES, SAME, WHOLE, DamagedTileError, decode, encode
from ckptkit.formats.delta.tiles import TILE, Tiling
from ckptkit.io.reading import read_tensor
from ckptkit.tensors import Tensor

Bytes = NDArray[np.uint8]
SIZES = st.sampled_from([1, 2, 4, 8])
BF16_NANS = [0x7F81, 0xFFFF, 0x7FC0, 0xFF80, 0x8000, 0x0000, 0x7F7F]  # signalling, quiet, infinite, zeros, the largest


def as_bytes(values: Any, itemsize: int) -> Bytes:
    return np.asarray(values, f"<u{itemsize}").view(np.uint8)


def there_and_back(old: Bytes, new: Bytes, itemsize: int) -> int:
    coding, data, changed = encode(old, new, itemsize)
    assert changed == np.count_nonzero(old.view(f"<u{itemsize}") != new.view(f"<u{itemsize}"))
    assert len(data) < len(new) or not len(new)
    stored = new.tobytes() if coding == WHOLE else data
    assert decode(coding, stored, old, itemsize).tobytes() == new.tobytes()
    return coding


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Bytes, Bytes, int]:
    """Two tiles of any bits, of which any share of elements differs, by little or by much."""
    itemsize, count = draw(SIZES), draw(st.integers(1, 400))
    random = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    old = random.integers(0, 256, count * itemsize, np.uint8)
    bits, share = old.view(f"<u{itemsize}"), draw(st.sampled_from([0.0, 0.003, 0.1, 0.4, 0.8, 1.0]))
    if draw(st.booleans()):
        other = bits + random.integers(-3, 4, count).astype(bits.dtype)
    else:
        other = random.integers(0, 256, count * itemsize, np.uint8).view(bits.dtype)
    new = np.where(random.random(count) < share, other, bits)
    return old, new.view(np.uint8), itemsize


@given(pairs())
def test_every_bit_comes_back(pair: tuple[Bytes, Bytes, int]) -> None:
    there_and_back(*pair)


@given(st.lists(st.tuples(st.sampled_from(BF16_NANS), st.sampled_from(BF16_NANS)), min_size=1, max_size=50))
def test_nans_infinities_and_zeros_are_bits(values: list[tuple[int, int]]) -> None:
    old, new = zip(*values, strict=True)
    there_and_back(as_bytes(old, 2), as_bytes(new, 2), 2)


def test_which_coding_is_taken() -> None:
    random = np.random.default_rng(0)
    old = random.integers(0, 256, TILE, np.uint8)
    bits = old.view("<u2")
    few = np.where(random.random(len(bits)) < 0.03, bits + 1, bits).astype("<u2").view(np.uint8)
    all_near = (bits + random.integers(1, 5, len(bits)).astype("<u2")).view(np.uint8)
    other = random.integers(0, 256, TILE, np.uint8)
    assert there_and_back(old, old, 2) == SAME
    assert there_and_back(old, few, 2) == CHANGES
    assert there_and_back(old, all_near, 2) == DIFFERENCES
    assert there_and_back(old, other, 2) == WHOLE


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_where_both_are_tried_the_shorter_counts(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    from ckptkit.formats.delta import codec

    random = np.random.default_rng(1)
    old = random.integers(0, 256, 1 << 16, np.uint8)
    bits = old.view("<u2")
    new = np.where(random.permutation(len(bits)) < share * len(bits), bits + 1, bits).astype("<u2").view(np.uint8)
    taken = encode(old, new, 2)
    sizes = {}
    for coding, limits in ((CHANGES, (2.0, 1.0)), (DIFFERENCES, (0.0, -1.0))):
        monkeypatch.setattr(codec, "_FEW", limits[0])
        monkeypatch.setattr(codec, "_MANY", limits[1])
        sizes[coding] = len(encode(old, new, 2).data)
        assert encode(old, new, 2).coding == coding
    assert len(taken.data) == min(sizes.values())
    assert taken.coding == min(sizes, key=lambda coding: sizes[coding])


def test_far_from_each_other_only_the_shorter_would_be_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the two limits the coding that is not tried is the longer one, in changes as training makes them."""
    from ckptkit.formats.delta import codec

    random = np.random.default_rng(2)
    weights = (random.standard_normal(1 << 17) * 0.02).astype(np.float32)

    def bf16(values: NDArray[np.float32]) -> Bytes:
        return np.ascontiguousarray(values).view("<u4").__rshift__(16).astype("<u2").view(np.uint8)

    old = bf16(weights)
    for step in (1e-7, 1e-6, 5e-6, 3e-4, 1e-3):
        new = bf16(weights + random.standard_normal(len(weights)).astype(np.float32) * np.float32(step))
        taken = encode(old, new, 2)
        with monkeypatch.context() as patch:
            patch.setattr(codec, "_FEW", 0.0)
            patch.setattr(codec, "_MANY", 1.0)
            assert encode(old, new, 2) == taken, step


def test_other_ways_to_compress_are_larger() -> None:
    """XOR, other strategies, LZMA, and bytes that are not split into planes, on a step that moves most elements."""
    random = np.random.default_rng(3)
    weights = (random.standard_normal(1 << 17) * 0.02).astype(np.float32)
    moved = weights + random.standard_normal(len(weights)).astype(np.float32) * np.float32(1e-4)
    old, new = (((values.view("<u4") + 0x8000) >> 16).astype("<u2") for values in (weights, moved))
    taken = encode(old.view(np.uint8), new.view(np.uint8), 2)
    assert taken.coding == DIFFERENCES
    step = (new - old).view("<i2")
    folded = ((step << 1) ^ (step >> 15)).view("<u2")

    def planes(values: NDArray[Any]) -> bytes:
        return values.view(np.uint8).reshape(-1, 2).T.tobytes()

    def deflate(data: bytes, level: int, strategy: int) -> int:
        made = zlib.compressobj(level, zlib.DEFLATED, -15, 9, strategy)
        return len(made.compress(data)) + len(made.flush())

    others = {
        "xor": deflate(planes(old ^ new), 1, zlib.Z_RLE),
        "in order": deflate(folded.tobytes(), 1, zlib.Z_RLE),
        "level 1": deflate(planes(folded), 1, zlib.Z_DEFAULT_STRATEGY),
        "level 6": deflate(planes(folded), 6, zlib.Z_DEFAULT_STRATEGY),
        "huffman": deflate(planes(folded), 6, zlib.Z_HUFFMAN_ONLY),
        "lzma": len(lzma.compress(planes(folded), preset=0)),
    }
    assert deflate(planes(folded), 1, zlib.Z_RLE) == len(taken.data)
    assert min(others.values()) > len(taken.data), others


def deflated(data: bytes) -> bytes:
    made = zlib.compressobj(1, zlib.DEFLATED, -15)
    return made.compress(data) + made.flush()


def changes(count: int, size: int, planes: bytes) -> bytes:
    return struct.pack("<IB", count, size) + deflated(planes)


OLD = as_bytes(range(100), 2)
DAMAGED: dict[str, tuple[int, bytes, str]] = {
    "no such coding": (7, b"x", "coding does not exist"),
    "bytes of an unchanged tile": (SAME, b"x", "coding does not exist"),
    "a whole tile of another size": (WHOLE, b"x" * 199, "its size does not fit"),
    "no bytes": (DIFFERENCES, b"", "does not decompress to 200"),
    "no head": (CHANGES, b"\1\0\0", "too short"),
    "no changes": (CHANGES, changes(0, 1, b""), "0 changes of 100"),
    "too many changes": (CHANGES, changes(101, 1, bytes(303)), "101 changes of 100"),
    "distances of 3 bytes": (CHANGES, changes(1, 3, b"\0\0\0\1\0"), "distances of 3"),
    "beyond the end": (CHANGES, changes(1, 1, b"\x64\1\0"), "changes element 100 of 100"),
    "beyond the end in sum": (CHANGES, changes(2, 4, b"\0\0" + b"\xff\0" * 3 + b"\1\1\0\0"), "it changes element"),
    "far beyond the end": (CHANGES, changes(1, 4, b"\xff\xff\xff\xff\1\0"), "changes element 4294967295"),
    "nothing changed": (CHANGES, changes(1, 1, b"\0\0\0"), "changes nothing"),
    "too few planes": (CHANGES, changes(2, 1, b"\0\0\1"), "does not decompress to 6"),
    "too many planes": (CHANGES, changes(1, 1, b"\0\1\0\0"), "does not decompress to 3"),
    "not compressed": (DIFFERENCES, b"\xff" * 30, "cannot be decompressed"),
    "ends early": (DIFFERENCES, deflated(bytes(range(200)))[:-4], "does not decompress to 200"),
    "goes on": (DIFFERENCES, deflated(bytes(200)) + b"x", "does not decompress to 200"),
    "too long": (DIFFERENCES, deflated(bytes(201)), "does not decompress to 200"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_refused(case: str) -> None:
    coding, data, message = DAMAGED[case]
    with pytest.raises(DamagedTileError, match=message):
        decode(coding, data, OLD, 2)


def test_places_that_wrap_around_are_refused() -> None:
    """Distances whose sum would come back into the tile, if it were counted in as few bits."""
    count = 100
    planes = b"\xff" * (4 * count) + b"\1\0" * count
    with pytest.raises(DamagedTileError, match="it changes element"):
        decode(CHANGES, changes(count, 4, planes), OLD, 2)


@pytest.mark.parametrize("coding", [DIFFERENCES, CHANGES])
def test_a_bomb_is_not_unpacked(coding: int) -> None:
    bomb = deflated(bytes(50_000_000))
    data = bomb if coding == DIFFERENCES else struct.pack("<IB", 100, 4) + bomb
    tracemalloc.start()
    try:
        with pytest.raises(DamagedTileError, match="does not decompress"):
            decode(coding, data, OLD, 2)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@given(pairs(), st.data())
def test_any_flipped_byte_gives_an_error_or_other_values(pair: tuple[Bytes, Bytes, int], data: st.DataObject) -> None:
    """No damage makes another kind of error, or an output of another size."""
    old, new, itemsize = pair
    coding, stored, _ = encode(old, new, itemsize)
    if not stored:
        return
    damaged = bytearray(stored)
    damaged[data.draw(st.integers(0, len(stored) - 1))] ^= data.draw(st.integers(1, 255))
    with suppress(DamagedTileError):
        assert len(decode(coding, bytes(damaged), old, itemsize)) == len(old)


SHAPES = [(), (5,), (0,), (3, 0), (1 << 20,), (700, 3000), (2, 1 << 20), (3, 2, (1 << 19) + 3), (1, 1 << 19), (4, 5, 6)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "F64"])
def test_tiles_cover_a_tensor_once(shape: tuple[int, ...], dtype: str) -> None:
    tiling, tensor = Tiling.of(shape, DTYPES[dtype].itemsize), Tensor.from_file("x", 0, DTYPES[dtype], shape)
    end = 0
    for number in range(tiling.count):
        start, stop = tiling.span(number)
        assert start == end < stop <= start + TILE
        assert tiling.at(start) == tiling.at(stop - 1) == number
        assert tiling.cut(tensor, number).nbytes == stop - start
        end = stop
    assert end == tensor.nbytes == tiling.nbytes


@pytest.mark.parametrize("shape", [(7,), (6, 4), (2, 3, 5)])
def test_a_tile_is_a_run_of_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    from ckptkit.formats.delta import tiles

    data = np.random.default_rng(0).integers(0, 256, int(np.prod(shape)) * 2, np.uint8)
    (tmp_path / "x").write_bytes(data.tobytes())
    tensor = Tensor.from_file(str(tmp_path / "x"), 0, DTYPES["BF16"], shape)
    for size in (2, 6, 8, 24, 64):
        monkeypatch.setattr(tiles, "TILE", size)
        tiling = Tiling.of(shape, 2)
        for number in range(tiling.count):
            start, stop = tiling.span(number)
            assert stop - start <= size
            assert read_tensor(tiling.cut(tensor, number)).tobytes() == data[start:stop].tobytes()
