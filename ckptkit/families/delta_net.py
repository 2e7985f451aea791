"""Gated DeltaNets between layers of attention with an output gate: what Qwen3-Next and its successors share.

Megatron-Core has one projection in front of a DeltaNet, which gives queries, keys, values, gates (z), betas and decays
(alpha), one after another. Each rank has its share of every one of them, and of every part of the convolution. In a
distributed checkpoint every part is a tensor of its own.

Source: `GatedDeltaNet` and `SelfAttention` of megatron-core 0.16.1 and 0.19.2; `Qwen3NextGatedDeltaNet` and
`Qwen3NextAttention` of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ckptkit.errors import InputError
from ckptkit.families.blocks import QK_NORMS as PLAIN_QK_NORMS
from ckptkit.families.blocks import SHARED_EXPERTS
from ckptkit.io.zero_centered import LESS_ONE
from ckptkit.sharding.rules import BY_PART, COLUMN, REPLICATED, ROW
from ckptkit.tables.bridge import BridgeProvider
from ckptkit.tables.config_fields import FULL, LINEAR, Fields
from ckptkit.tables.config_json import ConfigJson, translation
from ckptkit.tables.dims import (
    GROUPS,
    HEADS,
    KERNEL,
    KEY_HEADS,
    KEYS,
    KV,
    ONE,
    QKV,
    QKVZ,
    VALUE_DIM,
    VALUE_HEADS,
    VALUES,
    D,
    Q,
)
from ckptkit.tables.family import MegatronQuirks
from ckptkit.tables.layouts import Parts, by_head, flat, interleave, stack
from ckptkit.tables.model_config import DeltaNet, LayerConfig, ModelConfig, Rope
from ckptkit.tables.rows import Raw, Row, layer, only, renamed, sparse
from ckptkit.tables.spelling import LOCAL as PLAIN_LOCAL


def linear(config: ModelConfig, layer: LayerConfig) -> bool:
    """Whether a layer has a DeltaNet in place of attention."""
    return layer.delta is not None


def attends(config: ModelConfig, layer: LayerConfig) -> bool:
    """Whether a layer has attention."""
    return layer.delta is None


gated_qkv = interleave(
    "qkv with gates", GROUPS, by_head(HEADS, Q, Q), heads=(HEADS, HEADS, GROUPS, GROUPS), split=COLUMN
)
"""For each key/value head: the query heads that share it, the gates of their outputs, its key, then its value.

