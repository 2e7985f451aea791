"""The arithmetic of quantised numbers, against readings that know nothing of it, and against torch's FP8."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ckptkit.dtypes import DTYPES
from ckptkit.io.codes import e2m1, e4m3, e8m0, from_fp8, from_int4, from_mxfp4
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
