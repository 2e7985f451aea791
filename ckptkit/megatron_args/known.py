"""Megatron-LM's arguments as checkpoints store them: under which names, and with which types.

A Megatron checkpoint records hundreds of arguments. Checked here are those that describe a model or its grid.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ckptkit.errors import InputError
from ckptkit.megatron_args.fields import FIELDS, GRID_FIELDS
from ckptkit.megatron_args.kinds import COUNT, COUNT_OR_ZERO, FLAG, NAME, Kind

GRID_FLAGS = {
    **{field.ours: field.args for field in GRID_FIELDS if field.kind is FLAG},
    "adapter_first": "adapter_first",
}
"""Field of a grid that is true or false -> the argument that records it."""

_KIND_OF: dict[str, Kind] = {
    **{field.args: field.kind for field in FIELDS if field.args is not None and field.kind is not None},
    **{field.args: field.kind for field in GRID_FIELDS},
    "adapter_first": FLAG,
    "adapter_kind": NAME,
    "adapter_after": COUNT,
    "adapter_hidden_size": COUNT,
    "make_vocab_size_divisible_by": COUNT,
    "hf_model_id": NAME,
    "vocab_size": COUNT_OR_ZERO,
}

NEEDED = ("num_layers", "hidden_size", "num_attention_heads")
"""Arguments in every Megatron checkpoint; all others may be None or absent."""

_NEVER_NONE = (
    "rotary_base",
    "rope_scaling_factor",
    "norm_epsilon",
    "init_method_std",
    "moe_router_topk",
    "moe_layer_freq",
    "ffn_hidden_size",
)
"""Arguments for which None means "not recorded", besides all that are true or false."""

_RENAMED = {"norm_epsilon": "layernorm_epsilon", "apply_layernorm_1p": "layernorm_zero_centered_gamma"}
"""Argument -> its name since Megatron-Core 0.19."""


def read_args(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a checkpoint of any release of Megatron-LM, each under one name and checked.

    Raises:
        InputError: An argument has the wrong type, or is out of range.
    """
    args = dict(stored)
    for name, renamed in _RENAMED.items():
        if args.get(name) is None and args.get(renamed) is not None:
            args[name] = args[renamed]
    if args.get("add_bias_linear") is None and args.get("disable_bias_linear") is not None:  # the oldest releases
        args["add_bias_linear"] = not args["disable_bias_linear"]
    check_types(args)
    unrecorded = {*_NEVER_NONE, *(name for name, kind in _KIND_OF.items() if kind is FLAG)}
    return {name: value for name, value in args.items() if value is not None or name not in unrecorded}


def check_types(args: Mapping[str, Any], names: Iterable[str] = tuple(_KIND_OF)) -> None:
    """Checks that the arguments at hand have the types that Megatron-LM gives them.

    Args:
        args: Stored arguments.
        names: Which of them to check.

    Raises:
        InputError: An argument has another type.
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
