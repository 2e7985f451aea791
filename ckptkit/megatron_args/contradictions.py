"""Allowed values of arguments that change the mathematics and have no field in a `ModelConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ckptkit.megatron_args.fields import fields_of, main_rope, written
from ckptkit.tables.model_config import ModelConfig, Rope


class Mismatch(NamedTuple):
    """An argument whose value is not the one that would be written for a model.

    Attributes:
        name: Its name.
        stored: Its value.
        expected: What would be written.
        is_layout: Whether stored bytes are cut by it, or mean something else by it.
    """

    name: str
    stored: Any
    expected: Any
    is_layout: bool = False


class Neutral(NamedTuple):
    """What an argument may be without an effect.

    Attributes:
        values: Its values.
        is_layout: Whether stored bytes are cut by it where it has another value, or mean something else.
    """

    values: tuple[Any, ...]
    is_layout: bool = False


def _layout(*values: Any) -> Neutral:
    return Neutral(values, True)


def _plain(*values: Any) -> Neutral:
    return Neutral(values)


WRITTEN = (
    "position_embedding_type",
    "rotary_percent",
    "rotary_interleaved",
    "normalization",
    "swiglu",
    "quick_geglu",
    "squared_relu",
    "multi_latent_attention",
)
"""Arguments that change the mathematics, and that are written for every model although a `ModelConfig` lacks them."""

NEUTRAL: dict[str, Neutral] = {
    "experimental_attention_variant": _layout(None),
    "attention_output_gate": _layout(False),
    "softmax_type": _plain("vanilla"),
    "qk_l2_norm": _plain(False),
    "no_rope_freq": _plain(None, 0),
    "apply_residual_connection_post_layernorm": _plain(False),
    "openai_gelu": _plain(False),
    "quick_geglu": _plain(False),
    "glu_linear_offset": _plain(0.0),
    "activation_func_clamp_value": _plain(None),
    "use_mup": _plain(False),
}
"""Arguments that change the mathematics in a way that no convertible model has -> the values that change nothing.

Not listed are arguments that matter only in training (dropout, clipping, the capacity of experts), that choose the
precision of a step or scale and unscale (`apply_query_key_layer_scaling`), or that bring tensors of their own, which no
table has.
"""

NEUTRAL_OF_EXPERTS: dict[str, Neutral] = {
    "moe_router_topk_limited_devices": _plain(None, 0),
    "moe_router_load_balancing_type": _plain("aux_loss", "seq_aux_loss", "global_aux_loss", "none"),
    "moe_router_force_load_balancing": _plain(False),
    "moe_apply_probs_on_input": _plain(False),
    "moe_latent_size": _layout(None, 0),
    "moe_mlp_glu_interleave_size": _layout(None, 0),
}
"""The same for models with experts; in other models, these arguments have no effect."""


def contradictions(args: Mapping[str, Any], config: ModelConfig) -> list[Mismatch]:
    """Arguments with which Megatron-LM would compute another model, although `config` has no field for them.

    Args:
        args: Stored arguments; one that is absent contradicts nothing.
        config: The model.
    """
    expected, rope = written(fields_of(config), "args", config, config.layers[0]), main_rope(config)
    allowed = {**NEUTRAL, **(NEUTRAL_OF_EXPERTS if config.num_experts else {})}
    allowed = {name: neutral for name, neutral in allowed.items() if name not in expected}
    layout = {field.args for field in fields_of(config) if field.layout}
    allowed.update((name, Neutral((expected[name],), name in layout)) for name in WRITTEN if name in expected)
    if config.latent is None:
        allowed["multi_latent_attention"] = _layout(False)
    elif args.get("rope_type") not in (None, "yarn"):  # with it these have no effect
        for name in ("rotary_scaling_factor", "mscale"):
            allowed.pop(name, None)
    if rope.kind == "yarn" and args.get("position_embedding_type") == "yarn":  # as Megatron-LM records it since 0.19
        allowed.update((name, Neutral(values)) for name, values in _yarn_args(rope).items())
    return _mismatches(args, allowed)


def _yarn_args(rope: Rope) -> dict[str, tuple[Any, ...]]:
    """Allowed values of Megatron-LM's arguments for a yarn rope.

    Without an attention factor, transformers and Megatron-Core derive the same factor from the two mscales. If
    config.json has no mscales, the defaults of Megatron-LM's arguments, 1 and 0, give the factor of transformers.
    """
    given = rope.mscale is not None and rope.mscale_all_dim is not None
    return {
        "position_embedding_type": ("yarn",),
        "rotary_scaling_factor": (rope.factor,),
        "yarn_original_max_position_embeddings": (rope.original_max_position,),
        "yarn_beta_fast": (rope.beta_fast,),
        "yarn_beta_slow": (rope.beta_slow,),
        "yarn_correction_range_round_to_int": (rope.truncate,),
        "mscale": (rope.mscale if given else 1.0,),
        "mscale_all_dim": (rope.mscale_all_dim if given else 0.0,),
    }


def _mismatches(args: Mapping[str, Any], allowed: Mapping[str, Neutral]) -> list[Mismatch]:
    """Arguments with a value that is not allowed; one that is absent or None has no value.

    Args:
        args: Stored arguments.
        allowed: Argument -> its neutral values; every item of a list must be one of them.
    """
    return [
        Mismatch(name, args[name], neutral.values[0], neutral.is_layout)
        for name, neutral in allowed.items()
        if args.get(name) is not None and not all(item in neutral.values for item in _items(args[name]))
    ]


def _items(value: Any) -> list[Any]:
    return list(value) if value and isinstance(value, list | tuple) else [value]
