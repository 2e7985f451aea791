"""GPT-OSS: a learned sink in every head, windows on every other layer, and experts with biases and a clamp.

A published archive of bfloat16 has the weights of experts as `[experts, in, out]`. One of MXFP4 has `_blocks` and
`_scales`, whose values are `[experts, out, in]`. In both, gate and up outputs take turns, as in the biases. As hidden
and intermediate size are equal, shapes do not tell the two apart, and only the names of the tensors are asked.

Source: `GptOssForCausalLM` of transformers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ckptkit.errors import InputError, UnsupportedError
from ckptkit.families.alternating import Alternating
from ckptkit.families.blocks import NORM_BEFORE_EXPERTS, experts, router
from ckptkit.families.llama import ATTENTION, EMBEDDINGS, TIED_HEAD
from ckptkit.sharding.rules import COLUMN, EXPERT_GATED_COLUMN, REPLICATED
from ckptkit.tables.bridge import BridgeProvider
from ckptkit.tables.config_fields import FULL, SLIDING, Fields
from ckptkit.tables.config_json import ConfigJson, layer_types_of, translation, window_of, windowed, windows_by_type
from ckptkit.tables.dims import HEADS, D, E, I
from ckptkit.tables.family import Family
from ckptkit.tables.layouts import gate_up
from ckptkit.tables.model_config import QUICK_GELU, QUICK_GELU_ALPHA, ModelConfig, Rope
from ckptkit.tables.rows import HF_LAYER, Raw, layer, sparse
from ckptkit.tables.spelling import HfSpelling, Stack

DEFAULTS = {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "sliding_window": 128,
    "hidden_act": "silu",
    "swiglu_alpha": QUICK_GELU_ALPHA,
    "swiglu_limit": 7.0,
    "max_position_embeddings": 131072,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": True,
}
ROPE = Rope(150000.0, "yarn", 32.0, original_max_position=4096, truncate=False)
CONFIG = ConfigJson(
    "gpt_oss", "GptOssForCausalLM", "gpt_oss", DEFAULTS, ROPE, aliases=(("num_local_experts", "num_experts"),)
)
UP_OFFSET = 1.0
"""Added to the up projection before it is multiplied by the activation of the gate."""


def parse(raw: Raw) -> ModelConfig:
    """Translates a config.json of GPT-OSS.

    `hidden_act` is not translated: transformers reads it and then never applies it.

    Raises:
        InputError: A field is missing, of the wrong type, or contradicts another.
        UnsupportedError: Megatron-Core has no such activation.
    """
    fields, config = CONFIG.fields(raw), CONFIG.decoder(raw)
    limit = fields.number("swiglu_limit")
    if limit <= 0:
        raise InputError(f"config.json: swiglu_limit must be positive, not {limit:g}")
    if (alpha := fields.number("swiglu_alpha")) != QUICK_GELU_ALPHA:
        raise UnsupportedError(f"config.json: swiglu_alpha is {alpha:g}, and Megatron-Core has {QUICK_GELU_ALPHA}")
    count, chosen = fields.experts("num_local_experts")
    config = _with_windows(config, fields)
    return replace(
        config,
        layers=tuple(replace(one, moe=True) for one in config.layers),
        mlp_bias=True,
        activation=QUICK_GELU,
        activation_clamp=limit,
        up_offset=UP_OFFSET,
        sinks=True,
        router_bias=True,
        num_experts=count,
        experts_per_token=chosen,
        moe_ffn_hidden_size=config.layers[0].ffn_hidden_size,
    )


def _with_windows(config: ModelConfig, fields: Fields) -> ModelConfig:
    default = [FULL if number % 2 else SLIDING for number in range(config.num_layers)]
    return windowed(config, windows_by_type(fields.layer_types(default), fields.integer_or_none("sliding_window")))


def _values(config: ModelConfig) -> dict[str, Any]:
    return {
        **CONFIG.values(config),
        "hidden_act": DEFAULTS["hidden_act"],
        "intermediate_size": config.moe_ffn_hidden_size,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "swiglu_limit": config.activation_clamp,
        "sliding_window": window_of(config),
        "layer_types": layer_types_of(config),
    }


_EXPERT, _HOME = "mlp.experts.{e}.", HF_LAYER + "mlp.experts."
_EXPERT_BIASES = (
    layer(
        "mlp.experts.linear_fc1.bias{e}",
        gate_up(_EXPERT + "*_proj.bias", gate=(I,), up=(I,)),
        split=EXPERT_GATED_COLUMN,
        when=sparse,
    ),
    # Every rank has all of it: whoever adds up the outputs of ranks must add it once.
    layer(
        "mlp.experts.linear_fc2.bias{e}",
        _EXPERT + "down_proj.bias",
        (D,),
        replace(REPLICATED, name="expert replicated", expert=True),
        when=sparse,
    ),
)


def _stacks(ending: str, *, columns: bool) -> tuple[Stack, ...]:
    """The tensors of all experts of a layer.

    Args:
        ending: What follows the names of weights.
        columns: Whether the outputs of a weight are its columns.
    """
    layers = HF_LAYER + _EXPERT
    gate, up, down = (f"{layers}{name}_proj." for name in ("gate", "up", "down"))
    weights, biases = Alternating(columns), Alternating(columns=False)
    return (
        Stack(f"{_HOME}gate_up_proj{ending}", (f"{gate}weight", f"{up}weight"), weights),
        Stack(f"{_HOME}down_proj{ending}", (f"{down}weight",), weights),
        Stack(f"{_HOME}gate_up_proj_bias", (f"{gate}bias", f"{up}bias"), biases),
        Stack(f"{_HOME}down_proj_bias", (f"{down}bias",), biases),
    )


HUB = HfSpelling("hub", stacks=_stacks("", columns=True))
MXFP4 = HfSpelling("mxfp4", stacks=_stacks("_blocks", columns=False))
"""The names of an archive of MXFP4, where a tensor of values has the name of its blocks."""

GPT_OSS = Family(
    name="gpt_oss",
    architectures=("GptOssForCausalLM",),
    value_architectures=("GptOssForTokenClassification", "GptOssForSequenceClassification"),
    parse=parse,
    unparse=translation(CONFIG, parse, _values),
    rows=(
        *EMBEDDINGS,
        *ATTENTION,
        layer("self_attention.core_attention.softmax_offset", "self_attn.sinks", (HEADS,), COLUMN),
        NORM_BEFORE_EXPERTS,
        router("mlp.router"),
        layer("mlp.router.bias", "mlp.router.bias", (E,), when=sparse),
        *experts("mlp."),
        *_EXPERT_BIASES,
    ),
    replicas=(TIED_HEAD,),
    hf_spellings=(HUB, MXFP4),
    marks=("decoder.layers.self_attention.core_attention.softmax_offset", "decoder.layers.mlp.router.bias"),
    bridge=BridgeProvider(
        activation=QUICK_GELU,
        ropes=("yarn",),
        with_experts={
            "moe_router_load_balancing_type": "none",
            "bias_activation_fusion": True,
            "bias_dropout_fusion": False,
        },
    ),
)
