"""Qwen2 and 2.5 (biases on q, k and v), Qwen3 (norms on q and k), Qwen3-MoE (experts)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ckptkit.errors import InputError
from ckptkit.families.blocks import NORM_BEFORE_EXPERTS, QK_NORMS, experts, router, stacked
from ckptkit.families.llama import ATTENTION, EMBEDDINGS, MLP, TIED_HEAD
from ckptkit.tables.bridge import BridgeProvider
from ckptkit.tables.config_fields import FULL, SLIDING, Fields
from ckptkit.tables.config_json import ConfigJson, layer_types_of, translation, window_of, windowed, windows_by_type
from ckptkit.tables.family import Family
from ckptkit.tables.model_config import ModelConfig, Rope
from ckptkit.tables.rows import Raw, dense, only, without
from ckptkit.tables.spelling import HUB, LOCAL, TE, VERL

QWEN2_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
QWEN3_DEFAULTS = {**QWEN2_DEFAULTS, "head_dim": 128, "attention_bias": False}
QWEN3_MOE_DEFAULTS = {
    **{key: value for key, value in QWEN3_DEFAULTS.items() if key != "max_window_layers"},
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "head_dim": None,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
    "norm_topk_prob": False,
    "mlp_only_layers": None,
}
ROPE = Rope(10000.0)

QWEN2_CONFIG = ConfigJson("qwen2", "Qwen2ForCausalLM", "qwen2", QWEN2_DEFAULTS, ROPE)
QWEN3_CONFIG = ConfigJson("qwen3", "Qwen3ForCausalLM", "qwen3", QWEN3_DEFAULTS, ROPE)
QWEN3_MOE_CONFIG = ConfigJson(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    "qwen3_moe",
    QWEN3_MOE_DEFAULTS,
    ROPE,
    aliases=(("num_experts", "num_local_experts"),),
)


def parse_qwen2(raw: Raw) -> ModelConfig:
    """Translates a Qwen2 config.json.

    Raises:
        InputError: A field is missing, of the wrong type, or contradicts another.
    """
    return replace(_last_layers_windowed(QWEN2_CONFIG, raw), qkv_bias=True)


def parse_qwen3(raw: Raw) -> ModelConfig:
    """Translates a Qwen3 config.json.

    Raises:
        InputError: A field is missing, of the wrong type, or contradicts another.
    """
    return replace(_last_layers_windowed(QWEN3_CONFIG, raw), qk_norm=True)


def parse_qwen3_moe(raw: Raw) -> ModelConfig:
    """Translates a Qwen3-MoE config.json. Unlike in the dense models, all layers share one window.

    Raises:
        InputError: A field is missing, of the wrong type, or contradicts another.
    """
    fields = QWEN3_MOE_CONFIG.fields(raw)
    config = QWEN3_MOE_CONFIG.decoder(raw)
    config = windowed(config, [_window(fields)] * config.num_layers)
    moe = [number not in dense_layers(fields, config.num_layers) for number in range(config.num_layers)]
    count, chosen = fields.experts("num_experts")
    return replace(
        config,
        layers=tuple(replace(layer, moe=has) for layer, has in zip(config.layers, moe, strict=True)),
        qk_norm=True,
        num_experts=count,
        experts_per_token=chosen,
        moe_ffn_hidden_size=fields.integer("moe_intermediate_size"),
        norm_topk_prob=fields.flag("norm_topk_prob"),
    )


def _last_layers_windowed(config_json: ConfigJson, raw: Raw) -> ModelConfig:
    """Only with `use_sliding_window` there is a window, and only in layers numbered `max_window_layers` or higher."""
    fields, config = config_json.fields(raw), config_json.decoder(raw)
    first = fields.get("max_window_layers")
    if type(first) is not int:
        raise InputError(f"config.json: max_window_layers must be an integer, not {first!r}")
    window = _window(fields)
    default = [FULL if window is None or number < first else SLIDING for number in range(config.num_layers)]
    return windowed(config, windows_by_type(fields.layer_types(default), window))


def _window(fields: Fields) -> int | None:
    return fields.integer_or_none("sliding_window") if fields.flag("use_sliding_window") else None


def dense_layers(fields: Fields, num_layers: int) -> set[int]:
    """Layers with a dense MLP: those in `mlp_only_layers`, and those that `decoder_sparse_step` skips."""
    named = fields.get("mlp_only_layers") or []
    if not isinstance(named, list) or any(type(number) is not int for number in named):
        raise InputError(f"config.json: mlp_only_layers must be a list of layer numbers, not {named!r}")
    step = fields.integer("decoder_sparse_step")
    return set(named) | {number for number in range(num_layers) if (number + 1) % step}


def _window_values(config: ModelConfig) -> dict[str, Any]:
    window = window_of(config)
    return {"use_sliding_window": window is not None, "sliding_window": window}


def _values_qwen2(config: ModelConfig) -> dict[str, Any]:
    return {**QWEN2_CONFIG.values(config), **_window_values(config), "layer_types": layer_types_of(config)}


def _values_qwen3(config: ModelConfig) -> dict[str, Any]:
    return {**QWEN3_CONFIG.values(config), **_window_values(config), "layer_types": layer_types_of(config)}


def _values_qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    return {
        **QWEN3_MOE_CONFIG.values(config),
        **_window_values(config),
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": config.moe_ffn_hidden_size,
        "norm_topk_prob": config.norm_topk_prob,
        "mlp_only_layers": dense_of(config),
    }


def dense_of(config: ModelConfig) -> list[int]:
    """Numbers of the layers without experts."""
    return [number for number, layer in enumerate(config.layers) if not layer.moe]


_unparse_qwen3_moe = translation(QWEN3_MOE_CONFIG, parse_qwen3_moe, _values_qwen3_moe)


def unparse_qwen3_moe(config: ModelConfig, base: Raw) -> dict[str, Any]:
    """The raw config.json of `config`. If its dense layers differ from those of `base`, they are listed one by one."""
    raw = _unparse_qwen3_moe(config, base)
    if base and dense_of(parse_qwen3_moe(base)) != dense_of(config):
        raw["decoder_sparse_step"] = 1
    return raw


QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    value_architectures=("Qwen2ForTokenClassification", "Qwen2ForSequenceClassification"),
    parse=parse_qwen2,
    unparse=translation(QWEN2_CONFIG, parse_qwen2, _values_qwen2),
    rows=without((*EMBEDDINGS, *ATTENTION, *MLP), "linear_proj.bias", "linear_fc1.bias", "linear_fc2.bias"),
    replicas=(TIED_HEAD,),
    spellings=(TE, LOCAL, VERL),
    marks=("decoder.layers.self_attention.linear_qkv.bias",),
    bridge=BridgeProvider(),
)

QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    value_architectures=("Qwen3ForTokenClassification", "Qwen3ForSequenceClassification"),
    parse=parse_qwen3,
    unparse=translation(QWEN3_CONFIG, parse_qwen3, _values_qwen3),
    rows=without((*EMBEDDINGS, *ATTENTION, *QK_NORMS, *MLP), "linear_fc1.bias", "linear_fc2.bias"),
    replicas=(TIED_HEAD,),
    marks=("decoder.layers.self_attention.q_layernorm.weight",),
    bridge=BridgeProvider(),
)

QWEN3_MOE = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    value_architectures=("Qwen3MoeForTokenClassification", "Qwen3MoeForSequenceClassification"),
    parse=parse_qwen3_moe,
    unparse=unparse_qwen3_moe,
    rows=(
        *without((*EMBEDDINGS, *ATTENTION, *QK_NORMS, *only(MLP, dense)), "linear_fc1.bias", "linear_fc2.bias"),
        NORM_BEFORE_EXPERTS,
        router("mlp.gate"),
        *experts("mlp."),
    ),
    replicas=(TIED_HEAD,),
    hf_spellings=(HUB, stacked("fused", "mlp.")),
    marks=("decoder.layers.self_attention.q_layernorm.weight", "decoder.layers.mlp.router.weight"),
    bridge=BridgeProvider(),
)
