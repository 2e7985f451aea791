"""The arithmetic of quantised numbers, against readings that know nothing of it, and against torch's FP8."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import ckptkit.io.codes
from ckptkit.dtypes import DTYPES, DType
from ckptkit.io.casts import decode, encode
from ckptkit.io.codes import (
    e2m1,
    e4m3,
    e8m0,
    fp8_scales,
    from_fp8,
    from_int4,
    from_mxfp4,
    int4_scales,
    largest_of_blocks,
    largest_of_groups,
    mxfp4_scales,
    to_fp8,
    to_int4,
    to_mxfp4,
)
from tests.quantised import e2m1 as plain_e2m1
from tests.quantised import e4m3 as plain_e4m3
from tests.quantised import read_fp8, read_int4, read_mxfp4, rounded

TYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_all_codes() -> None:
    np.testing.assert_array_equal(e4m3(), np.array([plain_e4m3(code) for code in range(256)], np.float32))
    np.testing.assert_array_equal(e2m1(), np.array([plain_e2m1(code) for code in range(16)], np.float32))
    of_torch = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(e4m3(), of_torch.view(torch.float8_e4m3fn).float().numpy())
    np.testing.assert_array_equal(e8m0(), of_torch.view(torch.float8_e8m0fnu).float().numpy())
    assert np.array_equal(np.signbit(e4m3()), np.arange(256) > 127) and np.array_equal(
        np.signbit(e2m1()), np.arange(16) > 7
    )


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((576, 256), (128, 128)),
        ((192, 320), (128, 128)),
        ((5, 7), (128, 128)),
        ((64, 96), (1, 96)),
        ((64, 96), (64, 96)),
        ((40, 300), (1, 128)),
        ((40, 300), (3, 7)),
        ((4, 640), (1, 640)),
        ((9, 5), (1, 1)),
        ((600, 600), (512, 2)),  # a table of more than 65,536 numbers
    ],
)
def test_fp8(shape: tuple[int, int], block: tuple[int, int], dtype: str) -> None:
    rng = np.random.default_rng(sum(shape))
    codes = rng.integers(0, 256, shape, np.uint8)
    codes.reshape(-1)[: min(256, codes.size)] = np.arange(256)[: codes.size]
    grid = [-(-size // edge) for size, edge in zip(shape, block, strict=True)]
    scales = rng.lognormal(-5, 3, grid).astype(np.float32)
    scales.reshape(-1)[-1] = 0.0
    expected = rounded(read_fp8(codes, scales, block), TYPES[dtype])
    got = torch.frombuffer(bytearray(from_fp8(codes, scales, block, DTYPES[dtype])), dtype=expected.dtype)
    assert torch.equal(torch.isnan(got), torch.isnan(expected).reshape(-1))
    assert bits(torch.nan_to_num(got)) == bits(torch.nan_to_num(expected))
    for top, bottom in ((0, 3), (shape[0] // 2, shape[0]), (shape[0] // 3, shape[0] // 2)):
        some = from_fp8(
            codes[top:bottom], scales[top // block[0] : -(-bottom // block[0])], block, DTYPES[dtype], top % block[0]
        )
        width = shape[1] * DTYPES[dtype].itemsize
        assert bytes(some) == bits(got)[top * width : bottom * width]


@pytest.mark.parametrize("dtype", TYPES)
def test_mxfp4(dtype: str) -> None:
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (9, 5, 16), np.uint8)
    blocks.reshape(-1)[:256] = np.arange(256)
    scales = rng.integers(0, 252, (9, 5), np.uint8)
    expected = rounded(read_mxfp4(blocks, scales), TYPES[dtype])
    assert bytes(from_mxfp4(blocks.reshape(9, -1), scales, DTYPES[dtype])) == bits(expected)


def test_a_scale_of_mxfp4_that_is_no_number() -> None:
    found = from_mxfp4(np.zeros((1, 16), np.uint8), np.full((1, 1), 255, np.uint8), DTYPES["F32"])
    assert np.isnan(found.view(np.float32)).all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("group", [8, 32, 96])
def test_int4(group: int, dtype: str) -> None:
    rng = np.random.default_rng(2)
    packed = rng.integers(-(1 << 31), 1 << 31, (33, 12), np.int32)
    packed[0, :2] = np.array([0x76543210, 0xFEDCBA98], np.uint32).view(np.int32)
    scales = rng.uniform(-1, 1, (33, 96 // group)).astype(np.float32)
    expected = rounded(read_int4(packed, scales, group), TYPES[dtype])
    assert bytes(from_int4(packed.view(np.uint8), scales, group, DTYPES[dtype])) == bits(expected)


def weights(shape: tuple[int, int], seed: int = 3) -> np.ndarray:
    """bf16 numbers as float32, of very different sizes, with zeros of both signs and ties among them."""
    rng = np.random.default_rng(seed)
    found = rng.standard_normal(shape) * 2.0 ** rng.integers(-12, 4, shape)
    found[rng.random(shape) < 0.05] = 0.0
    found[rng.random(shape) < 0.05] = -0.0
    return torch.from_numpy(found).bfloat16().float().numpy()


@pytest.mark.parametrize(
    ("shape", "block"), [((576, 256), (128, 128)), ((5, 7), (128, 128)), ((64, 96), (1, 96)), ((40, 300), (3, 7))]
)
@pytest.mark.parametrize("powers", [False, True])
def test_new_fp8(shape: tuple[int, int], block: tuple[int, int], powers: bool) -> None:
    values = weights(shape)
    values[: block[0], : block[1]] = 0.0
    scales = fp8_scales(largest_of_blocks(values, block), powers=powers)
    spread = np.repeat(np.repeat(scales, block[0], axis=0), block[1], axis=1)[: shape[0], : shape[1]]
    for down in range(scales.shape[0]):
        for across in range(scales.shape[1]):
            rows, columns = (slice(at * size, (at + 1) * size) for at, size in zip((down, across), block, strict=True))
            exact = np.abs(values[rows, columns]).max() / np.float32(448) or np.float32(1)
            assert scales[down, across] == (2.0 ** np.ceil(np.log2(exact)) if powers else exact)
    theirs = torch.from_numpy(values / spread).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    np.testing.assert_array_equal(to_fp8(values.copy(), scales, block).reshape(shape), theirs.numpy())
    top = shape[0] // 2
    some = to_fp8(values[top:].copy(), scales[top // block[0] :], block, top % block[0])
    np.testing.assert_array_equal(some.reshape(-1, shape[1]), theirs.numpy()[top:])


def nearest(value: float) -> int:
    """The code of E2M1 next to a number, of two as near the even one."""
    table = [abs(plain_e2m1(code)) for code in range(8)]
    code = min(range(8), key=lambda code: (abs(table[code] - abs(value)), code % 2))
    return code + 8 * bool(np.signbit(value))


def at_borders(numbers: NDArray[np.float32]) -> NDArray[np.float32]:
    """Numbers, the borders between neighbours, and the float32 next to each on both sides, with both signs."""
    borders = np.concatenate([numbers, (numbers[1:] + numbers[:-1]) / np.float32(2), numbers[-1:] * np.float32(1.5)])
    around = [borders, np.nextafter(borders, np.float32(np.inf)), np.nextafter(borders, np.float32(-np.inf))]
    found = np.concatenate(around).astype(np.float32)
    return np.concatenate([found, -found])


def test_numbers_next_to_a_border() -> None:
    """Codes are looked up by a part of the bits of a number: the others still say on which side of a border it is."""
    values = at_borders(e4m3()[:127])
    theirs = torch.from_numpy(values).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    scale = np.ones((1, 1), np.float32)
    np.testing.assert_array_equal(to_fp8(values[None].copy(), scale, (1, len(values))), theirs.numpy())
    values = at_borders(e2m1()[:8])
    values = np.concatenate([values, np.zeros(-len(values) % 32, np.float32)])
    packed = to_mxfp4(values[None].copy(), np.full((1, len(values) // 32), 127, np.uint8))
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1)
    assert codes.tolist() == [nearest(float(value)) for value in values]


def test_new_mxfp4() -> None:
    values = weights((24, 96))
    values[0, :32] = 0.0
    values[1, :8] = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.9]
    values[1, 8:32] = 7.0
    scales = mxfp4_scales(largest_of_groups(values, 32))
    largest = np.abs(values).reshape(24, 3, 32).max(axis=2)
    assert scales[0, 0] == 0 and scales[1, 0] == 127
    nonzero = largest > 0
    np.testing.assert_array_equal(scales[nonzero], np.floor(np.log2(largest[nonzero])) - 2 + 127)
    packed = to_mxfp4(values.copy(), scales).reshape(24, 48)
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(24, 96)
    for row, column in np.ndindex(24, 96):
        assert codes[row, column] == nearest(float(values[row, column]) / 2.0 ** (int(scales[row, column // 32]) - 127))


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_new_int4(dtype: str) -> None:
    values = weights((24, 96))
    values[0, :32] = 0.0
    scales = int4_scales(largest_of_groups(values, 32), DTYPES[dtype])
    largest = torch.from_numpy(np.abs(values).reshape(24, 3, 32).max(axis=2)).to(getattr(torch, TYPES[dtype]))
    expected = (largest / 7.5).float().numpy()
    expected[expected == 0] = torch.finfo(largest.dtype).eps
    np.testing.assert_array_equal(scales, expected)
    found = read_int4(to_int4(values, scales, 32).view(np.int32).reshape(24, 12), scales, 32)
    assert (np.abs(found - values) <= 0.53 * np.repeat(scales, 32, axis=1)).all()


def single(data: NDArray[np.uint8], dtype: DType) -> NDArray[np.float32]:
    return decode(data, dtype).astype(np.float32)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_old_scales_find_all_codes_again(dtype: str) -> None:
    rng, kind = np.random.default_rng(4), DTYPES[dtype]
    codes = rng.integers(0, 256, (256, 256), np.uint8)
    codes[codes & 127 == 127] = 0
    for exponent in (-100.0, -13.0, 0.0, 60.0):
        scales = (rng.uniform(1, 2, (2, 2)) * 2.0**exponent).astype(np.float32)
        numbers = single(from_fp8(codes, scales, (128, 128), kind), kind).reshape(256, 256)
        np.testing.assert_array_equal(to_fp8(numbers.copy(), scales, (128, 128)), codes.reshape(-1))
        small = single(encode(rng.uniform(-2, 2, (256, 8)).astype(np.float32) * 2.0**exponent, kind), kind)
        numbers = single(from_int4(codes, small.reshape(256, 8), 64, kind), kind).reshape(256, 512)
        np.testing.assert_array_equal(to_int4(numbers, small.reshape(256, 8), 64), codes.reshape(-1))
        powers = np.full((256, 16), 127 + int(exponent), np.uint8)
        numbers = single(from_mxfp4(codes, powers, kind), kind).reshape(256, 512)
        np.testing.assert_array_equal(to_mxfp4(numbers, powers), codes.reshape(-1))


@pytest.mark.parametrize("kinds", [3, 200, 700])
def test_looked_up_or_each_for_itself(monkeypatch: pytest.MonkeyPatch, kinds: int) -> None:
    """Where few scales differ, the pairs of numbers of a byte are looked up; the bytes are the same."""
    rng = np.random.default_rng(kinds)
    known = decode(encode(np.exp(rng.standard_normal(kinds)).astype(np.float32), DTYPES["BF16"]), DTYPES["BF16"])
    known[:3] = [0.0, -np.inf, -(2.0**-130)]
    scales = rng.choice(known, (40, 96)).astype(np.float32)
    scales[0, 0] = np.nan
    codes = rng.integers(0, 256, (40, 96 * 16), np.uint8)
    bytes_of_e8m0 = rng.integers(0, 256, (40, 96), np.uint8)
    found = [from_int4(codes, scales, 32, DTYPES["BF16"]), from_mxfp4(codes, bytes_of_e8m0, DTYPES["BF16"])]
    assert ckptkit.io.codes._few_kinds(scales) is not None
    monkeypatch.setattr(ckptkit.io.codes, "_KINDS", 0)
    assert ckptkit.io.codes._few_kinds(scales) is None
    again = [from_int4(codes, scales, 32, DTYPES["BF16"]), from_mxfp4(codes, bytes_of_e8m0, DTYPES["BF16"])]
    assert all(map(np.array_equal, found, again))


def test_the_largest_of_groups_of_more_than_a_chunk() -> None:
    values = np.random.default_rng(0).standard_normal((70, 3 * 1024), np.float32)
    values[3, 5], values[4, 40], values[69, -1] = np.nan, -np.inf, -9.0
    for group in (8, 32, 1024, 3072):
        expected = np.abs(values).reshape(70, -1, group).max(axis=2)
        np.testing.assert_array_equal(largest_of_groups(values, group), expected)
