"""Megatron-Bridge's model providers, the dataclasses that its checkpoints name: from a `ModelConfig`, and to `args`.

A provider is a `TransformerConfig` of megatron-core, and what its model's constructor needs besides. The class and the
values are those that the family's bridge in Megatron-Bridge 0.6.2 makes of config.json; values that it leaves at their
defaults are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckptkit.errors import InputError, UnsupportedError
from ckptkit.families import families
from ckptkit.megatron_args.contradictions import NEUTRAL, NEUTRAL_OF_EXPERTS, WRITTEN
from ckptkit.megatron_args.fields import FIELDS, GRID_FIELDS, PRECISION_FIELDS, core_grid, fields_of, written
from ckptkit.megatron_args.inexpressible import EXPRESSIBLE_BIASES, beyond_gpt
from ckptkit.megatron_args.unread import LAYOUTS
from ckptkit.sharding.grid import Parallelism
from ckptkit.tables.bridge import ACTIVATIONS, BLOCK_SPEC, LOCAL_SPEC, VERSION, BridgeProvider, Named, OwnAttention
from ckptkit.tables.family import Family
from ckptkit.tables.model_config import QUICK_GELU, ModelConfig, Rope


@dataclass(frozen=True)
class Provider:
    """A model provider, from which Megatron-Bridge builds a model.

    Attributes:
        target: Dotted name of the class.
        values: Field -> value of a plain type, or `Named`.
    """

    target: str
    values: dict[str, Any]


def provider_of(
    family: Family, config: ModelConfig, grid: Parallelism, divisible_by: int, *, local: bool, grouped: bool
) -> Provider:
    """The provider of a model on a grid.

    Args:
        family: The model's family.
        config: The model; `dtype` is that of the stored parameters.
        grid: The parallel grid of the checkpoint.
        divisible_by: `make_vocab_size_divisible_by`.
        local: Whether layers are those of the local spec, without Transformer Engine.
        grouped: Whether experts are one module for all.

    Raises:
        UnsupportedError: Megatron-Bridge has no provider that builds this model.
    """
    bridges = () if family.bridge is None else family.bridge.all()
    bridge = next((one for one in bridges if one.when(config)), None)
    if bridge is None:
        raise UnsupportedError(f"none of Megatron-Bridge {VERSION}'s providers is known here for {config.architecture}")
    if problem := _problem(bridge, config, local):
        raise UnsupportedError(f"Megatron-Bridge {VERSION} has no {problem}")
    return Provider(
        bridge.target,
        {
            **_set(written(fields_of(config), "provider", config, config.layers[0])),
            "activation_func": ACTIVATIONS[config.activation],
            **bridge.values,
            **({**_experts(grouped), **bridge.with_experts} if config.num_experts else {}),
            **(_attention(bridge, config) if bridge.attention is None else bridge.attention.values(config)),
            **core_grid(grid),
            "expert_tensor_parallel_size": grid.etp,  # None leaves it at the tensor parallel size
            **_vocabulary(config, grid, divisible_by),
            **_dtype(config),
            **_spec(bridge, config, local),
        },
    )


def _spec(bridge: BridgeProvider, config: ModelConfig, local: bool) -> dict[str, Any]:
    """The spec of the layers, where it is another than the class's own."""
    if bridge.blocks:
        moe = [int(layer.moe) for layer in config.layers]
        spec = Named(BLOCK_SPEC, {"use_transformer_engine": not local})
        if bridge.block_spec is not None:
            spec = Named(bridge.block_spec)
        return {"transformer_layer_spec": spec, **({"moe_layer_freq": moe} if config.num_experts else {})}
    return {"transformer_layer_spec": Named(LOCAL_SPEC)} if local and bridge.attention is None else {}


def _problem(bridge: BridgeProvider, config: ModelConfig, local: bool) -> str | None:
    """A feature of the model that the provider cannot build, or None."""
    if (config.qkv_bias, config.out_bias, config.mlp_bias) not in EXPRESSIBLE_BIASES:
        return "model with biases on some linear layers only"
    if local and bridge.block_spec is not None:
        return f"{config.architecture} without Transformer Engine"
    if config.value_head:
        return "value heads for this class"
    if len({layer.moe for layer in config.layers}) > 1 and not bridge.blocks:
        return "provider with experts on some layers only"
    if config.activation != bridge.activation or config.activation not in ACTIVATIONS:
        return f"{config.architecture} with {config.activation}"
    if bridge.attention is not None:
        return bridge.attention.problem(config, local)
    if beyond := next(iter(beyond_gpt(config)), None):
        return f"{config.architecture} with {beyond}"
    rope = config.layers[0].rope
    if rope.kind == "yarn" and ("yarn" not in bridge.ropes or rope.attention_factor is not None):
        return f"{config.architecture} with this yarn rope"
    return None if rope.kind in bridge.ropes else f"{rope.kind} rope"


