"""Multi-head latent attention: its rows, its names, and its keys of config.json, which three families share.

Megatron has no norm in front of its first linear layers. Transformer Engine's spec fuses the norms of latent vectors
into the layers after them, the local one does not. The two divide the layers that make latent vectors differently over
tensor parallel ranks, too: every rank of Transformer Engine's spec has all of them. A distributed checkpoint has the
names of whichever spec wrote it.

Source: `get_gpt_layer_with_transformer_engine_spec`, `get_gpt_layer_local_spec` and `MLASelfAttention` of
megatron-core 0.16.1 and 0.19.2; `DeepseekV3Attention` of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ckptkit.errors import UnsupportedError
from ckptkit.families.llama import ATTENTION
from ckptkit.sharding.rules import BY_PART, COLUMN, REPLICATED
from ckptkit.tables.config_fields import Fields
from ckptkit.tables.config_json import ConfigJson
from ckptkit.tables.dims import KVA, KVB, KVR, QB, QR, D
from ckptkit.tables.family import FusedRow
from ckptkit.tables.layouts import stack
from ckptkit.tables.model_config import LatentAttention, LayerConfig, ModelConfig
from ckptkit.tables.rows import Raw, choose, layer
from ckptkit.tables.spelling import LOCAL as PLAIN_LOCAL
from ckptkit.tables.spelling import TE, Spelling

DEFAULTS: Mapping[str, Any] = {
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "attention_bias": False,
    "rope_interleave": True,
}
"""Class defaults that all these families share."""


def _from_latent(config: ModelConfig, layer: LayerConfig) -> bool:
    return config.latent is not None and config.latent.query_rank is not None


def _from_stream(config: ModelConfig, layer: LayerConfig) -> bool:
    return not _from_latent(config, layer)


_Q, _KV = "self_attention.linear_q_", "self_attention.linear_kv_"
ROWS = (
    layer("input_layernorm.weight", "input_layernorm.weight", (D,)),
    layer(f"{_Q}proj.weight", "self_attn.q_proj.weight", (QB, D), COLUMN, when=_from_stream),
    layer(f"{_Q}down_proj.weight", "self_attn.q_a_proj.weight", (QR, D), REPLICATED, when=_from_latent),
    layer(f"{_Q}up_proj.layer_norm_weight", "self_attn.q_a_layernorm.weight", (QR,), when=_from_latent),
    layer(f"{_Q}up_proj.weight", "self_attn.q_b_proj.weight", (QB, QR), COLUMN, when=_from_latent),
    layer(f"{_KV}down_proj.weight", "self_attn.kv_a_proj_with_mqa.weight", (KVA, D), REPLICATED),
    layer(f"{_KV}up_proj.layer_norm_weight", "self_attn.kv_a_layernorm.weight", (KVR,)),
    layer(f"{_KV}up_proj.weight", "self_attn.kv_b_proj.weight", (KVB, KVR), COLUMN),
    *choose(ATTENTION, "linear_proj.weight"),
)
"""The rows of the attention of a layer and of the norm before it."""

MARK = "decoder.layers.self_attention.linear_kv_down_proj.weight"

LOCAL = Spelling(
    "local",
    (
        (f".{_Q}up_proj.layer_norm_weight", ".self_attention.q_layernorm.weight"),
        (f".{_KV}up_proj.layer_norm_weight", ".self_attention.kv_layernorm.weight"),
        *(pair for pair in PLAIN_LOCAL.endings if "linear_qkv" not in pair[0]),
    ),
    experts=PLAIN_LOCAL.experts,
    extra_states=False,
    # Of a LoRA adapter in the layout of PEFT, B is divided as the layer is.
    splits=tuple(
        (f".{linear}down_proj.{tensor}weight", COLUMN) for linear in (_Q, _KV) for tensor in ("", "lora_B.default.")
    ),
)
SPELLINGS = (TE, LOCAL)

_DOWN = tuple(f".{linear}down_proj.weight" for linear in (_Q, _KV))
_FUSED = "self_attention.linear_qkv_down_proj."
FUSED = FusedRow(
    layer(
        f"{_FUSED}weight",
        stack("down_proj", split=BY_PART)(
            "self_attn.*.weight", **{"q_a_proj": (QR, D), "kv_a_proj_with_mqa": (KVA, D)}
        ),
        when=_from_latent,
    ),
    _DOWN,
    Spelling(
        "te_fused",
        ((".input_layernorm.weight", f".{_FUSED}layer_norm_weight"),),
        splits=tuple((ending, COLUMN) for ending in _DOWN),
    ),
    "mla_down_proj_fusion",
    lambda config: config.latent is not None and config.latent.query_rank is not None,
)
"""One linear layer that makes both latent vectors, and has the norm before it (Megatron-Core 0.19's option
`--mla-down-proj-fusion`). Each rank has its share of the rows of either vector.

Source: `FusedMLASelfAttention` of megatron-core 0.19.2.
"""


def parse(config_json: ConfigJson, raw: Raw) -> ModelConfig:
    """Translates the keys that all decoders share, and those of latent attention.

    Raises:
        InputError: A field is missing, of the wrong type, or contradicts another.
        UnsupportedError: Megatron-Core has no such attention.
    """
    fields = config_json.fields(raw)
    _refuse(fields)
    heads, value_dim = fields.integer("num_attention_heads"), fields.integer("v_head_dim")
    config = config_json.decoder({**raw, "head_dim": value_dim, "num_key_value_heads": heads})
    latent = LatentAttention(
        fields.integer_or_none("q_lora_rank"),
        fields.integer("kv_lora_rank"),
        fields.integer("qk_nope_head_dim"),
        fields.integer("qk_rope_head_dim"),
        value_dim,
    )
    return replace(config, qkv_bias=False, out_bias=False, qk_norm=True, latent=latent)


def _refuse(fields: Fields) -> None:
    heads, of_keys = fields.integer("num_attention_heads"), fields.integer_or_none("num_key_value_heads")
    if of_keys not in (None, heads):
        raise UnsupportedError(f"config.json: num_key_value_heads {of_keys} of {heads} heads with latent attention")
    if fields.flag("attention_bias"):
        raise UnsupportedError("config.json: attention_bias with latent attention, which Megatron-Core has without")
    if not fields.flag("rope_interleave"):
        raise UnsupportedError(
            "config.json: rope_interleave is false: its rotating channels are paired as halves",
            hint="Megatron-Core pairs neighbours, as all released models do",
        )


def values(config_json: ConfigJson, config: ModelConfig) -> dict[str, Any]:
    """The values of `config` for the keys that `parse` reads."""
    assert config.latent is not None
    found = {
        **config_json.values(config),
        "q_lora_rank": config.latent.query_rank,
        "kv_lora_rank": config.latent.key_value_rank,
        "qk_nope_head_dim": config.latent.plain_dim,
        "qk_rope_head_dim": config.latent.rotary_dim,
        "v_head_dim": config.latent.value_dim,
    }
    return {**found, "attention_bias": False, "rope_interleave": True}
