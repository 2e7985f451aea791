"""Megatron-LM's `args`, the flat record of a model that its checkpoints carry, from and to a `ModelConfig`.

Names and meanings are those of `megatron/training/arguments.py`; `--use-checkpoint-args` reads them back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, TypeVar

from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.families import family_called
from ckptkit.megatron_args.known import (
    GRID_ARGS,
    GRID_FLAGS,
    NEEDED,
    NEUTRAL,
    NEUTRAL_OF_EXPERTS,
    WRITTEN,
    Mismatch,
    check_types,
    mismatches,
)
from ckptkit.sharding.grid import Parallelism
from ckptkit.tables.family import Family
from ckptkit.tables.model_config import Adapter, LayerConfig, ModelConfig, Rope
from ckptkit.tables.spelling import GROUPED

_Config = TypeVar("_Config", ModelConfig, LayerConfig, Rope)

_LLAMA3 = Rope(0.0, "llama3")
"""The llama3 rope that Megatron-Core knows: of its four numbers only the factor is an argument."""


def to_args(
    config: ModelConfig, grid: Parallelism, padded_vocab_size: int, divisible_by: int, experts: str = GROUPED
) -> dict[str, Any]:
    """Everything that `args` says of a model on a grid, as plain values.

    Args:
        config: The model.
        grid: The parallel grid of the checkpoint.
        padded_vocab_size: Rows of the stored embedding over all ranks.
        divisible_by: `--make-vocab-size-divisible-by`.
        experts: How expert tensors are named, `grouped` or `sequential`.
    """
    return {
        **_model_args(config),
        **_grid_args(grid),
        **({"moe_grouped_gemm": experts == GROUPED} if config.num_experts else {}),
        **({"adapter_first": grid.adapter_first} if config.adapter is not None else {}),
        "padded_vocab_size": padded_vocab_size,
        "vocab_size": config.vocab_size,
        "make_vocab_size_divisible_by": divisible_by,
    }


def _model_args(config: ModelConfig) -> dict[str, Any]:
    layer, rope = config.layers[-1 if config.adapter is not None else 0], _main_rope(config)
    biased = config.qkv_bias and config.out_bias and config.mlp_bias
    return {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": layer.ffn_hidden_size,
        "seq_length": config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": layer.num_heads,
        "group_query_attention": layer.num_kv_heads != layer.num_heads,
        "num_query_groups": layer.num_kv_heads,
        "kv_channels": layer.head_dim,
        "position_embedding_type": "rope",
        "add_position_embedding": True,
        "use_rotary_position_embeddings": True,
        "rotary_base": _whole(rope.theta),
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "rotary_seq_len_interpolation_factor": rope.factor if rope.kind == "linear" else None,
        "use_rope_scaling": rope.kind == "llama3",
        "rope_scaling_factor": rope.factor if rope.kind == "llama3" else 8.0,
        "add_bias_linear": biased,
        "add_qkv_bias": config.qkv_bias,
        "swiglu": config.gated and config.activation == "silu",
        "squared_relu": False,
        "normalization": "RMSNorm",
        "norm_epsilon": config.norm_eps,
        "apply_layernorm_1p": config.zero_centered_norms,
        "qk_layernorm": config.qk_norm,
        "untie_embeddings_and_output_weights": not config.tied,
        "apply_query_key_layer_scaling": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": config.init_std,
        "softmax_scale": config.softmax_scale,
        **_window_args(config),
        **_expert_args(config),
        **_adapter_args(config),
        **_family_args(config),
        "bf16": config.dtype == "bfloat16",
        "fp16": config.dtype == "float16",
    }


def _main_rope(config: ModelConfig) -> Rope:
    """The rotary embedding that `args` tell of: that of the layers that see everything, if there are any."""
    return next((layer.rope for layer in config.layers if layer.window is None), config.layers[0].rope)


def _window_args(config: ModelConfig) -> dict[str, Any]:
    """Megatron counts the tokens left of the current one, and marks layers with a window by 1."""
    windows = [layer.window for layer in config.layers]
    window = next((window for window in windows if window is not None), None)
    return {
        "window_size": None if window is None else (window - 1, 0),
        "window_attn_skip_freq": None if len(set(windows)) == 1 else [int(window is not None) for window in windows],
    }


def _expert_args(config: ModelConfig) -> dict[str, Any]:
    if not config.num_experts:
        return {"num_experts": None}
    moe, shared = [int(layer.moe) for layer in config.layers], config.layers[0].ffn_hidden_size
    return {
        "num_experts": config.num_experts,
        "moe_layer_freq": 1 if all(moe) else moe,
        "moe_ffn_hidden_size": config.moe_ffn_hidden_size,
        "moe_router_topk": config.experts_per_token,
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": not config.norm_topk_prob,
        **({"moe_shared_expert_intermediate_size": shared} if config.parallel_dense else {}),
    }


def _family_args(config: ModelConfig) -> dict[str, Any]:
    """What only the model's family speaks of; under its own names, as Megatron-LM has none for it."""
    own = family_called(config.family).args
    return own(config) if own is not None else {}


