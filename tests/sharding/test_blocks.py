"""Query, key and value blocks against slices of arrays, by the rule that verl's loader and saver state."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ckptkit.dtypes import DTYPES
from ckptkit.errors import UsageError
from ckptkit.sharding.rules import Split
from ckptkit.tables.layouts import SizedLayout, qkv
from ckptkit.tables.model_config import LayerConfig, ModelConfig, Rope
from ckptkit.tensors import Tensor
from tests.test_tensors import materialise

DIM, WIDTH = 2, 3


def layout(heads: int, kv_heads: int) -> SizedLayout:
    layer = LayerConfig(heads, kv_heads, DIM, ffn_hidden_size=1, rope=Rope(10000.0))
    config = ModelConfig("llama", "LlamaForCausalLM", WIDTH, 7, (layer,), False, 1e-5, 16)
    return qkv.sized(config, layer, [heads * DIM, kv_heads * DIM, kv_heads * DIM])


def rule(heads: int, kv_heads: int, *, shared: bool = True) -> Split:
    return layout(heads, kv_heads).by_part(shared=shared)


def fused(heads: int, kv_heads: int) -> tuple[Tensor, list[NDArray[np.uint16]]]:
    """The tensor as the tables know it, and query, key and value as arrays."""
    arrays, at = [], 0
    for rows in (heads * DIM, kv_heads * DIM, kv_heads * DIM):
        arrays.append(np.arange(at, at + rows * WIDTH, dtype=np.uint16).reshape(rows, WIDTH))
        at += rows * WIDTH
    parts = [Tensor.from_bytes(array.tobytes(), DTYPES["U16"], array.shape) for array in arrays]
    return layout(heads, kv_heads).pack(parts), arrays


@st.composite
def grids(draw: st.DrawFn) -> tuple[int, int, int]:
    """Heads, key/value heads, and ranks that divide the first and divide or are a multiple of the second."""
    kv_heads, group = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    heads = kv_heads * group
    ranks = [size for size in range(1, heads + 1) if heads % size == 0 and not (kv_heads % size and size % kv_heads)]
    return heads, kv_heads, draw(st.sampled_from(ranks))


@given(grids())
def test_shards_are_those_of_the_loader(grid: tuple[int, int, int]) -> None:
    heads, kv_heads, size = grid
    tensor, (query, key, value) = fused(heads, kv_heads)
    wide, narrow = heads * DIM // size, max(kv_heads * DIM // size, DIM)
    for rank in range(size):
        start = rank * (kv_heads * DIM // size) if kv_heads >= size else rank * kv_heads // size * DIM
        expected = [query[rank * wide : (rank + 1) * wide], key[start : start + narrow], value[start : start + narrow]]
        assert (materialise(rule(heads, kv_heads).cut(tensor, rank, size)) == np.concatenate(expected)).all()


@given(grids())
def test_joining_is_the_inverse_and_copies_are_copies(grid: tuple[int, int, int]) -> None:
    heads, kv_heads, size = grid
    tensor, split = fused(heads, kv_heads)[0], rule(heads, kv_heads)
    shards = [split.cut(tensor, rank, size) for rank in range(size)]
    assert (materialise(split.join(shards)) == materialise(tensor)).all()
    copies = split.copies(shards)
    assert len(copies) == 2 * max(size - kv_heads, 0)
    assert all((materialise(one) == materialise(other)).all() for one, other in copies)


@given(grids())
def test_a_shard_of_another_height(grid: tuple[int, int, int]) -> None:
    heads, kv_heads, size = grid
    tensor, split = fused(heads, kv_heads)[0], rule(heads, kv_heads)
    shards = [split.cut(tensor, rank, size) for rank in range(size)]
    shards[-1] = shards[-1].rows(0, shards[-1].shape[0] - 1)
    with pytest.raises(ValueError, match="a shard is"):
        split.join(shards)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(12, 4, 5), (12, 4, 6), (6, 3, 2), (8, 8, 3), (2, 1, 4)])
def test_heads_that_do_not_divide(heads: int, kv_heads: int, size: int) -> None:
    match = f"{heads} attention heads and {kv_heads} key/value heads do not divide over {size}"
    with pytest.raises(UsageError, match=match):
        rule(heads, kv_heads).cut(fused(heads, kv_heads)[0], 0, size)


def test_heads_are_shared_only_where_a_writer_does() -> None:
    tensor = fused(4, 2)[0]
    assert rule(4, 2).cut(tensor, 3, 4).shape == (3 * DIM, WIDTH)
    with pytest.raises(UsageError, match="4 attention heads and 2 key/value heads do not divide over 4"):
        rule(4, 2, shared=False).cut(tensor, 3, 4)