Source: the view of the rows in `Attention.get_query_key_value_tensors` of Megatron-Core with `output_gate`.
"""

_HEADS = (KEY_HEADS, KEY_HEADS, *(VALUE_HEADS,) * 4)
_KEYS = ("query", "key", "value", "z", "beta", "alpha")
IN_PROJ_BY_HEAD = stack(
    "in_proj",
    by_head(KEY_HEADS, KEYS, KEYS, VALUES, VALUES),
    by_head(KEY_HEADS, VALUE_HEADS, VALUE_HEADS),
    heads=_HEADS,
    split=BY_PART,
    keys=_KEYS,
)
"""Of two tensors: one has, for each key head, its query, its key, and the values and gates that share them; the other
the betas and decays of these values."""
IN_PROJ_FLAT = stack("in_proj", flat(KEYS, KEYS, VALUES), heads=_HEADS, split=BY_PART, keys=_KEYS)
"""Of four tensors: queries, keys and values, one after another; gates; betas; decays."""
CONV1D = stack("conv1d", flat(KEYS, KEYS, VALUES), heads=_HEADS[:3], split=BY_PART, keys=_KEYS[:3])
"""The filters of queries, keys and values, one after another on both sides."""

ATTENTION = (
    layer("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", (D,), when=attends),
    layer(
        "self_attention.linear_qkv.weight",
        gated_qkv("self_attn.*_proj.weight", q=(2 * Q, D), k=(KV, D), v=(KV, D)),
        when=attends,
    ),
    layer(
        "self_attention.linear_qkv.bias",
        gated_qkv("self_attn.*_proj.bias", q=(2 * Q,), k=(KV,), v=(KV,)),
        when=lambda config, layer: attends(config, layer) and config.qkv_bias,
    ),
    layer("self_attention.linear_proj.weight", "self_attn.o_proj.weight", (D, Q), ROW, when=attends),
    layer(
        "self_attention.linear_proj.bias",
        "self_attn.o_proj.bias",
        (D,),
        when=lambda config, layer: attends(config, layer) and config.out_bias,
    ),
)
"""Attention with an output gate, and the norm before it."""

QK_NORMS = only(PLAIN_QK_NORMS, attends)
"""Its norms of queries and keys."""


_MEGATRON, _HF = "self_attention.", "linear_attn."


def _delta_net(in_proj: Parts) -> tuple[Row, ...]:
    """The rows of a DeltaNet and of the norm before it."""
    rows = (
        layer(f"{_MEGATRON}in_proj.layer_norm_weight", "input_layernorm.weight", (D,)),
        layer(f"{_MEGATRON}in_proj.weight", in_proj),
        layer(f"{_MEGATRON}conv1d.weight", CONV1D(f"{_HF}*.weight", conv1d=(QKV, ONE, KERNEL))),
        layer(f"{_MEGATRON}A_log", f"{_HF}A_log", (VALUE_HEADS,), COLUMN),
        layer(f"{_MEGATRON}dt_bias", f"{_HF}dt_bias", (VALUE_HEADS,), COLUMN),
        layer(f"{_MEGATRON}out_norm.weight", f"{_HF}norm.weight", (VALUE_DIM,), numbers=LESS_ONE),
        layer(f"{_MEGATRON}out_proj.weight", f"{_HF}out_proj.weight", (D, VALUES), ROW),
    )
    return only(rows, linear)


DELTA_BY_HEAD = _delta_net(
    IN_PROJ_BY_HEAD(f"{_HF}in_proj_*.weight", qkvz=(QKVZ, D), ba=(2 * VALUE_HEADS, D)),
)
DELTA_FLAT = _delta_net(
    IN_PROJ_FLAT(f"{_HF}in_proj_*.weight", qkv=(QKV, D), z=(VALUES, D), b=(VALUE_HEADS, D), a=(VALUE_HEADS, D)),
)
"""DeltaNets of the two kinds of archives."""

_SHARED = "mlp.shared_expert"
SHARED_EXPERT = (
    *renamed(SHARED_EXPERTS, (".mlp.shared_experts.", ".mlp.shared_expert.")),
    layer("mlp.shared_experts.gate_weight", f"{_SHARED}_gate.weight", (ONE, D), REPLICATED, when=sparse),
)
"""The expert that every token goes through, and the gate of its output."""

HF_MODULES = "DeltaNets as modules of transformers (slime, or ms-swift with USE_MCORE_GDN=0)"
DECOUPLED = "the projection of a DeltaNet in two layers (ms-swift with --linear_decoupled_in_proj)"
QUIRKS = MegatronQuirks(
    foreign={
        ".self_attention.linear_attn.": HF_MODULES,
        ".self_attention.in_proj_qkvz.": DECOUPLED,
        ".self_attention.in_proj_ba.": DECOUPLED,
    }
)
"""Layouts of other writers, which no table reads."""

BRIDGE = BridgeProvider(
    ropes=("default",),
    values={"hetereogenous_dist_checkpoint": True},  # as megatron-core spells it
    with_experts={"moe_router_load_balancing_type": "global_aux_loss"},
    blocks=True,
    block_spec=(
        "megatron.core.models.gpt.experimental_attention_variant_module_specs."
        "get_transformer_block_with_experimental_attention_variant_spec"
    ),
)
"""Source: `Qwen35Bridge` and `Qwen35MoEBridge` of Megatron-Bridge, for the text models."""

MARKS = ("decoder.layers.self_attention.in_proj.weight", "decoder.layers.self_attention.A_log")

LOCAL = replace(
    PLAIN_LOCAL,
    endings=(*PLAIN_LOCAL.endings, (f".{_MEGATRON}in_proj.layer_norm_weight", ".input_layernorm.weight")),
)
"""The names of layers whose norms are modules of their own. Megatron-Core builds a DeltaNet only with `te`."""


DEFAULTS: Mapping[str, Any] = {
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
"""Class defaults that all these families share."""
ROPE = Rope(10000.0, partial=0.25)

_GRANTED: Mapping[str, tuple[Any, ...]] = {
    "attn_output_gate": (True,),
    "output_gate_type": ("swish", "silu"),  # of the norm behind a DeltaNet
    "linear_use_gate": (True,),
    "linear_allow_neg_eigval": (False,),
    "use_sliding_window": (False,),
    "mtp_use_dedicated_embeddings": (False,),
}
"""Keys of published files, and of related families, that the classes of transformers do not read -> what they do."""
_INTERVAL = "full_attention_interval"
_SIZES = {
    "key_heads": "linear_num_key_heads",
    "value_heads": "linear_num_value_heads",
    "key_dim": "linear_key_head_dim",
    "value_dim": "linear_value_head_dim",
    "kernel": "linear_conv_kernel_dim",
}


def with_delta_nets(config: ModelConfig, fields: Fields) -> ModelConfig:
    """`config` with the DeltaNets, gates and norms that config.json describes.

    Raises:
        InputError: A field is missing, of the wrong type, or contradicts another.
        UnsupportedError: It is a model that the class of transformers does not compute.
    """
    fields.refuse_unless(_GRANTED)
    sizes = {ours: fields.integer(key) for ours, key in _SIZES.items()}
    keys, values = sizes["key_heads"], sizes["value_heads"]
    if values % keys:
        raise InputError(f"config.json: linear_num_value_heads {values} is no multiple of linear_num_key_heads {keys}")
    delta = DeltaNet(**sizes)
    pairs = zip(config.layers, _layer_types(fields, config.num_layers), strict=True)
    return replace(
        config,
        layers=tuple(replace(one, delta=delta if kind == LINEAR else None) for one, kind in pairs),
        qk_norm=True,
        output_gate=True,
        zero_centered_norms=True,
    )


def _layer_types(fields: Fields, num_layers: int) -> list[str]:
    """The kind of each layer. transformers looks at the interval only where `layer_types` is absent; others always."""
    default = _by_interval(fields.raw.get(_INTERVAL, 4), num_layers)
    types = fields.layer_types(default, (FULL, LINEAR))
    if fields.raw.get(_INTERVAL) is not None and types != default:
        number = next(number for number, kind in enumerate(types) if kind != default[number])
        raise InputError(
            f"config.json: layer {number} is {types[number]} by layer_types, and {default[number]} by {_INTERVAL}"
            f" {fields.raw[_INTERVAL]}",
            hint=f"remove the wrong one; without {_INTERVAL}, layer_types counts",
        )
    return types


def _by_interval(interval: Any, num_layers: int) -> list[str]:
    """The kinds of layers where each `interval`th has attention.

    Raises:
        InputError: It is no positive integer.
    """
    if type(interval) is not int or interval < 1:
        raise InputError(f"config.json: {_INTERVAL} must be a positive integer, not {interval!r}")
    return [LINEAR if (number + 1) % interval else FULL for number in range(num_layers)]


def delta_translation(
    config_json: ConfigJson,
    parse: Callable[[Raw], ModelConfig],
    values: Callable[[ModelConfig], Mapping[str, Any]],
) -> Callable[[ModelConfig, Raw], dict[str, Any]]:
    """The `unparse` of a family with DeltaNets: an interval that other layers leave behind is not written."""
    plain = translation(config_json, parse, values)

    def unparse(config: ModelConfig, base: Raw) -> dict[str, Any]:
        raw = plain(config, base)
        types = values_of_delta_nets(config)["layer_types"]
        if raw.get(_INTERVAL) is not None and _by_interval(raw[_INTERVAL], config.num_layers) != types:
            del raw[_INTERVAL]
        return raw

    return unparse


def values_of_delta_nets(config: ModelConfig) -> dict[str, Any]:
    """The values of `config` for the keys that `with_delta_nets` reads; sizes only of a model with DeltaNets."""
    types = [FULL if one.delta is None else LINEAR for one in config.layers]
    delta = next((one.delta for one in config.layers if one.delta is not None), None)
    sizes = {} if delta is None else {key: getattr(delta, ours) for ours, key in _SIZES.items()}
    return {**sizes, "layer_types": types}
