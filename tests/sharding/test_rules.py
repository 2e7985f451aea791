"""The split rules against NumPy, over many sizes and grids."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptkit.dtypes import DTYPES
from ckptkit.errors import UsageError
from ckptkit.io.engine import read_tensor
from ckptkit.sharding.rules import (
    COLUMN,
    EXPERT_GATED_COLUMN,
    EXPERT_ROW,
    GATED_COLUMN,
    REPLICATED,
    ROW,
    VOCAB,
    Split,
    expert_home,
    pad_rows,
    padded_vocab_size,
)
from ckptkit.tensors import Tensor


def tensor_of(array: np.ndarray) -> Tensor:
    return Tensor.from_bytes(array.tobytes(), DTYPES["F32"], array.shape)


def array_of(tensor: Tensor) -> np.ndarray:
    return np.frombuffer(read_tensor(tensor).tobytes(), np.float32).reshape(tensor.shape)


def reference_shard(split: Split, array: np.ndarray, rank: int, size: int) -> np.ndarray:
    if split in (ROW, EXPERT_ROW):
        return np.split(array, size, axis=-1)[rank]
    if split in (GATED_COLUMN, EXPERT_GATED_COLUMN):
        return np.concatenate([np.split(half, size)[rank] for half in np.split(array, 2)])
    return array if split is REPLICATED else np.split(array, size)[rank]


@given(
    st.sampled_from([COLUMN, ROW, GATED_COLUMN, REPLICATED, VOCAB, EXPERT_ROW, EXPERT_GATED_COLUMN]),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 4),
    st.booleans(),
)
def test_cut_and_join_against_numpy(split: Split, size: int, rows: int, cols: int, vector: bool) -> None:
    shape = (2 * rows * size,) if vector else (2 * rows * size, cols * size)
    array = np.random.default_rng(0).random(shape, np.float32)
    shards = [split.cut(tensor_of(array), rank, size) for rank in range(size)]
    for rank, shard in enumerate(shards):
        assert np.array_equal(array_of(shard), reference_shard(split, array, rank, size))
    assert np.array_equal(array_of(split.join(shards)), array)


@given(st.sampled_from([COLUMN, ROW, GATED_COLUMN, VOCAB]))
def test_what_does_not_divide_is_refused(split: Split) -> None:
    with pytest.raises(UsageError, match="do not divide over 3"):
        split.cut(Tensor.full(DTYPES["F32"], (8, 8)), 0, 3)


@given(st.integers(1, 1000), st.sampled_from([1, 8, 128]), st.integers(1, 8))
def test_vocabulary_padding(vocab_size: int, divisible_by: int, tp: int) -> None:
    rows = padded_vocab_size(vocab_size, divisible_by, tp)
    assert rows >= vocab_size and rows - vocab_size < divisible_by * tp and rows % (divisible_by * tp) == 0
    array = np.ones((vocab_size, 2), np.float32)
    padded = array_of(pad_rows(tensor_of(array), rows))
    assert np.array_equal(padded, np.pad(array, ((0, rows - vocab_size), (0, 0))))


@given(st.integers(1, 8), st.integers(1, 16))
def test_experts_live_in_contiguous_blocks(ep: int, share: int) -> None:
    homes = [expert_home(expert, ep * share, ep) for expert in range(ep * share)]
    assert homes == [(rank, number) for rank in range(ep) for number in range(share)]
    assert EXPERT_ROW.expert and EXPERT_GATED_COLUMN.expert and not ROW.expert and not GATED_COLUMN.expert


def test_experts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UsageError, match="8 experts do not divide over --ep 3") as raised:
        expert_home(0, 8, 3)
    assert raised.value.hint == "--ep 1, 2, 4, 8 would"
