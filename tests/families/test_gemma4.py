"""Gemma 4: names and slots as Megatron-Bridge has them, both dialects of config.json, `args`, other writers."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptkit.checkpoints.recognition import refuse_foreign
from ckptkit.dtypes import DTYPES
from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.families import family_called, family_of
from ckptkit.io.reading import read_tensor
from ckptkit.megatron_args.reading import from_args, model_from_args
from ckptkit.megatron_args.writing import to_args
from ckptkit.sharding.grid import Parallelism
from ckptkit.sharding.stages import split_layers
from ckptkit.tables.divisibility import sharing_problem
from ckptkit.tables.items import Item
from ckptkit.tables.model_config import LayerConfig, ModelConfig, Rope
from ckptkit.tensors import Tensor
from tests.models import MODELS, model_classes, model_config, raw_config

KINDS = [kind for kind in MODELS if kind.startswith("gemma4")]
TEXT = [kind for kind in KINDS if kind.startswith("gemma4_text")]


def parsed(kind: str, **changes: Any) -> ModelConfig:
    raw = raw_config(kind, **changes)
    return family_of(raw, kind).parse(raw)


def items(config: ModelConfig) -> dict[str, Item]:
    return {item.key: item for item in family_called(config.family).items(config)}


DENSE_LAYER = {
    "input_layernorm.weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
    "self_attention.q_layernorm.weight",
    "self_attention.k_layernorm.weight",
    "post_self_attn_layernorm.weight",
    "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
    "post_mlp_layernorm.weight",
    "layer_scalar",
}
INPUTS = {"per_layer_input_gate.weight", "per_layer_projection.weight", "post_per_layer_input_norm.weight"}
INPUTS_OF_ALL = {"per_layer_embedding.weight", "per_layer_model_proj.weight", "per_layer_proj_norm.weight"}
ENDS = {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight"}
SPARSE_LAYER = {
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
    "self_attention.q_layernorm.weight",
    "self_attention.k_layernorm.weight",
    "self_attention.linear_proj.post_layernorm.weight",
    "pre_shared_expert_layernorm.weight",
    "mlp.shared_experts.linear_fc1.weight",
    "mlp.shared_experts.linear_fc2.weight",
    "mlp.post_shared_expert_layernorm.weight",
    "pre_mlp_layernorm.weight",
    "mlp.router.weight",
    "mlp.router.scale",
    "mlp.router.per_expert_scale",
    *(f"mlp.experts.linear_fc{number}.weight{expert}" for number in (1, 2) for expert in range(4)),
    "mlp.post_moe_layernorm.weight",
    "post_ffn_layernorm.weight",
    "layer_scalar",
}


def all_names(layers: int, names: set[str]) -> set[str]:
    return {f"decoder.layers.{number}.{name}" for number in range(layers) for name in names}


def test_names_are_those_of_megatron_bridge() -> None:
    """Source: the mapping registries of `Gemma4Bridge`, 0.6.2."""
    assert items(parsed("gemma4_text-moe")).keys() == ENDS | all_names(4, SPARSE_LAYER)
    assert items(parsed("gemma4_text-dense")).keys() == ENDS | {"output_layer.weight"} | all_names(4, DENSE_LAYER)
    shared = ENDS | INPUTS_OF_ALL | all_names(8, DENSE_LAYER | INPUTS)
    assert items(parsed("gemma4_text-e2b")).keys() == shared
    wrapper = family_called("gemma4").spelling("te")
    assert wrapper.written("per_layer_embedding.weight") == "language_model.per_layer_embedding.weight"


def test_norms_and_router_are_fed_by_the_right_tensors() -> None:
    found = {key: list(item.parts) for key, item in items(parsed("gemma4_text-moe")).items()}
    layer = "model.layers.2."
    for name, hf in {
        "pre_shared_expert_layernorm.weight": "pre_feedforward_layernorm.weight",
        "mlp.post_shared_expert_layernorm.weight": "post_feedforward_layernorm_1.weight",
        "pre_mlp_layernorm.weight": "pre_feedforward_layernorm_2.weight",
        "mlp.post_moe_layernorm.weight": "post_feedforward_layernorm_2.weight",
        "post_ffn_layernorm.weight": "post_feedforward_layernorm.weight",
        "self_attention.linear_proj.post_layernorm.weight": "post_attention_layernorm.weight",
        "mlp.router.weight": "router.proj.weight",
    }.items():
        assert found[f"decoder.layers.2.{name}"] == [layer + hf]
    dense = {key: list(item.parts) for key, item in items(parsed("gemma4_text-dense")).items()}
    assert dense["decoder.layers.2.pre_mlp_layernorm.weight"] == [layer + "pre_feedforward_layernorm.weight"]


def values(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, np.float32)


def tensor_of(array: np.ndarray) -> Tensor:
    return Tensor.from_bytes(array.tobytes(), DTYPES["F32"], array.shape)


def array_of(tensor: Tensor) -> np.ndarray:
    return np.frombuffer(read_tensor(tensor).tobytes(), np.float32).reshape(tensor.shape)


def grouped(layer: LayerConfig, *parts: np.ndarray) -> np.ndarray:
    """Query, key and value as megatron-core takes them apart: [groups, heads of each, width, ...]."""
    width = parts[0].shape[1:]
    return np.concatenate([p.reshape(layer.num_kv_heads, -1, layer.head_dim, *width) for p in parts], axis=1)


@pytest.mark.parametrize("bias", [False, True])
def test_slots_are_filled_as_megatron_bridge_fills_them(bias: bool) -> None:
    ending = "bias" if bias else "weight"
    keys = parsed("gemma4_text-dense", attention_bias=bias)
    item = items(keys)[f"decoder.layers.1.self_attention.linear_qkv.{ending}"]
    query, key = (values(shape, seed) for seed, shape in enumerate(item.parts.values()))
    packed = array_of(item.pack([tensor_of(query), tensor_of(key)]))
    assert np.array_equal(packed.reshape(-1), grouped(keys.layers[1], query, key, key).reshape(-1))

    shared = parsed("gemma4_text-e2b", attention_bias=bias)
    item = items(shared)[f"decoder.layers.5.self_attention.linear_qkv.{ending}"]
    layer = shared.layers[5]
    (query,) = (values(shape, 0) for shape in item.parts.values())
    zeros = np.zeros((layer.num_kv_heads * layer.head_dim, *query.shape[1:]), np.float32)
    packed = array_of(item.pack([tensor_of(query)]))
    assert np.array_equal(packed.reshape(-1), grouped(layer, query, zeros, zeros).reshape(-1))
    own = values(zeros.shape, 1)
    held = array_of(item.pack([tensor_of(query)], {item.slots[1].hf or "": tensor_of(own)}))
    assert np.array_equal(held.reshape(-1), grouped(layer, query, zeros, own).reshape(-1))

    norm = items(shared)["decoder.layers.5.self_attention.k_layernorm.weight"]
    for name in ("F32", "BF16", "F16"):
        ones = norm.pack([], dtype=DTYPES[name])
        assert ones.dtype == DTYPES[name]
        assert set(array_of(ones.astype(DTYPES["F32"])).tolist()) == {1.0}


def test_parameters_do_not_count_slots() -> None:
    import torch

    for kind in TEXT:
        with torch.device("meta"):
            model = model_classes(kind)[1](model_config(kind))
        scalars = len(model.model.layers)
        theirs = sum(parameter.numel() for parameter in model.parameters()) + scalars
        assert sum(item.parameters for item in items(parsed(kind)).values()) == theirs


def hub_dialect(kind: str) -> dict[str, Any]:
    """The config.json of a kind as transformers up to 5.14 writes it."""
    raw = raw_config(kind)
    text = raw.get("text_config", raw)
    sizes = next(iter(text.pop("per_layer_config").values()))
    text["global_head_dim"] = sizes["head_dim"]
    text["num_global_key_value_heads"] = sizes.get("num_key_value_heads")
    return raw


@pytest.mark.parametrize("kind", KINDS)
def test_both_dialects_say_the_same(kind: str) -> None:
    old = hub_dialect(kind)
    family = family_of(old, kind)
    assert family.parse(old) == parsed(kind)
    assert family.unparse(parsed(kind), old) == old
    wide = replace(parsed(kind), layers=tuple(replace(layer, head_dim=24) for layer in parsed(kind).layers))
    both = family.unparse(wide, old)
    text = both.get("text_config", both)
    assert text["global_head_dim"] == 24 and family.parse(both) == wide
    alone = {key: value for key, value in text.items() if key != "per_layer_config"}
    again = {**both, "text_config": alone} if "text_config" in both else alone
    assert family.parse(again) == wide


@pytest.mark.parametrize("kind", TEXT)
def test_transformers_reads_what_is_written_without_a_base(kind: str) -> None:
    from transformers import Gemma4TextConfig

    config = parsed(kind)
    raw = family_called("gemma4_text").unparse(config, {})
    theirs = Gemma4TextConfig.from_dict(json.loads(json.dumps(raw)))
    for number, layer in enumerate(config.layers):
        own = theirs.per_layer_config[number]
        assert (own.head_dim, own.num_key_value_heads) == (layer.head_dim, layer.num_kv_heads)
        assert (theirs.kv_sharing_modes[number] == "reuse") == (layer.kv_donor is not None)
        assert (theirs.layer_types or [])[number] == ("full_attention" if layer.window is None else "sliding_attention")
    assert family_called("gemma4_text").parse({**theirs.to_dict(), "dtype": config.dtype}) == config


def test_released_layers() -> None:
    """Donors, widths and heads as published for E2B."""
    from tests.families.test_families import RELEASED

    config = family_called("gemma4_text").parse(RELEASED["gemma-4-E2B"]["config"])
    assert {layer.kv_donor for layer in config.layers} == {None, 13, 14}
    assert [layer.ffn_hidden_size for layer in config.layers] == [6144] * 15 + [12288] * 20
    assert {(layer.head_dim, layer.num_kv_heads, layer.window) for layer in config.layers} == {
        (256, 1, 512),
        (512, 1, None),
    }
    assert config.layers[4].rope == Rope(1e6, "proportional", partial=0.25)
    moe = family_called("gemma4_text").parse(RELEASED["gemma-4-26B-A4B"]["config"])
    assert [(layer.head_dim, layer.num_kv_heads, layer.k_eq_v) for layer in moe.layers[4:6]] == [
        (256, 8, False),
        (512, 2, True),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_args_alone_describe_the_model(kind: str) -> None:
    config = replace(parsed(kind), dtype="float32")
    family = family_called(config.family)
    args = json.loads(json.dumps(to_args(family, config, Parallelism(), 256, 128)))
    assert model_from_args(family, args, config.vocab_size) == config
    assert from_args(family, args, config) == config
    moved = from_args(family, {**args, "global_kv_channels": 24}, config)
    assert {layer.head_dim for layer in moved.layers} == {8, 24}
    assert from_args(family, {**args, "final_logit_softcapping": 5.0}, config) == replace(config, logit_softcap=5.0)
    del args["num_kv_shared_layers"], args["global_kv_channels"]
    with pytest.raises(InputError, match=r"lack num_kv_shared_layers, global_kv_channels, .*needs.*--hf-reference"):
        model_from_args(family, args, config.vocab_size)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"use_bidirectional_attention": "all"}, UnsupportedError, "use_bidirectional_attention 'all'"),
        ({"num_kv_shared_layers": 8}, InputError, "num_kv_shared_layers must be below the 8 layers"),
        ({"num_kv_shared_layers": 7}, InputError, "shared layers are full_attention, but no layer before"),
        ({"num_kv_shared_layers": None}, InputError, "num_kv_shared_layers must be"),
        ({"hidden_size_per_layer_input": None}, InputError, "hidden_size_per_layer_input must be a number"),
        ({"enable_moe_block": True}, InputError, "num_experts must be a positive integer"),
        (
            {"enable_moe_block": True, "num_experts": 2, "top_k_experts": 4, "moe_intermediate_size": 8},
            InputError,
            "top_k_experts 4 of num_experts 2",
        ),
        ({"per_layer_config": {"8": {}}}, InputError, "per_layer_config names layer '8' of 8"),
        ({"per_layer_config": {"full": {}}}, InputError, "per_layer_config names layer 'full'"),
        ({"per_layer_config": {"1": 3}}, InputError, "1 must be an object"),
        ({"per_layer_config": {"1": {"skip": ["mlp"]}}}, UnsupportedError, "overrides skip of layer 1"),
        ({"per_layer_config": {"1": {"head_dim": 32}}}, UnsupportedError, "layer 3 has other heads than"),
        ({"per_layer_config": {"1": {"head_dim": 0}}}, InputError, "head_dim must be a positive integer"),
        (
            {"per_layer_config": {str(n): {"num_key_value_heads": 5} for n in (1, 3, 5, 7)}},
            InputError,
            "12 attention heads are not a multiple of the 5 key/value heads of full_attention layers",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "proportional", "partial_rotary_factor": "x"}}},
            InputError,
            "partial_rotary_factor must be a number",
        ),
    ],
)
def test_bad_configs_are_named(change: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        family_called("gemma4_text").parse({**raw_config("gemma4_text-e2b"), **change})


def test_models_that_config_json_cannot_describe_are_refused() -> None:
    family, config = family_called("gemma4_text"), parsed("gemma4_text-dense")
    with pytest.raises(UnsupportedError, match="last layer has a window"):
        family.unparse(replace(config, layers=config.layers[::-1]), {})
    first = replace(config.layers[1], kv_donor=0)
    with pytest.raises(UnsupportedError, match="cannot describe these layers"):
        family.unparse(replace(config, layers=(config.layers[0], first, *config.layers[2:])), {})


def test_the_last_layer_sees_everything() -> None:
    raw = {**hub_dialect("gemma4_text-dense"), "layer_types": ["sliding_attention"] * 4}
    assert [layer.window for layer in family_called("gemma4_text").parse(raw).layers] == [16, 16, 16, None]


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("decoder.layers.0.pffl_weight", "before July 2026"),
        ("language_model.decoder.layers.3.mlp.shared_experts.linear_fc2.post_layernorm.weight", "before July 2026"),
        ("language_model.decoder.layers.0.mlp._inner_mlp.moe.router.weight", "_inner_mlp"),
        ("decoder.layers.0.experts.gate_up_proj", "as slime had them at first"),
    ],
)
def test_layouts_that_no_table_reads_are_named(name: str, match: str) -> None:
    with pytest.raises(UnsupportedError, match=match) as raised:
        refuse_foreign(["decoder.layers.0.layer_scalar", name], "here")
    assert name in str(raised.value)
    refuse_foreign(items(parsed("gemma4_text-moe")), "here")


def test_slime_names() -> None:
    """Source: `slime_plugins/mbridge/gemma4.py`, where pre_mlp_layernorm is the norm before the dense MLP."""
    slime = family_called("gemma4_text").spelling("slime")
    written = {name: slime.written(f"decoder.layers.1.{name}") for name in SPARSE_LAYER}
    assert written["pre_shared_expert_layernorm.weight"] == "decoder.layers.1.pre_mlp_layernorm.weight"
    assert written["pre_mlp_layernorm.weight"] == "decoder.layers.1.mlp.pre_feedforward_layernorm_2.weight"
    assert written["mlp.router.weight"] == "decoder.layers.1.mlp.router.proj.weight"
    assert written["mlp.shared_experts.linear_fc1.weight"] == "decoder.layers.1.dense_mlp.linear_fc1.weight"
    assert len(set(written.values())) == len(written)


def test_slime_names_of_dense_models() -> None:
    """Source: the layer spec in `slime_plugins/models/gemma4.py`, where a norm of its own stands before the MLP."""
    slime = family_called("gemma4_text").spelling("slime_dense")
    layer = {
        name.split(".", 3)[3] for name in items(parsed("gemma4_text-dense")) if name.startswith("decoder.layers.0.")
    }
    assert {slime.written(f"decoder.layers.0.{name}").split(".", 3)[3] for name in layer} == {
        "self_attention.linear_qkv.layer_norm_weight",
        "self_attention.linear_qkv.weight",
        "self_attention.q_layernorm.weight",
        "self_attention.k_layernorm.weight",
        "self_attention.linear_proj.weight",
        "post_attention_layernorm.weight",
        "pre_mlp_layernorm.weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
        "post_feedforward_layernorm.weight",
        "layer_scalar",
    }


def together(config: ModelConfig, grid: Parallelism) -> bool:
    homes = {n: index for index, stage in enumerate(split_layers(config.num_layers, grid)) for n in stage.layers}
    return all(layer.kv_donor is None or homes[n] == homes[layer.kv_donor] for n, layer in enumerate(config.layers))


@given(
    layers=st.integers(3, 40),
    shared=st.integers(0, 30),
    pp=st.integers(1, 8),
    vpp=st.integers(1, 3),
    uneven=st.none() | st.tuples(st.integers(1, 9), st.none() | st.integers(1, 9)),
)
def test_sharing_over_stages(
    layers: int, shared: int, pp: int, vpp: int, uneven: tuple[int, int | None] | None
) -> None:
    """A problem is found exactly where there is one, and the split that is proposed has none."""
    types = ["sliding_attention" if number % 2 else "full_attention" for number in range(layers - 1)]
    raw = {
        "num_hidden_layers": layers,
        "layer_types": [*types, "full_attention"],
        "num_kv_shared_layers": min(shared, layers - 2),
    }
    config = family_called("gemma4_text").parse(raw)
    try:
        first, last = uneven or (None, None)
        grid = Parallelism(1, pp, 1 if uneven else vpp, first_stage_layers=first, last_stage_layers=last)
        problem = sharing_problem(config, grid)
    except UsageError:
        return
    assert (problem is None) == together(config, grid)
    if problem is None:
        return
    assert ("--vpp" in problem, "--decoder-first-pipeline-num-layers" in problem) == (grid.vpp > 1, uneven is not None)
    words = problem.rpartition("; ")[2].split()
    said = dict(pairwise(words))
    last = said.get("--decoder-last-pipeline-num-layers")
    pp = int(said.get("--pp", pp))
    assert together(config, Parallelism(1, pp, last_stage_layers=int(last) if last else None))