def _adapter_args(config: ModelConfig) -> dict[str, Any]:
    """No arguments of Megatron-LM: what a reader needs to see that all others speak of the wide layers."""
    if config.adapter is None:
        return {}
    return {f"adapter_{field.name}": getattr(config.adapter, field.name) for field in fields(Adapter)}


def _grid_args(grid: Parallelism) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": grid.tp,
        "pipeline_model_parallel_size": grid.pp,
        "virtual_pipeline_model_parallel_size": grid.vpp if grid.vpp > 1 else None,
        "num_layers_per_virtual_pipeline_stage": None,
        "decoder_first_pipeline_num_layers": grid.first_stage_layers,
        "decoder_last_pipeline_num_layers": grid.last_stage_layers,
        "account_for_embedding_in_pipeline_split": grid.embedding_in_split,
        "account_for_loss_in_pipeline_split": grid.loss_in_split,
        "expert_model_parallel_size": grid.ep,
        "expert_tensor_parallel_size": grid.expert_tp,
    }


def grid_of(args: Mapping[str, Any]) -> Parallelism:
    """The grid that a checkpoint's `args` describe.

    Raises:
        InputError: A size is no size.
        UnsupportedError: They are sizes of no grid that `Parallelism` knows.
    """
    check_types(args, (*GRID_ARGS.values(), *GRID_FLAGS.values()))
    sizes: dict[str, Any] = {size: args[name] for size, name in GRID_ARGS.items() if args.get(name) is not None}
    flags = {flag: bool(args.get(name)) for flag, name in GRID_FLAGS.items()}
    if sizes.get("etp") == sizes.get("tp", 1):
        sizes.pop("etp", None)
    try:
        return Parallelism(**sizes, **flags)
    except UsageError as error:
        raise UnsupportedError(f"the checkpoint's args tell of a grid that is not supported ({error.what})") from None


def from_args(args: Mapping[str, Any], base: ModelConfig) -> ModelConfig:
    """`base` with whatever `args` say differently.

    A field changes only where `args` contradict what `base` itself would have written, so that what `args` cannot
    express (low and high rope factors, an output bias alone) survives.

    Args:
        args: Stored arguments; absent ones do not speak.
        base: The model as its config.json describes it.

    Raises:
        InputError: An argument has a value that Megatron-LM would not accept.
    """
    told = _model_args(base)
    heard = {**told, **{key: args[key] for key in (*told, *_EXPERT_ARGS) if key in args}}
    with _sense():
        before, after = _config(told, base), _config(heard, base)
    layers = after.layers
    if before.num_layers == after.num_layers:
        layers = tuple(map(_changed, base.layers, before.layers, after.layers))
    config = replace(_changed(base, before, after), layers=layers)
    own = _family_args(base)
    return config if all(heard[key] == value for key, value in own.items()) else _as_told(heard, config)


@contextmanager
def _sense() -> Iterator[None]:
    """What fails in here fails because arguments contradict one another, as a list that is shorter than the model."""
    try:
        yield
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ZeroDivisionError) as error:
        raise InputError(f"the checkpoint's args make no sense ({error})", hint="give --hf-reference") from None


