"""Query, key and value blocks against slices of arrays, by the rule that verl's loader and saver state."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ckptkit.dtypes import DTYPES
from ckptkit.errors import UsageError
from ckptkit.sharding.blocks import query_key_value_blocks
from ckptkit.sharding.rules import Split
from ckptkit.tables.model_config import LayerConfig, Rope
from ckptkit.tables.rows import qkv
from ckptkit.tensors import Tensor
from tests.test_tensors import materialise

DIM, WIDTH = 2, 3


def sizes(heads: int, kv_heads: int) -> LayerConfig:
    return LayerConfig(heads, kv_heads, DIM, ffn_hidden_size=1, rope=Rope(10000.0))


def rule(heads: int, kv_heads: int) -> Split:
    layer = sizes(heads, kv_heads)
    return query_key_value_blocks(
        heads, kv_heads, DIM, lambda parts: qkv.pack(parts, layer), lambda fused: qkv.unpack(fused, layer)
    )


def fused(heads: int, kv_heads: int) -> tuple[Tensor, list[NDArray[np.uint16]]]:
    """The tensor as the tables know it, and query, key and value as arrays."""
    layer = sizes(heads, kv_heads)
    arrays, at = [], 0
    for rows in (heads * DIM, kv_heads * DIM, kv_heads * DIM):
        arrays.append(np.arange(at, at + rows * WIDTH, dtype=np.uint16).reshape(rows, WIDTH))
        at += rows * WIDTH
    parts = [Tensor.from_bytes(array.tobytes(), DTYPES["U16"], array.shape) for array in arrays]
    return qkv.pack(parts, layer), arrays


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


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(12, 4, 5), (12, 4, 6), (6, 3, 2), (8, 8, 3)])
def test_heads_that_do_not_divide(heads: int, kv_heads: int, size: int) -> None:
    with pytest.raises(UsageError, match=f"{heads} attention and {kv_heads} key/value heads do not divide over {size}"):
        rule(heads, kv_heads).cut(fused(heads, kv_heads)[0], 0, size)
