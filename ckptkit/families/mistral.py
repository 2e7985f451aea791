"""Mistral (v0.1, v0.3, Nemo, Small), Ministral and Mixtral: Llama's tensors, windows, and Mixtral's experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ckptkit.families.blocks import NORM_BEFORE_EXPERTS, experts, router, stacked
from ckptkit.families.llama import ATTENTION, EMBEDDINGS, MLP, TIED_HEAD
from ckptkit.tables.bridge import BridgeProvider
from ckptkit.tables.config_fields import FULL, SLIDING
from ckptkit.tables.config_json import ConfigJson, layer_types_of, translation, window_of, windowed, windows_by_type
from ckptkit.tables.family import Family
from ckptkit.tables.model_config import ModelConfig, Rope
from ckptkit.tables.rows import Raw, without
from ckptkit.tables.spelling import HUB

MISTRAL_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "sliding_window": 4096,
}
MINISTRAL_DEFAULTS = MISTRAL_DEFAULTS
MIXTRAL_DEFAULTS = {
    **MISTRAL_DEFAULTS,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
}

MISTRAL_CONFIG = ConfigJson("mistral", "MistralForCausalLM", "mistral", MISTRAL_DEFAULTS, Rope(10000.0))
MINISTRAL_CONFIG = ConfigJson("ministral", "MinistralForCausalLM", "ministral", MINISTRAL_DEFAULTS, Rope(10000.0))
MIXTRAL_CONFIG = ConfigJson(
    "mixtral",
    "MixtralForCausalLM",
    "mixtral",
    MIXTRAL_DEFAULTS,
    Rope(1000000.0),
    aliases=(("num_local_experts", "num_experts"),),
)


def parse_mistral(raw: Raw) -> ModelConfig:
    """Translates a Mistral config.json. An absent `sliding_window` is the class default, only null is none.

    Raises:
        InputError: A field is missing, of the wrong type, or contradicts another.
    """
    config = MISTRAL_CONFIG.decoder(raw)
    window = MISTRAL_CONFIG.fields(raw).integer_or_none("sliding_window")
    return windowed(config, [window] * config.num_layers)


def parse_ministral(raw: Raw) -> ModelConfig:
    """Translates a Ministral config.json, whose layers may differ in their attention.

    Raises:
        InputError: A field is missing, of the wrong type, or contradicts another.
    """
    fields, config = MINISTRAL_CONFIG.fields(raw), MINISTRAL_CONFIG.decoder(raw)
    window = fields.integer_or_none("sliding_window")
    default = [FULL if window is None else SLIDING] * config.num_layers
    return windowed(config, windows_by_type(fields.layer_types(default), window))


def parse_mixtral(raw: Raw) -> ModelConfig:
    """Translates a Mixtral config.json: experts in every layer, their weights always renormalised.

    Raises:
        InputError: A field is missing, of the wrong type, or contradicts another.
    """
    fields, config = MIXTRAL_CONFIG.fields(raw), MIXTRAL_CONFIG.decoder(raw)
    config = windowed(config, [fields.integer_or_none("sliding_window")] * config.num_layers)
    count, chosen = fields.experts("num_local_experts")
    return replace(
        config,
        layers=tuple(replace(layer, moe=True) for layer in config.layers),
        num_experts=count,
        experts_per_token=chosen,
        moe_ffn_hidden_size=config.layers[0].ffn_hidden_size,
    )


def _values_mistral(config: ModelConfig) -> dict[str, Any]:
    return {**MISTRAL_CONFIG.values(config), "sliding_window": window_of(config)}


def _values_ministral(config: ModelConfig) -> dict[str, Any]:
    values = MINISTRAL_CONFIG.values(config)
    return {**values, "sliding_window": window_of(config), "layer_types": layer_types_of(config)}


def _values_mixtral(config: ModelConfig) -> dict[str, Any]:
    return {
        **MIXTRAL_CONFIG.values(config),
        "intermediate_size": config.moe_ffn_hidden_size,
        "sliding_window": window_of(config),
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
    }


_ROWS = without(
    (*EMBEDDINGS, *ATTENTION, *MLP), "linear_qkv.bias", "linear_proj.bias", "linear_fc1.bias", "linear_fc2.bias"
)

_EXPERT = ("w1", "w3", "w2")
"""Gate, up and down projection."""

MISTRAL = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    value_architectures=("MistralForTokenClassification", "MistralForSequenceClassification"),
    parse=parse_mistral,
    unparse=translation(MISTRAL_CONFIG, parse_mistral, _values_mistral),
    rows=_ROWS,
    replicas=(TIED_HEAD,),
    bridge=BridgeProvider(
        "megatron.bridge.models.mistral.mistral_provider.MistralModelProvider",
        ropes=("default", "linear", "llama3"),
        with_windows={"cp_comm_type": "a2a"},
    ),
)

MINISTRAL = Family(
    name="ministral",
    architectures=("MinistralForCausalLM",),
    value_architectures=("MinistralForTokenClassification", "MinistralForSequenceClassification"),
    parse=parse_ministral,
    unparse=translation(MINISTRAL_CONFIG, parse_ministral, _values_ministral),
    rows=_ROWS,
    replicas=(TIED_HEAD,),
)

MIXTRAL = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    value_architectures=("MixtralForTokenClassification", "MixtralForSequenceClassification"),
    parse=parse_mixtral,
    unparse=translation(MIXTRAL_CONFIG, parse_mixtral, _values_mixtral),
    rows=(
        *without(_ROWS, ".mlp.linear_fc1.layer_norm_weight", ".mlp.linear_fc1.weight", ".mlp.linear_fc2.weight"),
        NORM_BEFORE_EXPERTS,
        router("block_sparse_moe.gate"),
        *experts("block_sparse_moe.", *_EXPERT),
    ),
    replicas=(TIED_HEAD,),
    hf_spellings=(HUB, stacked("fused", "block_sparse_moe.", *_EXPERT, fused="mlp.")),
    marks=("decoder.layers.mlp.router.weight",),
)
