"""Numbers in raw bytes, against torch: what is not finite, and how far two are apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckptkit.dtypes import DTYPES, TORCH_DTYPE_NAMES, DType
from ckptkit.inspection.values import Gap, Survey, common_type, gap, survey

EVERY_TYPE = [dtype for dtype in DTYPES.values() if dtype.name != "BOOL"]


def random_bytes(dtype: DType, elements: int = 40_000, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, elements * dtype.itemsize, dtype=np.uint8)


def in_torch(data: np.ndarray, dtype: DType) -> torch.Tensor:
    """The same elements in float64 (or complex128)."""
    tensor = torch.from_numpy(data.copy()).view(getattr(torch, TORCH_DTYPE_NAMES[dtype]))
    if dtype.name in ("U16", "U32", "U64"):
        return torch.from_numpy(tensor.numpy().astype(np.float64))
    return tensor.to(torch.complex128 if dtype.name == "C64" else torch.float64)


@pytest.mark.parametrize("dtype", EVERY_TYPE, ids=str)
def test_survey_against_torch(dtype: DType) -> None:
    data = random_bytes(dtype)
    values = in_torch(data, dtype)
    parts = torch.view_as_real(values) if values.is_complex() else values
    assert survey(data, dtype) == Survey(int(parts.isnan().sum()), int(parts.isinf().sum()), False)


@pytest.mark.parametrize("dtype", EVERY_TYPE, ids=str)
def test_gap_against_torch(dtype: DType) -> None:
    left = random_bytes(dtype)
    for share in (1.0, 0.01):
        other, chosen = random_bytes(dtype, seed=1), np.random.default_rng(2).random(40_000) < share
        right = np.where(np.repeat(chosen, dtype.itemsize), other, left)
        words_differ = (left.reshape(-1, dtype.itemsize) != right.reshape(-1, dtype.itemsize)).any(axis=1)
        apart = (in_torch(left, dtype) - in_torch(right, dtype)).abs()[torch.from_numpy(words_differ)]
        found = gap(left, right, dtype)
        assert (found.differing, found.first) == (int(words_differ.sum()), int(words_differ.argmax()))
        finite = apart[apart.isfinite()]
        limit = float(torch.finfo(torch.float32).max) if dtype.itemsize <= 2 else np.inf
        assert found.largest == pytest.approx(float(finite[finite <= limit].max()), rel=1e-6)


def test_bits_count_and_not_only_values() -> None:
    zero, minus_zero = np.zeros(4, np.float32).view(np.uint8), np.full(4, -0.0, np.float32).view(np.uint8)
    assert gap(zero, minus_zero, DTYPES["F32"]) == Gap(4, 0, 0.0)
    assert gap(zero, zero.copy(), DTYPES["F32"]) == Gap()
    assert survey(minus_zero, DTYPES["F32"]) == Survey(zero=True)


def test_zeros_are_seen_in_every_type() -> None:
    for dtype in EVERY_TYPE:
        data = np.zeros(dtype.itemsize * 5, np.uint8)
        assert survey(data, dtype).zero == (dtype.name != "F8_E8M0")  # whose smallest number is 2^-127
        data[-1] = 1
        assert not survey(data, dtype).zero


def test_no_elements() -> None:
    empty = np.empty(0, np.uint8)
    assert survey(empty, DTYPES["BF16"]) == Survey()
    assert gap(empty, empty, DTYPES["BF16"]) == Gap()


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 59))
def test_gaps_of_parts_are_the_gap_of_the_whole(steps: list[int], cut: int) -> None:
    left = np.arange(len(steps), dtype=np.float32)
    right, dtype = left + np.array(steps, np.float32), DTYPES["F32"]
    parts = Gap()
    for start in (0, cut):
        stop = cut if start == 0 else len(steps)
        parts = parts.then(gap(left[start:stop].view(np.uint8), right[start:stop].view(np.uint8), dtype), start)
    assert parts == gap(left.view(np.uint8), right.view(np.uint8), dtype)
    first = next((index for index, step in enumerate(steps) if step), None)
    assert parts == Gap(sum(map(bool, steps)), first, float(max(steps)))


def test_common_types() -> None:
    types = [DTYPES[name] for name in ("BF16", "F16", "F32", "F64", "I64")]
    assert common_type(types[0], types[0]) == types[0]
    assert common_type(types[0], types[1]) == DTYPES["F32"]
    assert common_type(types[2], types[3]) == DTYPES["F64"]
    assert common_type(types[0], types[4]) is None
