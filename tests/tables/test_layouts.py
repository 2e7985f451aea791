"""Layouts against NumPy and transformers: what tables put together packs, unpacks and splits as its words say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm, prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ckptkit.dtypes import DTYPES
from ckptkit.errors import UsageError
from ckptkit.sharding.rules import BY_PART, COLUMN, GATED_COLUMN, REPLICATED, ROW, VOCAB
from ckptkit.tables.dims import GROUPS, HEADS, KV, D, Dim, F, Q, V
from ckptkit.tables.items import Item, Kind
from ckptkit.tables.layouts import Fused, Layout, SizedLayout, by_head, copy, flat, gate_up, interleave, qkv, stack
from ckptkit.tables.model_config import LayerConfig, ModelConfig, Rope
from ckptkit.tables.rows import Row, Slot, layer, once
from ckptkit.tables.spelling import TE, VERL
from ckptkit.tensors import Tensor
from tests.test_tensors import materialise

WIDTH = 3
Array = NDArray[np.uint16]

LAYER = LayerConfig(num_heads=4, num_kv_heads=2, head_dim=2, ffn_hidden_size=6, rope=Rope(10000.0))
CONFIG = ModelConfig("llama", "LlamaForCausalLM", WIDTH, 7, (LAYER,), False, 1e-5, 16)


def resolve(row: Row) -> Item:
    """The tensor of the first layer."""
    (item,) = Kind(row, CONFIG.layers[0], CONFIG).items(0)
    return item


def size(value: int, name: str = "") -> Dim:
    return Dim(name or str(value), lambda config, layer: value)


def sized(layout: Layout, heights: Sequence[int]) -> SizedLayout:
    return layout.sized(CONFIG, LAYER, heights)


def tensor(array: Array) -> Tensor:
    return Tensor.from_bytes(array.tobytes(), DTYPES["U16"], array.shape)


def arrays(heights: Sequence[int], columns: tuple[int, ...] = (WIDTH,)) -> list[Array]:
    """Parts without two equal elements."""
    ends = np.cumsum([height * prod(columns) for height in heights])
    return [
        np.arange(end - height * prod(columns), end, dtype=np.uint16).reshape(height, *columns)
        for end, height in zip(ends, heights, strict=True)
    ]


def in_turns(parts: Sequence[Array], groups: int) -> Array:
    """The blocks of parts in turns, as NumPy says it."""
    columns = parts[0].shape[1:]
    return np.concatenate([part.reshape(groups, -1, *columns) for part in parts], axis=1).reshape(-1, *columns)


@dataclass
class Composed:
    """A layout, the rows of its Hugging Face tensors, and the same as arrays."""

    layout: Layout
    heights: list[int]
    parts: list[Array]
    stored: list[Array]
    fused: Array


@st.composite
def composed(draw: st.DrawFn) -> Composed:
    groups = draw(st.integers(1, 4))
    columns = draw(st.sampled_from([(), (1,), (WIDTH,), (1, 4)]))
    inside: list[Fused | None] = []
    shape: list[tuple[int, list[int]]] = []  # of each Hugging Face tensor: its groups, and the rows of its parts
    for _ in range(draw(st.integers(1, 4))):
        own, count = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        heights = [lcm(groups, own) * draw(st.integers(1, 3)) for _ in range(count)]
        inside.append(by_head(size(own), *map(size, heights)) if count > 1 else None)
        shape.append((own if count > 1 else 1, heights))
    while inside and inside[-1] is None and draw(st.booleans()):
        inside.pop()  # a tensor that is not named is a single part
    parts = arrays([height for _, heights in shape for height in heights], columns)
    rest = iter(parts)
    stored = [in_turns([next(rest) for _ in heights], own) for own, heights in shape]
    layout = interleave("composed", size(groups), *inside)
    return Composed(layout, [len(array) for array in stored], parts, stored, in_turns(parts, groups))


@given(composed())
def test_composed_layouts_pack_and_unpack(case: Composed) -> None:
    layout = sized(case.layout, case.heights)
    packed = layout.pack([tensor(array) for array in case.stored])
    assert np.array_equal(materialise(packed), case.fused)
    back = layout.unpack(tensor(case.fused))
    assert all(np.array_equal(materialise(one), array) for one, array in zip(back, case.stored, strict=True))


@given(composed(), st.integers(1, 4))
def test_ranks_get_their_share_of_every_part(case: Composed, ranks: int) -> None:
    rule = sized(case.layout, case.heights).by_part(shared=False)
    whole = tensor(case.fused)
    if any(len(part) % ranks for part in case.parts):
        with pytest.raises(UsageError, match=f"do not divide over {ranks} ranks"):
            rule.cut(whole, 0, ranks)
        return
    shards = [rule.cut(whole, rank, ranks) for rank in range(ranks)]
    for rank, shard in enumerate(shards):
        expected = [part.reshape(ranks, -1, *part.shape[1:])[rank] for part in case.parts]
        assert np.array_equal(materialise(shard), np.concatenate(expected))
    assert np.array_equal(materialise(rule.join(shards)), case.fused)


@given(composed())
def test_other_rows_are_an_error(case: Composed) -> None:
    layout = sized(case.layout, case.heights)
    if len(layout.heights) == 1:
        return
    with pytest.raises(ValueError, match="is not made of"):
        layout.unpack(tensor(case.fused[:-1]))
    short = [tensor(array[:-1]) for array in case.stored]
    if all(fused is None for fused in case.layout.inside):
        assert materialise(layout.pack([tensor(array) for array in case.stored])).shape == case.fused.shape
    else:
        with pytest.raises(ValueError, match="is not made of"):
            layout.pack(short)


@pytest.mark.parametrize(
    "wrong",
    [
        stack("parts not in turns"),
        interleave("parts of the first tensor not apart", GROUPS),
        interleave("parts of the first tensor not by head", GROUPS, flat(Q, Q)),
        interleave("another number of groups", HEADS, by_head(HEADS, Q, Q)),
    ],
    ids=lambda layout: layout.name,
)
def test_another_layout_gives_other_bytes(wrong: Layout) -> None:
    """A layout that is wrong in one word shows in the bytes: the comparisons above can fail."""
    gated = interleave("qkv with a gate", GROUPS, by_head(HEADS, Q, Q))
    heights = [16, 4, 4]
    given = [tensor(array) for array in arrays(heights)]
    right = materialise(sized(gated, heights).pack(given))
    assert not np.array_equal(materialise(sized(wrong, heights).pack(given)), right)


def test_attention_with_an_output_gate() -> None:
    """Per key/value head Megatron-Core has its queries, their gates, the key and the value."""
    gated = interleave("qkv with a gate", GROUPS, by_head(HEADS, Q, Q), heads=(HEADS, HEADS, GROUPS, GROUPS))
    stored = arrays([16, 4, 4])
    query, gate = np.split(stored[0].reshape(4, 4, WIDTH), 2, axis=1)  # as transformers chunks the rows of each head
    expected = [
        np.concatenate(
            [*query[2 * g : 2 * g + 2], *gate[2 * g : 2 * g + 2], *(s[2 * g : 2 * g + 2] for s in stored[1:])]
        )
        for g in range(2)
    ]
    packed = sized(gated, [16, 4, 4]).pack([tensor(array) for array in stored])
    assert np.array_equal(materialise(packed), np.concatenate(expected))


NK, NV, DK, DV = 2, 4, 3, 5
KEYS, VALUES = size(NK * DK), size(NV * DV)
DELTA_HEADS = (size(NK, "key heads"), size(NK, "key heads"), *(size(NV, "value heads"),) * 4)
GROUPED = stack(
    "in_proj",
    by_head(size(NK), KEYS, KEYS, VALUES, VALUES),
    by_head(size(NK), size(NV), size(NV)),
    heads=DELTA_HEADS,
    split=BY_PART,
)
"""Qwen3-Next's two tensors, group by group, in Megatron-Core's one."""
FLAT = stack("in_proj", flat(KEYS, KEYS, VALUES), heads=DELTA_HEADS, split=BY_PART)
"""Qwen3.5's four tensors: queries, keys and values in one, then z, b and a."""


