"""A `ModelConfig` and a grid from Megatron-LM's `args`.

A config.json says more than `args`, so `args` are read as changes to a model that is known otherwise. Where nothing
else is known, that model is what config.json would mean with the sizes in `args` and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, TypeVar

from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.megatron_args.contradictions import Mismatch, contradictions
from ckptkit.megatron_args.fields import (
    BEYOND_PLAIN_FIELDS,
    CORE_FIELDS,
    DELTA_ARGS,
    EXPERT_FIELDS,
    GATE_FIELDS,
    GATED_DELTA_NET,
    GRID_ARGS,
    GRID_FIELDS,
    LATENT_ARGS,
    PREDICTION_FIELDS,
    SCORE_FIELDS,
    SHARED_EXPERT_FIELDS,
    SHARED_GATE_FIELDS,
    delta_of,
    main_rope,
    read,
)
from ckptkit.megatron_args.kinds import FLAG
from ckptkit.megatron_args.known import GRID_FLAGS, NEEDED, check_types
from ckptkit.megatron_args.writing import family_args, model_args
from ckptkit.sharding.grid import Parallelism
from ckptkit.tables.family import Family
from ckptkit.tables.model_config import SOFTMAX, Adapter, DeltaNet, LatentAttention, LayerConfig, ModelConfig, Rope

_GATED = "gated_linear_unit"
_Config = TypeVar("_Config", ModelConfig, LayerConfig, Rope)


def grid_of(args: Mapping[str, Any]) -> Parallelism:
    """The grid that a checkpoint's `args` describe.

    Raises:
        InputError: A size is not a positive integer, or the pipeline layout makes no sense or contradicts the sizes.
        UnsupportedError: `Parallelism` does not know such a grid.
    """
    check_types(args, (*GRID_ARGS.values(), *GRID_FLAGS.values()))
    stated = [field for field in GRID_FIELDS if field.kind is not FLAG and args.get(field.args) is not None]
    flags: dict[str, Any] = {flag: bool(args.get(name)) for flag, name in GRID_FLAGS.items()}
    try:
        sizes: dict[str, Any] = {field.ours: field.kind.read(args[field.args]) for field in stated}
        if sizes.get("etp") == sizes.get("tp", 1):
            sizes.pop("etp", None)
        return Parallelism(**sizes, **flags)
    except UsageError as error:
        if args.get(GRID_ARGS["pipeline_layout"]) is not None:
            raise InputError(f"the checkpoint's args contradict themselves: {error.what}") from None
        raise UnsupportedError(f"the checkpoint's args describe an unsupported grid ({error.what})") from None


def from_args(family: Family, args: Mapping[str, Any], base: ModelConfig) -> ModelConfig:
    """`base` with whatever `args` say differently.

    A field changes only where `args` contradict what `base` itself would have written, so that what `args` cannot
    express (low and high rope factors, an output bias alone) survives.

    Args:
        family: The model's family.
        args: Stored arguments; one that is absent changes nothing.
        base: The model as its config.json describes it.

    Raises:
        InputError: Megatron-LM would not accept the value of an argument.
    """
    expected = model_args(family, base)
    known = (*EXPERT_FIELDS, *SCORE_FIELDS, *SHARED_EXPERT_FIELDS, *SHARED_GATE_FIELDS, *PREDICTION_FIELDS)
    of_experts = (field.args for field in known if field.args is not None)
    stored = {**expected, **{name: args[name] for name in (*expected, *of_experts) if name in args}}
    if _GATED in args:
        stored[_GATED] = args[_GATED]
    if "num_query_groups" in args and "group_query_attention" not in args:
        stored["group_query_attention"] = args["num_query_groups"] is not None
    with _sense():
        before, after = _config(expected, base), _config(stored, base)
    layers = after.layers
    if before.num_layers == after.num_layers:
        layers = tuple(map(_changed, base.layers, before.layers, after.layers))
    config = replace(_changed(base, before, after), layers=layers)
    if all(stored[name] == value for name, value in family_args(family, base).items()):
        return config
    return _with_family_args(family, stored, config)


@contextmanager
def _sense() -> Iterator[None]:
    """Turns errors of Python into one about `args` that contradict one another, as a list shorter than the model."""
    try:
        yield
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ZeroDivisionError) as error:
        raise InputError(f"the checkpoint's args make no sense ({error})", hint="give --hf-reference") from None


def _with_family_args(family: Family, args: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    """`config` with the arguments that only its family has.

    Raises:
        InputError: They make no sense.
    """
    assert family.quirks.from_args is not None
    raw = family.unparse(config, {})
    text = raw[family.sizes_in] if family.sizes_in else raw
    text.update(family.quirks.from_args(args, [layer.window for layer in config.layers]))
    return family.parse(raw)


def model_from_args(family: Family, args: Mapping[str, Any], vocab_size: int) -> ModelConfig:
    """Builds the model from `args` alone. Anything they do not record gets the config class's default.

    Args:
        family: The model's family; the model gets its first architecture.
        args: Stored arguments.
        vocab_size: Rows of the embedding, without padding.

    Raises:
        InputError: An argument that every Megatron checkpoint records is absent, or makes no sense.
        UnsupportedError: No config.json of the family can describe this model.
    """
    if missing := [name for name in NEEDED if not isinstance(args.get(name), int)]:
        raise InputError(f"the checkpoint's args lack {', '.join(missing)}", hint="give --hf-reference")
    base = family.parse(_raw_config(family, args, vocab_size))
    architecture = family.architectures[0]
    config = from_args(family, args, replace(base, architecture=architecture, dtype="float32"))
    if config.num_experts and config.experts_per_token > config.num_experts:
        raise InputError(
            f"the checkpoint's args say moe_router_topk {config.experts_per_token} of num_experts {config.num_experts}",
            hint="give --hf-reference",
        )
    # How many of these layers there are the tensors say, not config.json.
    back = replace(family.parse(family.unparse(config, {})), mtp_layers=config.mtp_layers)
    if unlike := [*_lost(family, config, back), *contradictions(args, back)]:
        texts = (f"{one.name} is {one.stored!r}, not {one.expected!r}" for one in unlike)
        raise UnsupportedError(
            f"the checkpoint's args describe no {architecture}: {'; '.join(texts)}",
            hint="where they are wrong, give --hf-reference with the right config.json, which outranks them",
        )
    # No argument records the output bias alone; in config.json it comes with those of q, k and v, or never.
    return replace(config, out_bias=back.out_bias)


def _raw_config(family: Family, args: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """A config.json with the sizes in `args`, which `from_args` then corrects."""
    hidden, heads = args["hidden_size"], args["num_attention_heads"]
    latent = args.get("multi_latent_attention")
    sizes = {
        "num_hidden_layers": args["num_layers"],
        "hidden_size": hidden,
        "vocab_size": vocab_size,
        "num_attention_heads": heads,
        "num_key_value_heads": (
            args.get("num_query_groups") if args.get("group_query_attention", True) and not latent else heads
        ),
        "head_dim": args.get("kv_channels") or hidden // heads,
        "intermediate_size": _ffn_hidden_size({"ffn_hidden_size": None, "swiglu": False, **args}),
        "max_position_embeddings": args.get("max_position_embeddings") or args.get("seq_length") or 2048,
    }
    if args.get("rotary_percent") is not None:
        sizes["partial_rotary_factor"] = args["rotary_percent"]  # of the families that know such a key
    if family.quirks.from_args is not None:
        without = {"window_size": None, "window_attn_skip_freq": None}
        with _sense():
            windows = [_window({**without, **args}, number) for number in range(args["num_layers"])]
        sizes.update(family.quirks.from_args(args, windows))
    return {family.sizes_in: sizes} if family.sizes_in else sizes


def _lost(family: Family, config: ModelConfig, back: ModelConfig) -> list[Mismatch]:
    """Arguments that a trip through config.json would change.

    Args:
        family: The models' family.
        config: The model before the trip.
        back: The model after it.
    """
    stored, expected = model_args(family, config), model_args(family, back)
    return [
        Mismatch(name, value, expected.get(name))
        for name, value in stored.items()
        if name not in ("bf16", "fp16") and not _same(value, expected.get(name))
    ]


def _same(value: Any, other: Any) -> bool:
    """Whether two values are equal up to the rounding of numbers: some are stored as their square, or in fp32."""
    if isinstance(value, float) and isinstance(other, float):
        return math.isclose(value, other, rel_tol=1e-6)
    return bool(value == other)


def _config(args: Mapping[str, Any], base: ModelConfig) -> ModelConfig:
    """`args` as a model; fields that no argument carries come from `base`."""
    biased = bool(args["add_bias_linear"])
    changes = {
        **read(CORE_FIELDS, args, ModelConfig),
        **read(BEYOND_PLAIN_FIELDS, args, ModelConfig),
        **_experts(args, base),
        **read(GATE_FIELDS, args, ModelConfig),
        **read(PREDICTION_FIELDS, args, ModelConfig),
        "latent": _latent(args, base.latent),
        "layers": tuple(_layer(args, base, number) for number in range(args["num_layers"])),
        "max_position_embeddings": args["max_position_embeddings"] or base.max_position_embeddings,
        "qkv_bias": biased or bool(args["add_qkv_bias"]),
        "out_bias": biased,
        "mlp_bias": biased,
        "softmax_scale": _softmax_scale(args),
        "activation": "silu" if args["swiglu"] else base.activation,
        # Megatron-LM has no argument for other gated activations than SiLU; Megatron-Bridge has a field for all.
        "gated": bool(args["swiglu"] or args.get(_GATED)) or (base.gated and base.activation != "silu"),
        "dtype": "bfloat16" if args["bf16"] else "float16" if args["fp16"] else "float32",
        "adapter": _adapter(args),
    }
    return replace(base, **changes)


def _experts(args: Mapping[str, Any], base: ModelConfig) -> dict[str, Any]:
    """The fields of experts; those of a model without experts, where there are none."""
    shared = () if base.parallel_dense else (*SHARED_EXPERT_FIELDS, *SHARED_GATE_FIELDS)
    known = (*EXPERT_FIELDS, *SCORE_FIELDS, *shared)
    rows = [field for field in known if field.ours is not None]
    if not args["num_experts"]:
        defaults = {field.name: field.default for field in fields(ModelConfig)}
        return {"num_experts": 0, **{row.ours: defaults[row.ours] for row in rows if row.ours is not None}}
    stated = {name: value for name, value in read(rows, args, ModelConfig).items() if value is not None}
    if stated.get("router_score", SOFTMAX) != SOFTMAX:
        stated.pop("norm_topk_prob", None)  # it scales the weights of a sigmoid whatever the order is
    if not args.get("moe_router_group_topk"):
        stated.update(router_groups=1, router_groups_chosen=1)
    found = {"experts_per_token": 2, "norm_topk_prob": True, **stated, "num_experts": args["num_experts"]}
    return {**found, "moe_ffn_hidden_size": found.get("moe_ffn_hidden_size") or _ffn_hidden_size(args)}


def _latent(args: Mapping[str, Any], base: LatentAttention | None) -> LatentAttention | None:
    if not args.get("multi_latent_attention"):
        return None
    sizes: dict[str, Any] = {ours: args[name] for ours, name in LATENT_ARGS.items()}
    if base is not None:
        sizes["norm_eps"] = base.norm_eps
    return LatentAttention(**sizes)


def _adapter(args: Mapping[str, Any]) -> Adapter | None:
    if args.get("adapter_kind") is None:
        return None
    return Adapter(args["adapter_kind"], args["adapter_after"], args["adapter_hidden_size"])


def _layer(args: Mapping[str, Any], base: ModelConfig, number: int) -> LayerConfig:
    """One layer; more layers than `base` has are like its last one."""
    known = base.layers[min(number, base.num_layers - 1)]
    heads = args["num_attention_heads"]
    grouped = args["group_query_attention"] and not args.get("multi_latent_attention")
    kv_heads = args["num_query_groups"] if grouped else heads
    moe = bool(args["num_experts"]) and _has_experts(args.get("moe_layer_freq", 1), number)
    changes = {
        **read(CORE_FIELDS, args, LayerConfig),
        "num_kv_heads": kv_heads or heads,
        "head_dim": _head_dim(args),
        "ffn_hidden_size": _unused_width(args, base, known, moe) or _ffn_hidden_size(args),
        "rope": _rope(args) if known.rope == main_rope(base) else known.rope,
        "window": _window(args, number),
        "delta": _delta(args, base, number),
        "moe": moe,
    }
    return replace(known, **changes)


def _unused_width(args: Mapping[str, Any], base: ModelConfig, known: LayerConfig, moe: bool) -> int | None:
    """The width of a dense MLP that no layer of the family has (Qwen3.5), whatever width `args` say; else None."""
    never_dense = base.shared_expert_gate and known.moe and known.ffn_hidden_size == base.moe_ffn_hidden_size
    return (args.get("moe_ffn_hidden_size") or known.ffn_hidden_size) if moe and never_dense else None


def _delta(args: Mapping[str, Any], base: ModelConfig, number: int) -> DeltaNet | None:
    """The DeltaNet of a layer. Source: `get_linear_attention_pattern` of Megatron-Core."""
    if args.get("experimental_attention_variant") != GATED_DELTA_NET:
        return None
    frequency = args["linear_attention_freq"]
    if not ((number + 1) % frequency if isinstance(frequency, int) else frequency[number]):
        return None
    known = delta_of(base)
    sizes = {ours: args.get(name, getattr(known, ours, None)) for ours, name in DELTA_ARGS.items()}
    return DeltaNet(**sizes)


def _softmax_scale(args: Mapping[str, Any]) -> float | None:
    """The factor on attention scores; None for the usual one, which some writers spell out."""
    scale, usual = args["softmax_scale"], _head_dim(args) ** -0.5
    return None if scale is None or _same(float(scale), usual) else float(scale)


def _head_dim(args: Mapping[str, Any]) -> int:
    if args.get("multi_latent_attention"):
        return int(args["v_head_dim"])
    return int(args["kv_channels"] or args["hidden_size"] // args["num_attention_heads"])


def _ffn_hidden_size(args: Mapping[str, Any]) -> int:
    """Source: `validate_args` of Megatron-LM, which makes a gated MLP about as large as one that is not."""
    hidden = args["hidden_size"]
    return int(args["ffn_hidden_size"] or (8 * hidden // 3 // 64 * 64 if args["swiglu"] else 4 * hidden))


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
    if args.get("multi_latent_attention") and args.get("rope_type") == "yarn":
        factor, mscale, of_all = (float(args[name]) for name in ("rotary_scaling_factor", "mscale", "mscale_all_dim"))
        return Rope(theta, "yarn", factor, original_max_position=4096, mscale=mscale, mscale_all_dim=of_all)
    if args["use_rope_scaling"]:
        return Rope(theta, "llama3", float(args["rope_scaling_factor"]))
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