def _set(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are not the default None."""
    return {name: value for name, value in values.items() if value is not None}


def _attention(bridge: BridgeProvider, config: ModelConfig) -> dict[str, Any]:
    """Ropes and windows as `GPTModelProvider` has them."""
    args = written(fields_of(config), "args", config, config.layers[0])
    windows = _set({name: args[name] for name in ("window_size", "window_attn_skip_freq")})
    return {**_rope(config.layers[0].rope), **windows, **(bridge.with_windows if windows else {})}


def _rope(rope: Rope) -> dict[str, Any]:
    found: dict[str, Any] = {"rotary_base": rope.theta}
    if rope.kind == "linear":
        found["seq_len_interpolation_factor"] = rope.factor
    if rope.kind == "llama3":
        found.update(rope_scaling=True, rope_scaling_factor=rope.factor)
    if rope.kind == "yarn":
        found.update(
            position_embedding_type="yarn",
            yarn_rotary_scaling_factor=rope.factor,
            yarn_original_max_position_embeddings=rope.original_max_position,
            yarn_beta_fast=rope.beta_fast,
            yarn_beta_slow=rope.beta_slow,
            yarn_mscale=rope.mscale,
            yarn_mscale_all_dim=rope.mscale_all_dim,
            yarn_correction_range_round_to_int=rope.truncate,
        )
    return found


def _experts(grouped: bool) -> dict[str, Any]:
    """The fields that a bridge sets for running experts, besides their sizes."""
    return {
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 1e-3,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": grouped,
        "moe_permute_fusion": grouped,
    }


def _vocabulary(config: ModelConfig, grid: Parallelism, divisible_by: int) -> dict[str, Any]:
    """Padding, which Megatron-Bridge exports as part of the model, is asked for only where ranks need it."""
    return {
        "vocab_size": config.vocab_size,
        "make_vocab_size_divisible_by": divisible_by,
        "should_pad_vocab": config.vocab_size % grid.tp != 0,
    }


def _dtype(config: ModelConfig) -> dict[str, Any]:
    name = Named(f"torch.{config.dtype or 'float32'}")
    flags = written(PRECISION_FIELDS, "provider", config, config.layers[0])
    return {**flags, "params_dtype": name, "pipeline_dtype": name, "autocast_dtype": name}


_SAME = (
    "rotary_base",
    "rope_scaling_factor",
    "softmax_scale",
    "window_size",
    "window_attn_skip_freq",
    "moe_layer_freq",
    "vocab_size",
    "make_vocab_size_divisible_by",
    "yarn_original_max_position_embeddings",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_correction_range_round_to_int",
    *(name for name in WRITTEN if name not in ("swiglu", "quick_geglu")),
    *NEUTRAL,
    *NEUTRAL_OF_EXPERTS,
    *LAYOUTS,
)
_ARGS_OF: Mapping[str, str] = {
    **{
        field.provider: field.args
        for field in FIELDS
        if field.provider is not None and field.args is not None and field.kind is not None
    },
    **{field.core: field.args for field in GRID_FIELDS},
    **{name: name for name in _SAME},
    "gated_linear_unit": "gated_linear_unit",
    "hf_model_id": "hf_model_id",
    "rope_scaling": "use_rope_scaling",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
    "yarn_rotary_scaling_factor": "rotary_scaling_factor",
    "yarn_mscale": "mscale",
    "yarn_mscale_all_dim": "mscale_all_dim",
}
"""Field of a provider -> argument of Megatron-LM with the same meaning."""


def args_of_provider(provider: Provider) -> dict[str, Any]:
    """Megatron-LM's `args` of the model that a provider builds.

    Raises:
        InputError: A value makes no sense.
        UnsupportedError: `args` cannot express one.
    """
    values = provider.values
    args = {name: values[field] for field, name in _ARGS_OF.items() if field in values}
    if "seq_length" in values:
        args["max_position_embeddings"] = values["seq_length"]
    try:
        args.update(_groups(values))
        if "share_embeddings_and_output_weights" in values:
            args["untie_embeddings_and_output_weights"] = not values["share_embeddings_and_output_weights"]
        if "gated_linear_unit" in values and "activation_func" in values:
            is_silu = values["activation_func"] == ACTIVATIONS["silu"]
            args["swiglu"] = bool(values["gated_linear_unit"]) and is_silu
            if values["activation_func"] == ACTIVATIONS[QUICK_GELU]:
                args["quick_geglu"] = bool(values["gated_linear_unit"])
        if (attention := _own_attention(provider)) is not None:
            args.update(attention.args(values))
    except (TypeError, ValueError, KeyError, ZeroDivisionError) as error:
        raise InputError(f"the model section of run_config.yaml makes no sense ({error!r})") from None
    return args


def layout_args_of_provider(provider: Provider) -> dict[str, Any]:
    """Those of Megatron-LM's `args` by which stored bytes are cut, whether or not `args` can express the model.

    Raises:
        InputError: A value makes no sense.
    """
    facts = {*(field.args or field.provider for field in FIELDS if field.layout), *LAYOUTS}
    facts.update(name for name, neutral in {**NEUTRAL, **NEUTRAL_OF_EXPERTS}.items() if neutral.is_layout)
    values = provider.values
    args = {name: values[field] for field, name in _ARGS_OF.items() if field in values and name in facts}
    try:
        return {**args, **_groups(values)}
    except (TypeError, KeyError) as error:
        raise InputError(f"the model section of run_config.yaml makes no sense ({error!r})") from None


def _groups(values: Mapping[str, Any]) -> dict[str, Any]:
    if "num_query_groups" not in values:
        return {}
    groups = values["num_query_groups"] or values["num_attention_heads"]
    return {"num_query_groups": groups, "group_query_attention": groups != values["num_attention_heads"]}


def _own_attention(provider: Provider) -> OwnAttention | None:
    """How a stored provider describes ropes and windows, if it is not like `GPTModelProvider` there."""
    bridges = [one for family in families() if family.bridge is not None for one in family.bridge.all()]
    own = {one.target: one.attention for one in bridges if one.attention is not None}
    marked = (one for one in own.values() if one.mark in provider.values and one.lacks not in provider.values)
    return own.get(provider.target) or next(marked, None)
