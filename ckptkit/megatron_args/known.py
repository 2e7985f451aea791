"""Megatron-LM's arguments one by one: under which names and types they are stored, and which change the mathematics.

A Megatron checkpoint records hundreds of arguments. Listed here are those that describe a model or its grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ckptkit.errors import InputError

GRID_ARGS = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "first_stage_layers": "decoder_first_pipeline_num_layers",
    "last_stage_layers": "decoder_last_pipeline_num_layers",
}
"""Size of a grid -> the argument that says it."""

GRID_FLAGS = {
    "embedding_in_split": "account_for_embedding_in_pipeline_split",
    "loss_in_split": "account_for_loss_in_pipeline_split",
    "adapter_first": "adapter_first",
}
"""The same of what is on or off."""


@dataclass(frozen=True)
class Kind:
    """What an argument must be: in words, and as a test."""

    text: str
    holds: Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_whole(value) or isinstance(value, float)) and math.isfinite(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, int) for item in value)


_COUNT = Kind("a positive integer", lambda value: _is_whole(value) and value > 0)
_COUNT_OR_ZERO = Kind("an integer of at least 0", lambda value: _is_whole(value) and value >= 0)
_NUMBER = Kind("a number of at least 0", lambda value: _is_number(value) and value >= 0)
_POSITIVE = Kind("a positive number", lambda value: _is_number(value) and value > 0)
_FLAG = Kind("true or false", lambda value: value in (0, 1))
_NAME = Kind("a name", lambda value: isinstance(value, str))
_WINDOW = Kind("two integers", lambda value: _is_list(value) and len(value) == 2)
_FREQUENCY = Kind("a positive integer or a list of integers", lambda value: _COUNT.holds(value) or _is_list(value))

_KINDS: dict[Kind, tuple[str, ...]] = {
    _COUNT: (
        *GRID_ARGS.values(),
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "ffn_hidden_size",
        "seq_length",
        "max_position_embeddings",
        "moe_router_topk",
        "make_vocab_size_divisible_by",
        "adapter_after",
        "adapter_hidden_size",
    ),
    _COUNT_OR_ZERO: ("num_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "vocab_size"),
    _NUMBER: ("init_method_std", "norm_epsilon", "rotary_seq_len_interpolation_factor"),
    _POSITIVE: ("rotary_base", "rope_scaling_factor", "softmax_scale"),
    _FLAG: (
        *GRID_FLAGS.values(),
        "group_query_attention",
        "use_rope_scaling",
        "add_bias_linear",
        "add_qkv_bias",
        "swiglu",
        "apply_layernorm_1p",
        "qk_layernorm",
        "untie_embeddings_and_output_weights",
        "moe_router_pre_softmax",
        "bf16",
        "fp16",
    ),
    _NAME: ("adapter_kind",),
    _WINDOW: ("window_size",),
    _FREQUENCY: ("window_attn_skip_freq", "moe_layer_freq"),
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names}

NEEDED = ("num_layers", "hidden_size", "num_attention_heads")
"""What every Megatron checkpoint records; of all other arguments None is a value, or says nothing."""

_SILENT = ("rotary_base", "rope_scaling_factor", "norm_epsilon", "init_method_std", "moe_router_topk", "moe_layer_freq")
"""Arguments that have a value wherever they mean something, so that None says nothing."""

_RENAMED = {"norm_epsilon": "layernorm_epsilon", "apply_layernorm_1p": "layernorm_zero_centered_gamma"}
"""Argument -> its name since Megatron-Core 0.19."""


def read_args(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a checkpoint of any release of Megatron-LM: each under one name, and of the type it must have.

    Raises:
        InputError: One is of another type, or out of range.
    """
    args = dict(stored)
    for name, renamed in _RENAMED.items():
        if args.get(name) is None and args.get(renamed) is not None:
            args[name] = args[renamed]
    if args.get("add_bias_linear") is None and args.get("disable_bias_linear") is not None:  # the oldest releases
        args["add_bias_linear"] = not args["disable_bias_linear"]
    check_types(args)
    return {name: value for name, value in args.items() if value is not None or name not in _SILENT}


def check_types(args: Mapping[str, Any], names: Iterable[str] = tuple(_KIND_OF)) -> None:
    """Whether arguments, as far as they are there, have the types that Megatron-LM gives them.

    Raises:
        InputError: One has not.
    """
    for name in names:
        if name not in args or (args[name] is None and name not in NEEDED):
            continue
        kind = _KIND_OF[name]
        if not kind.holds(args[name]):
            raise InputError(
                f"the checkpoint's args say {name} {args[name]!r}, but it must be {kind.text}",
                hint="correct it, or remove it and give --hf-reference",
            )


class Mismatch(NamedTuple):
    """An argument whose value is not the one that would be written for a model."""

    name: str
    stored: Any
    expected: Any


WRITTEN = (
    "position_embedding_type",
    "rotary_percent",
    "rotary_interleaved",
    "normalization",
    "swiglu",
    "squared_relu",
    "moe_router_score_function",
)
"""Arguments that change the mathematics, and that are written for every model although a `ModelConfig` lacks them."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "multi_latent_attention": (False,),
    "experimental_attention_variant": (None,),
    "attention_output_gate": (False,),
    "softmax_type": ("vanilla",),
    "qk_l2_norm": (False,),
    "no_rope_freq": (None, 0),
    "apply_residual_connection_post_layernorm": (False,),
    "openai_gelu": (False,),
    "quick_geglu": (False,),
    "glu_linear_offset": (0.0,),
    "activation_func_clamp_value": (None,),
    "use_mup": (False,),
}
"""Arguments that change the mathematics in a way that no model has which is converted -> the values that do not.

Not here are those that matter only while a model is trained (dropout, clipping, the capacity of experts), that choose
the precision of a step or scale and unscale (`apply_query_key_layer_scaling`), or that bring tensors of their own,
which no table has.
"""

NEUTRAL_OF_EXPERTS: dict[str, tuple[Any, ...]] = {
    "moe_router_topk_scaling_factor": (None, 1.0),
    "moe_router_enable_expert_bias": (False,),
    "moe_router_group_topk": (None, 0),
    "moe_router_topk_limited_devices": (None, 0),
    "moe_router_load_balancing_type": ("aux_loss", "seq_aux_loss", "global_aux_loss", "none"),
    "moe_router_force_load_balancing": (False,),
    "moe_apply_probs_on_input": (False,),
    "moe_latent_size": (None, 0),
    "moe_mlp_glu_interleave_size": (None, 0),
}
"""The same of models with experts; where there are none, these say nothing."""


def mismatches(args: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> list[Mismatch]:
    """Arguments that have none of the values allowed; those that are absent or None say nothing.

    Args:
        args: Stored arguments.
        allowed: Argument -> its allowed values; a list has to have nothing else in it.
    """
    return [
        Mismatch(name, args[name], values[0])
        for name, values in allowed.items()
        if args.get(name) is not None and not all(item in values for item in _items(args[name]))
    ]


def _items(value: Any) -> list[Any]:
    return list(value) if value and isinstance(value, list | tuple) else [value]