def _as_told(args: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    """`config` with what `args` say that only its family speaks of.

    Raises:
        InputError: They make no sense.
    """
    found = family_called(config.family)
    assert found.from_args is not None
    raw = found.unparse(config, {})
    text = raw[found.sizes_in] if found.sizes_in else raw
    text.update(found.from_args(args, [layer.window for layer in config.layers]))
    return found.parse(raw)


def contradictions(args: Mapping[str, Any], config: ModelConfig) -> list[Mismatch]:
    """Arguments that change the mathematics and tell of another model than `config`, which has no field for them.

    Args:
        args: Stored arguments; absent ones do not speak.
        config: The model.
    """
    told, rope = _model_args(config), _main_rope(config)
    allowed = {**NEUTRAL, **(NEUTRAL_OF_EXPERTS if config.num_experts else {})}
    allowed.update((name, (told[name],)) for name in WRITTEN if name in told)
    if rope.kind == "yarn" and args.get("position_embedding_type") == "yarn":  # what Megatron-LM says of it since 0.19
        allowed.update(_yarn_args(rope))
    return mismatches(args, allowed)


def _yarn_args(rope: Rope) -> dict[str, tuple[Any, ...]]:
    """What Megatron-LM's arguments may be for a yarn rope.

    Without an attention factor, transformers and Megatron-Core derive the same from the two mscales; where config.json
    has none, the default of Megatron-LM's arguments, 1 and 0, gives what transformers does then.
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


def model_from_args(args: Mapping[str, Any], family: str, architecture: str, vocab_size: int) -> ModelConfig:
    """The model that `args` alone describe; what they do not speak of is as in a config.json that says nothing of it.

    Raises:
        InputError: An argument that every Megatron checkpoint records is absent, or makes no sense.
        UnsupportedError: config.json of the family has no words for what they say.
    """
    if missing := [key for key in NEEDED if not isinstance(args.get(key), int)]:
        raise InputError(f"the checkpoint's args lack {', '.join(missing)}", hint="give --hf-reference")
    found = family_called(family)
    base = found.parse(_raw_config(args, found, vocab_size))
    config = from_args(args, replace(base, architecture=architecture, dtype="float32"))
    said = found.parse(found.unparse(config, {}))
    if unlike := [*_unsaid(config, said), *contradictions(args, said)]:
        texts = (f"{one.name} is {one.stored!r}, not {one.expected!r}" for one in unlike)
        raise UnsupportedError(
            f"the checkpoint's args describe no {architecture}: {'; '.join(texts)}",
            hint="where they are wrong, give --hf-reference with the right config.json, which outranks them",
        )
    # No argument speaks of the output bias alone; in config.json it comes with those of q, k and v, or never.
    return replace(config, out_bias=said.out_bias)


def _raw_config(args: Mapping[str, Any], family: Family, vocab_size: int) -> dict[str, Any]:
    """A config.json with the sizes that `args` tell, which `from_args` then corrects."""
    hidden, heads = args["hidden_size"], args["num_attention_heads"]
    sizes = {
        "num_hidden_layers": args["num_layers"],
        "hidden_size": hidden,
        "vocab_size": vocab_size,
        "num_attention_heads": heads,
        "num_key_value_heads": args.get("num_query_groups") if args.get("group_query_attention", True) else heads,
        "head_dim": args.get("kv_channels") or hidden // heads,
        "intermediate_size": args.get("ffn_hidden_size") or 4 * hidden,
        "max_position_embeddings": args.get("max_position_embeddings") or args.get("seq_length") or 2048,
    }
    if family.from_args is not None:
        silent = {"window_size": None, "window_attn_skip_freq": None}
        with _sense():
            windows = [_window({**silent, **args}, number) for number in range(args["num_layers"])]
        sizes.update(family.from_args(args, windows))
    return {family.sizes_in: sizes} if family.sizes_in else sizes


def _unsaid(config: ModelConfig, said: ModelConfig) -> list[Mismatch]:
    """Arguments of a model that are others for what its config.json says."""
    stored, expected = _model_args(config), _model_args(said)
    return [
        Mismatch(name, value, expected.get(name))
        for name, value in stored.items()
        if name not in ("bf16", "fp16") and not _same(value, expected.get(name))
    ]


def _same(value: Any, other: Any) -> bool:
    """Whether two values are equal, but for the rounding of numbers: some are stored as their square, or in fp32."""
    if isinstance(value, float) and isinstance(other, float):
        return math.isclose(value, other, rel_tol=1e-6)
    return bool(value == other)


_EXPERT_ARGS = ("moe_layer_freq", "moe_ffn_hidden_size", "moe_router_topk", "moe_router_pre_softmax")
"""What `args` say of experts, if there are any."""


def _config(args: Mapping[str, Any], base: ModelConfig) -> ModelConfig:
    """`args` as a model; fields that no argument carries come from `base`."""
    biased = bool(args["add_bias_linear"])
    experts = args["num_experts"] or 0
    return replace(
        base,
        hidden_size=args["hidden_size"],
        layers=tuple(_layer(args, base, number) for number in range(args["num_layers"])),
        tied=not args["untie_embeddings_and_output_weights"],
        norm_eps=float(args["norm_epsilon"]),
        max_position_embeddings=args["max_position_embeddings"] or base.max_position_embeddings,
        qkv_bias=biased or bool(args["add_qkv_bias"]),
        out_bias=biased,
        mlp_bias=biased,
        qk_norm=bool(args["qk_layernorm"]),
        zero_centered_norms=bool(args["apply_layernorm_1p"]),
        softmax_scale=_softmax_scale(args),
        activation="silu" if args["swiglu"] else base.activation,
        gated=bool(args["swiglu"]) or base.gated,
        init_std=float(args["init_method_std"]),
        dtype="bfloat16" if args["bf16"] else "float16" if args["fp16"] else "float32",
        num_experts=experts,
        experts_per_token=args.get("moe_router_topk", 2) if experts else 0,
        moe_ffn_hidden_size=(args.get("moe_ffn_hidden_size") or args["ffn_hidden_size"]) if experts else 0,
        norm_topk_prob=not (experts and args.get("moe_router_pre_softmax")),
        adapter=_adapter(args),
    )


def _adapter(args: Mapping[str, Any]) -> Adapter | None:
    if args.get("adapter_kind") is None:
        return None
    return Adapter(args["adapter_kind"], args["adapter_after"], args["adapter_hidden_size"])


def _layer(args: Mapping[str, Any], base: ModelConfig, number: int) -> LayerConfig:
    """One layer; more layers than `base` has are like its last one."""
    known = base.layers[min(number, base.num_layers - 1)]
    heads = args["num_attention_heads"]
    kv_heads = args["num_query_groups"] if args["group_query_attention"] else heads
    return replace(
        known,
        num_heads=heads,
        num_kv_heads=kv_heads or heads,
        head_dim=_head_dim(args),
        ffn_hidden_size=args["ffn_hidden_size"] or 4 * args["hidden_size"],
        rope=_rope(args) if known.rope == _main_rope(base) else known.rope,
        window=_window(args, number),
        moe=bool(args["num_experts"]) and _has_experts(args.get("moe_layer_freq", 1), number),
    )


def _softmax_scale(args: Mapping[str, Any]) -> float | None:
    """The factor on attention scores; None for the usual one, which some write out."""
    scale, usual = args["softmax_scale"], _head_dim(args) ** -0.5
    return None if scale is None or _same(float(scale), usual) else float(scale)


def _head_dim(args: Mapping[str, Any]) -> int:
    return int(args["kv_channels"] or args["hidden_size"] // args["num_attention_heads"])


def _window(args: Mapping[str, Any], number: int) -> int | None:
    """Source: `is_layer_window_attention` of Megatron-Core."""
    size, skip = args["window_size"], args["window_attn_skip_freq"]
    if not size or size[0] < 0:
        return None
    if skip is None:
        return int(size[0]) + 1
    slides = (number + 1) % skip if isinstance(skip, int) else skip[number]
    return int(size[0]) + 1 if slides else None


def _has_experts(frequency: Any, number: int) -> bool:
    """Source: `get_gpt_decoder_block_spec` of Megatron-Core."""
    return number % frequency == 0 if isinstance(frequency, int) else bool(frequency[number])


def _rope(args: Mapping[str, Any]) -> Rope:
    theta = float(args["rotary_base"])
    if args["use_rope_scaling"]:
        return replace(_LLAMA3, theta=theta, factor=float(args["rope_scaling_factor"]))
    if args["rotary_seq_len_interpolation_factor"]:
        return Rope(theta, "linear", float(args["rotary_seq_len_interpolation_factor"]))
    return Rope(theta)


def _changed(base: _Config, before: _Config, after: _Config) -> _Config:
    """`base` with the fields in which `after` differs from `before`."""
    changes: dict[str, Any] = {}
    for name in (field.name for field in fields(base) if field.name != "layers"):
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            changes[name] = _changed(getattr(base, name), old, new) if isinstance(new, Rope) else new
    return replace(base, **changes)


def _whole(value: float) -> float | int:
    """Whole numbers as integers, as Megatron's parser stores them."""
    return int(value) if float(value).is_integer() else value


def inexpressible(config: ModelConfig) -> list[str]:
    """What stock Megatron-Core's GPTModel has no argument for, as sentences."""
    notes = [note for rope in dict.fromkeys(layer.rope for layer in config.layers) if (note := _rope_note(rope))]
    if len({layer.rope for layer in config.layers}) > 1:
        notes.append("layers with different rotary embeddings: Megatron-LM has one for all")
    if len({layer.window for layer in config.layers} - {None}) > 1:
        notes.append("windows of different sizes: Megatron-LM has one size, on some layers or on all")
    if (config.qkv_bias, config.out_bias, config.mlp_bias) not in (
        (False, False, False),
        (True, False, False),
        (True, True, True),
    ):
        notes.append("biases on some linear layers only: Megatron-LM has --add-qkv-bias or all of them")
    if config.activation != "silu" or not config.gated:
        kind = "a gated MLP" if config.gated else "an MLP"
        notes.append(f"{kind} with {config.activation} has no single argument in Megatron-LM")
    if config.adapter is not None:
        widths = f"{config.adapter.hidden_size} and {config.hidden_size}"
        notes.append(f"layers of the widths {widths} with an adapter between them: Megatron-LM has one width")
    features = {
        "norms after attention and MLP": config.post_norms,
        f"embeddings multiplied by {config.embedding_scale:g}": config.scaled_embedding,
        f"attention scores multiplied by {config.softmax_scale}": config.softmax_scale is not None,
        f"attention scores capped at {config.attention_softcap}": config.attention_softcap is not None,
        f"logits capped at {config.logit_softcap}": config.logit_softcap is not None,
        **_inexpressible_layers(config),
        "one value per token in place of logits": config.value_head,
    }
    return [*notes, *(f"{text}: no argument in Megatron-LM" for text, present in features.items() if present)]


def _inexpressible_layers(config: ModelConfig) -> dict[str, bool]:
    """Feature -> whether some layers have it; Megatron-LM builds all layers alike."""
    heads = {(layer.num_heads, layer.head_dim, layer.num_kv_heads) for layer in config.layers}
    widths = {layer.ffn_hidden_size for layer in config.layers}
    streams = {layer.hidden_size or config.hidden_size for layer in config.layers} | {config.hidden_size}
    epsilons = {layer.norm_eps or config.norm_eps for layer in config.layers} | {config.norm_eps}
    return {
        "layers of another width than the model's": config.adapter is None and len(streams) > 1,
        "norms with different epsilons": len(epsilons) > 1,
        "attention heads that differ between layers": config.adapter is None and len(heads) > 1,
        "MLPs whose width differs between layers": config.adapter is None and len(widths) > 1,
        "values without a projection of their own": any(layer.k_eq_v for layer in config.layers),
        "layers that use the keys and values of another": any(layer.kv_donor is not None for layer in config.layers),
        "normalised values": config.value_norm,
        "experts beside a dense MLP with norms of its own": config.parallel_dense,
        "learned scales in the router": config.router_scales,
        "layers multiplied by a learned number": config.layer_scalars,
        "embeddings for each layer": config.per_layer_input_size > 0,
    }


def _rope_note(rope: Rope) -> str | None:
    if rope.kind == "llama3" and replace(_LLAMA3, theta=rope.theta, factor=rope.factor) != rope:
        return (
            f"llama3 rope with low/high/original {rope.low_freq_factor}/{rope.high_freq_factor}/"
            f"{rope.original_max_position}: Megatron-Core always takes 1/4/8192"
        )
    if rope.kind not in ("default", "linear", "llama3"):
        since = (
            " that --use-checkpoint-args restores (0.19 has some on its command line)" if rope.kind == "yarn" else ""
        )
        return f"{rope.kind} rope has no argument in Megatron-LM{since}"
    return None
