"""Gemma 3: norms before and after attention and MLP, all zero-centred; two rotary embeddings; local and global layers.

The text model and the multimodal one share one table. The vision tower and the projector have no Megatron slot: they
travel as extras.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ckptkit.errors import InputError, UnsupportedError
from ckptkit.families.blocks import QK_NORMS
from ckptkit.families.gemma3_bridge import GEMMA3_BRIDGE
from ckptkit.families.llama import ATTENTION, EMBEDDINGS, MLP, TIED_HEAD
from ckptkit.families.wrapper import Wrapper
from ckptkit.tables.config_fields import FULL, SLIDING, Fields, object_in, parse_rope, rope_fields
from ckptkit.tables.config_json import ConfigJson, layer_types_of, window_of, windowed, windows_by_type
from ckptkit.tables.dims import D
from ckptkit.tables.family import Family
from ckptkit.tables.model_config import LayerConfig, ModelConfig, Rope
from ckptkit.tables.rows import Raw, Replica, layer, renamed, without
from ckptkit.tables.spelling import HUB, LOCAL, TE, HfSpelling, Spelling

DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
}
PATTERN = 6
"""Every sixth layer has no window, unless config.json has another pattern."""
THETAS = {FULL: 1000000.0, SLIDING: 10000.0}
_OLD_THETAS = {FULL: "rope_theta", SLIDING: "rope_local_base_freq"}

CONFIG = ConfigJson("gemma3_text", "Gemma3ForCausalLM", "gemma3_text", DEFAULTS, Rope(THETAS[FULL]))


def parse_text(raw: Raw) -> ModelConfig:
    """Translates the config.json of a Gemma 3 text model.

    `attn_logit_softcapping` is not translated: transformers reads it and then never applies it to Gemma 3.

    Raises:
        InputError: A field is missing, of the wrong type, or contradicts another.
        UnsupportedError: The model is bidirectional.
    """
    fields = CONFIG.fields(raw)
    if fields.flag("use_bidirectional_attention"):
        raise UnsupportedError("Gemma 3 with use_bidirectional_attention", hint="only causal models are converted")
    config = _with_ropes(_with_windows(CONFIG.decoder(raw), fields), _ropes(raw))
    scalar = fields.number("query_pre_attn_scalar")
    if scalar <= 0:
        raise InputError(f"config.json: query_pre_attn_scalar must be positive, not {scalar:g}")
    return replace(
        config,
        qk_norm=True,
        zero_centered_norms=True,
        post_norms=True,
        scaled_embedding=True,
        softmax_scale=None if scalar == config.layers[0].head_dim else scalar**-0.5,
        logit_softcap=fields.number_or_none("final_logit_softcapping"),
    )


def _with_windows(config: ModelConfig, fields: Fields) -> ModelConfig:
    pattern = fields.raw.get("sliding_window_pattern", PATTERN)
    if type(pattern) is not int or pattern < 1:
        raise InputError(f"config.json: sliding_window_pattern must be a positive integer, not {pattern!r}")
    default = [SLIDING if (number + 1) % pattern else FULL for number in range(config.num_layers)]
    return windowed(config, windows_by_type(fields.layer_types(default), fields.integer_or_none("sliding_window")))


def _ropes(raw: Raw) -> dict[str, Rope]:
    """The rotary embeddings of full and of sliding layers.

    Old files scale only the full one (`rope_scaling`) and call the base of the other `rope_local_base_freq`.
    """
    new, context = object_in(raw, "rope_parameters"), Fields(raw, DEFAULTS).context()
    scaling = {kind: object_in(new, kind) for kind in THETAS}
    scaling[FULL] = {**scaling[FULL], **object_in(raw, "rope_scaling")}
    return {
        kind: parse_rope(scaling[kind], raw.get(_OLD_THETAS[kind], theta), context) for kind, theta in THETAS.items()
    }


def _with_ropes(config: ModelConfig, ropes: dict[str, Rope]) -> ModelConfig:
    def rope(layer: LayerConfig) -> Rope:
        return ropes[FULL if layer.window is None else SLIDING]

    return replace(config, layers=tuple(replace(layer, rope=rope(layer)) for layer in config.layers))


def _values(config: ModelConfig) -> dict[str, Any]:
    scale = config.softmax_scale
    return {
        **CONFIG.values(config),
        "query_pre_attn_scalar": config.layers[0].head_dim if scale is None else round(scale**-2),
        "sliding_window": window_of(config),
        "layer_types": layer_types_of(config),
        "final_logit_softcapping": config.logit_softcap,
    }


def unparse_text(config: ModelConfig, base: Raw) -> dict[str, Any]:
    """The raw config.json of a text model: `base` with the fields that differ, or all fields where there is no base."""
    raw = CONFIG.unparse(config, base, parse_text, _values)
    old = _ropes(base)
    ropes = {**old, **{FULL if one.window is None else SLIDING: one.rope for one in config.layers}}
    if base and ropes == old:
        return raw
    for key in (*_OLD_THETAS.values(), "rope_scaling"):
        raw.pop(key, None)
    raw["rope_parameters"] = {kind: rope_fields(rope) for kind, rope in ropes.items()}
    return raw


WRAPPER = Wrapper("gemma3", "Gemma3ForConditionalGeneration", CONFIG, parse_text, unparse_text)

_POST_NORMS = (
    layer("self_attention.linear_proj.post_layernorm.weight", "post_attention_layernorm.weight", (D,)),
    layer("mlp.linear_fc2.post_layernorm.weight", "post_feedforward_layernorm.weight", (D,)),
)

MBRIDGE = Spelling(
    "mbridge",
    (
        (".self_attention.linear_proj.post_layernorm.weight", ".post_attention_layernorm.weight"),
        (".mlp.linear_fc2.post_layernorm.weight", ".post_feedforward_layernorm.weight"),
    ),
    prefix="language_model.",
    tied_head=True,
)
"""The names that mbridge writes; `te` has those of Megatron-Bridge."""

GEMMA3_TEXT = Family(
    name="gemma3_text",
    architectures=("Gemma3ForCausalLM",),
    value_architectures=("Gemma3TextForSequenceClassification",),
    parse=parse_text,
    unparse=unparse_text,
    rows=(
        *EMBEDDINGS,
        *ATTENTION,
        *QK_NORMS,
        *renamed(
            without(MLP, "linear_fc1.bias", "linear_fc2.bias"),
            (".post_attention_layernorm.", ".pre_feedforward_layernorm."),
        ),
        *_POST_NORMS,
    ),
    replicas=(TIED_HEAD,),
    spellings=(TE, LOCAL, MBRIDGE),
    marks=("decoder.layers.self_attention.linear_proj.post_layernorm.weight",),
    bridge=GEMMA3_BRIDGE,
)

GEMMA3 = Family(
    name="gemma3",
    architectures=("Gemma3ForConditionalGeneration",),
    value_architectures=("Gemma3ForSequenceClassification",),
    parse=WRAPPER.parse,
    unparse=WRAPPER.unparse,
    rows=renamed(GEMMA3_TEXT.rows, ("model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")),
    replicas=(
        Replica(
            "language_model.lm_head.weight",
            of="language_model.model.embed_tokens.weight",
            when=lambda config: config.tied,
        ),
    ),
    extras=("vision_tower.*", "multi_modal_projector.*"),
    spellings=GEMMA3_TEXT.spellings,
    hf_spellings=(
        HUB,
        HfSpelling(
            "in_memory",
            renames=(
                ("language_model.model.", "model.language_model."),
                ("language_model.lm_head.", "lm_head."),
                ("vision_tower.", "model.vision_tower."),
                ("multi_modal_projector.", "model.multi_modal_projector."),
            ),
        ),
    ),
    prefix="language_model.",
    marks=GEMMA3_TEXT.marks,
    text_only=WRAPPER.text_only,
    sizes_in="text_config",
)
