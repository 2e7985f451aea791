"""Whatever `args` do not carry is listed, so that `--strict-config` refuses what stock GPTModel cannot be told of."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from ckptkit.families.llama import LLAMA
from ckptkit.megatron_args.inexpressible import inexpressible
from ckptkit.megatron_args.reading import from_args
from ckptkit.megatron_args.writing import to_args
from ckptkit.sharding.grid import Parallelism
from ckptkit.tables.model_config import Adapter, LayerConfig, ModelConfig, Rope
from tests.models import MODELS, raw_config

BASE = LLAMA.parse(
    {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "torch_dtype": "float32",
    }
)
MOE = {"num_experts": 4, "experts_per_token": 2, "moe_ffn_hidden_size": 16}
OWN = {
    "family",
    "architecture",
    "vocab_size",
    "layers",
    "per_layer_vocab_size",
    "value_bias",
    "router_in_fp32",
    "latent",
    "sinks",
    "activation_clamp",
    "up_offset",
    "output_gate",
    "shared_expert_gate",
}
"""What names the model, is not of the arguments that describe it, is the precision of a step, says nothing without
another field, or is a contradiction to a model that lacks it (latent attention, sinks, a clamp, an offset, a gate)."""
OF_LAYERS = {"delta"}
"""The same of layers: arguments with a DeltaNet contradict a model without."""
OF_EXPERTS = ("norm_topk_prob", "parallel_dense", "router_score", "expert_bias", "routed_scaling", "router_groups")
OF_EXPERTS += ("router_groups_chosen", "shared_expert_size", "router_bias")

MODEL: dict[str, Any] = {
    "hidden_size": 64,
    "tied": True,
    "norm_eps": 1e-3,
    "max_position_embeddings": 128,
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "router_bias": True,
    "qk_norm": True,
    "activation": "gelu",
    "gated": False,
    "init_std": 0.5,
    "dtype": "bfloat16",
    "num_experts": 4,
    "experts_per_token": 3,
    "moe_ffn_hidden_size": 24,
    "norm_topk_prob": False,
    "router_score": "sigmoid",
    "expert_bias": True,
    "routed_scaling": 2.5,
    "router_groups": 2,
    "router_groups_chosen": 2,
    "shared_expert_size": 32,
    "mtp_layers": 2,
    "zero_centered_norms": True,
    "post_norms": True,
    "scaled_embedding": True,
    "softmax_scale": 0.3,
    "attention_softcap": 50.0,
    "logit_softcap": 30.0,
    "value_norm": True,
    "parallel_dense": True,
    "router_scales": True,
    "layer_scalars": True,
    "per_layer_input_size": 8,
    "adapter": Adapter("linear", 2, 16),
    "value_head": True,
}
LAYER: dict[str, Any] = {
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 16,
    "ffn_hidden_size": 96,
    "rope": Rope(5000.0),
    "window": 8,
    "moe": True,
    "k_eq_v": True,
    "kv_donor": 0,
    "hidden_size": 16,
    "norm_eps": 1e-3,
}
ROPE: dict[str, Any] = {
    "theta": Rope(5e5),
    "kind": Rope(1e4, "dynamic", 2.0),
    "factor": Rope(1e4, "llama3", 4.0),
    "low_freq_factor": Rope(1e4, "llama3", 8.0, low_freq_factor=2.0),
    "high_freq_factor": Rope(1e4, "llama3", 8.0, high_freq_factor=8.0),
    "original_max_position": Rope(1e4, "llama3", 8.0, original_max_position=4096),
    "beta_fast": Rope(1e4, "yarn", 4.0, beta_fast=16.0),
    "beta_slow": Rope(1e4, "yarn", 4.0, beta_slow=2.0),
    "attention_factor": Rope(1e4, "yarn", 4.0, attention_factor=1.5),
    "mscale": Rope(1e4, "yarn", 4.0, mscale=1.5),
    "mscale_all_dim": Rope(1e4, "yarn", 4.0, mscale_all_dim=1.5),
    "truncate": Rope(1e4, "yarn", 4.0, truncate=False),
    "partial": Rope(1e4, "proportional", partial=0.25),
}


def told_or_listed(config: ModelConfig) -> bool:
    """Whether a reader of `args`, who knows the base model otherwise, sees all of a model, or is told of the rest."""
    args = to_args(LLAMA, config, Parallelism(), 128, 128)
    base = replace(BASE, layers=BASE.layers[: config.num_layers])
    return bool(inexpressible(config)) or from_args(LLAMA, args, base) == config


def layers(config: ModelConfig, change: dict[str, Any], some: bool) -> ModelConfig:
    chosen = (1,) if some else range(config.num_layers)
    changed = (replace(layer, **change) if n in chosen else layer for n, layer in enumerate(config.layers))
    return replace(config, layers=tuple(changed))


def test_every_field_has_a_case() -> None:
    assert MODEL.keys() | OWN == {field.name for field in fields(ModelConfig)}
    assert LAYER.keys() | OF_LAYERS == {field.name for field in fields(LayerConfig)}
    assert ROPE.keys() == {field.name for field in fields(Rope)}


@pytest.mark.parametrize("name", MODEL)
def test_field_of_the_model(name: str) -> None:
    config = replace(BASE, **({} if name not in MOE and name not in OF_EXPERTS else MOE))
    if name == "router_groups_chosen":
        config = replace(config, router_groups=4)
    if config.num_experts:
        config = layers(config, {"moe": True}, some=False)
    assert told_or_listed(replace(config, **{name: MODEL[name]}))


@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("name", LAYER)
def test_field_of_layers(name: str, some: bool) -> None:
    config = replace(BASE, **MOE) if name == "moe" else BASE
    assert told_or_listed(layers(config, {name: LAYER[name]}, some))


@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("name", ROPE)
def test_field_of_the_rope(name: str, some: bool) -> None:
    assert told_or_listed(layers(BASE, {"rope": ROPE[name]}, some))


def test_what_is_expressible_is_not_listed() -> None:
    assert inexpressible(BASE) == []
    assert not told_or_listed(replace(BASE, vocab_size=65)), "nothing would ever fail"


@pytest.mark.parametrize("kind", MODELS)
def test_families(kind: str) -> None:
    """A family is refused exactly for what its config.json asks for beyond stock GPTModel."""
    from ckptkit.families import family_of

    raw = raw_config(kind)
    found = inexpressible(family_of(raw, kind).parse(raw))
    plain = ("qwen2", "qwen2-tied", "qwen2-windowed", "qwen3", "qwen3_moe", "qwen3_moe-mixed", "qwen3_moe-stepped")
    others = ("mistral", "mistral-nemo", "ministral", "mixtral", "mixtral-windowed")
    others += ("qwen3_next", "qwen3_5_text", "qwen3_5", "qwen3_5_moe_text", "qwen3_5_moe")
    others += ("glm4_moe", "glm4_moe-air", "glm4_moe-sparse", "deepseek_v3", "deepseek_v3-moonlight")
    assert (found == []) == (kind in (*plain, *others)), found