def test_grouped_linear_attention_against_transformers() -> None:
    import torch
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    sizes: dict[str, Any] = {
        "linear_num_key_heads": NK,
        "linear_num_value_heads": NV,
        "linear_key_head_dim": DK,
        "linear_value_head_dim": DV,
    }
    module = Qwen3NextGatedDeltaNet(Qwen3NextConfig(hidden_size=WIDTH, num_hidden_layers=1, **sizes), layer_idx=0)
    heights = [module.in_proj_qkvz.out_features, module.in_proj_ba.out_features]
    stored = arrays(heights)
    # A column of the weights is what the projection gives for one token: transformers parts its elements.
    columns = [torch.from_numpy(array.astype(np.int64)).T.unsqueeze(0) for array in stored]
    parts = module.fix_query_key_value_ordering(*columns)
    expected = np.concatenate([part.reshape(WIDTH, -1).T.numpy() for part in parts])
    packed = sized(GROUPED, heights).pack([tensor(array) for array in stored])
    assert np.array_equal(materialise(packed), expected)


@pytest.mark.parametrize("layout", [GROUPED, FLAT])
def test_linear_attention_splits_by_heads(layout: Layout) -> None:
    count, ranks = (2, 2) if layout is GROUPED else (4, 2)
    heights = [2 * NK * DK + 2 * NV * DV, 2 * NV] if count == 2 else [2 * NK * DK + NV * DV, NV * DV, NV, NV]
    row = layer(
        "self_attention.in_proj.weight",
        layout("linear_attn.*", **{f"t{n}": (size(h), D) for n, h in enumerate(heights)}),
    )
    item = resolve(row)
    parts = arrays([NK * DK, NK * DK, NV * DV, NV * DV, NV, NV])
    split = item.split(TE)
    for rank in range(ranks):
        shard = split.cut(tensor(np.concatenate(parts)), rank, ranks)
        expected = [part.reshape(ranks, -1, WIDTH)[rank] for part in parts]
        assert np.array_equal(materialise(shard), np.concatenate(expected))
    with pytest.raises(UsageError, match="2 key heads and 4 value heads do not divide over 4 ranks"):
        split.cut(tensor(np.concatenate(parts)), 0, 4)


def test_experts_whose_gate_and_up_rows_alternate() -> None:
    alternating = stack("gate/up in turns", by_head(F, F, F), split=GATED_COLUMN)
    (stored,) = arrays([12])
    packed = sized(alternating, [12]).pack([tensor(stored)])
    assert np.array_equal(materialise(packed), np.concatenate([stored[0::2], stored[1::2]]))


def test_words_of_a_row() -> None:
    row = layer("self_attention.linear_qkv.weight", qkv("self_attn.*_proj.weight", q=(Q, D), k=(KV, D), v=(KV, D)))
    assert row.megatron == "decoder.layers.{i}.self_attention.linear_qkv.weight"
    assert row.hf == {
        "model.layers.{i}.self_attn.q_proj.weight": (Q, D),
        "model.layers.{i}.self_attn.k_proj.weight": (KV, D),
        "model.layers.{i}.self_attn.v_proj.weight": (KV, D),
    }
    assert (row.layout, row.split) == (qkv, COLUMN)
    assert layer("mlp.linear_fc1.bias", gate_up("mlp.*.bias", gate=(F,), up=(F,))).split is GATED_COLUMN
    assert layer("mlp.linear_fc2.bias", "mlp.down_proj.bias", (D,)).split is REPLICATED
    head = once("output_layer.weight", "lm_head.weight", (V, D), VOCAB)
    assert (head.megatron, head.hf, head.layout, head.split) == (
        "output_layer.weight",
        {"lm_head.weight": (V, D)},
        copy,
        VOCAB,
    )
    dead = layer("k_norm.weight", None, slots=(Slot("dead", (D,), hf="k_norm.weight"),))
    assert (dict(dead.hf), dead.slots[0].hf) == ({}, "model.layers.{i}.k_norm.weight")


def test_a_row_says_what_has_no_default() -> None:
    with pytest.raises(ValueError, match=r"linear_proj\.weight: say how it splits"):
        layer("linear_proj.weight", "o_proj.weight", (D, Q))
    with pytest.raises(ValueError, match=r"o_proj\.weight: say which shape"):
        layer("linear_proj.weight", "o_proj.weight", None, ROW)


def test_only_heads_change_the_rule_of_a_writer_in_blocks() -> None:
    """A writer that lays queries, keys and values one behind another cuts gate and up as Megatron-Core does."""
    fc1 = resolve(layer("mlp.linear_fc1.weight", gate_up("*", gate=(F, D), up=(F, D))))
    attention = resolve(layer("linear_qkv.weight", qkv("*", q=(Q, D), k=(KV, D), v=(KV, D))))
    assert fc1.split(VERL) is fc1.split(TE) is GATED_COLUMN
    assert attention.split(TE) is COLUMN and attention.split(VERL) is not COLUMN
