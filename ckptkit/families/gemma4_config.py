"""The config.json of Gemma 4, in both dialects and both ways.

transformers up to 5.14 writes the sizes of full attention layers as `global_head_dim` and `num_global_key_value_heads`.
From 5.15 on it writes the values that single layers override as `per_layer_config`; a file that has this key is read by
it alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckptkit.errors import InputError, UnsupportedError
from ckptkit.families.wrapper import Wrapper
from ckptkit.tables.config_fields import FULL, SLIDING, Fields, object_in, parse_rope, rope_fields
from ckptkit.tables.config_json import ConfigJson, layer_types_of, window_of
from ckptkit.tables.model_config import LayerConfig, ModelConfig, Rope
from ckptkit.tables.rows import Raw

DEFAULTS = {
    "vocab_size": 262144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "sliding_window": 512,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": None,
    "vocab_size_per_layer_input": 262144,
    "hidden_size_per_layer_input": 256,
    "attention_k_eq_v": False,
    "num_kv_shared_layers": 0,
    "enable_moe_block": False,
    "use_double_wide_mlp": False,
    "num_experts": None,
    "top_k_experts": None,
    "moe_intermediate_size": None,
}
OLD_DEFAULTS = {"global_head_dim": 512, "num_global_key_value_heads": None}
"""Class defaults of the keys that only the older dialect has."""
PATTERN = 6
"""Every sixth layer has no window, unless config.json has other layer types."""
ROPES = {FULL: Rope(1000000.0, "proportional", partial=0.25), SLIDING: Rope(10000.0)}

CONFIG = ConfigJson("gemma4_text", "Gemma4ForCausalLM", "gemma4_text", DEFAULTS, ROPES[FULL])


@dataclass(frozen=True)
class _Heads:
    """The sizes in which the two types of attention layers differ."""

    head_dim: int
    num_kv_heads: int


def parse_text(raw: Raw) -> ModelConfig:
    """Translates the config.json of a Gemma 4 text model.

    Raises:
        InputError: A field is missing, of the wrong type, or contradicts another.
        UnsupportedError: The model is bidirectional, or a layer overrides a value that no release overrides.
    """
    fields = CONFIG.fields(raw)
    if fields.get("use_bidirectional_attention") not in (None, "vision"):
        raise UnsupportedError(
            f"Gemma 4 with use_bidirectional_attention {fields.get('use_bidirectional_attention')!r}",
            hint="only models that are causal on text are converted",
        )
    config = CONFIG.decoder(raw)
    types = _layer_types(fields, config.num_layers)
    return replace(
        config,
        layers=_layers(fields, config, types),
        qk_norm=True,
        value_norm=True,
        post_norms=True,
        scaled_embedding=True,
        softmax_scale=1.0,
        layer_scalars=True,
        logit_softcap=fields.number_or_none("final_logit_softcapping"),
        **_per_layer_inputs(fields),
        **_experts(fields),
    )


def _layer_types(fields: Fields, num_layers: int) -> list[str]:
    """The types of all layers; transformers gives the last one full attention, even against the file."""
    default = [SLIDING if (number + 1) % PATTERN else FULL for number in range(num_layers)]
    return [*fields.layer_types(default)[:-1], FULL]


def _per_layer_inputs(fields: Fields) -> dict[str, Any]:
    size = fields.get("hidden_size_per_layer_input")
    if type(size) is not int or size < 0:
        raise InputError(f"config.json: hidden_size_per_layer_input must be a number of columns or 0, not {size!r}")
    if not size:
        return {}
    return {"per_layer_input_size": size, "per_layer_vocab_size": fields.integer("vocab_size_per_layer_input")}


def _experts(fields: Fields) -> dict[str, Any]:
    if not fields.flag("enable_moe_block"):
        return {}
    experts, chosen = fields.integer("num_experts"), fields.integer("top_k_experts")
    if chosen > experts:
        raise InputError(f"config.json: top_k_experts {chosen} of num_experts {experts}")
    return {
        "num_experts": experts,
        "experts_per_token": chosen,
        "moe_ffn_hidden_size": fields.integer("moe_intermediate_size"),
        "norm_topk_prob": True,
        "parallel_dense": True,
        "router_scales": True,
    }


def _layers(fields: Fields, config: ModelConfig, types: Sequence[str]) -> tuple[LayerConfig, ...]:
    heads, ropes, donors = _heads(fields, types), _ropes(fields.raw), _donors(fields, types)
    window, k_eq_v = fields.integer("sliding_window"), fields.flag("attention_k_eq_v")
    double, moe = fields.flag("use_double_wide_mlp"), fields.flag("enable_moe_block")
    base = config.layers[0]
    for kind, sizes in heads.items():
        if base.num_heads % sizes.num_kv_heads:
            raise InputError(
                f"config.json: {base.num_heads} attention heads are not a multiple of the"
                f" {sizes.num_kv_heads} key/value heads of {kind} layers"
            )
    return tuple(
        replace(
            base,
            head_dim=heads[kind].head_dim,
            num_kv_heads=heads[kind].num_kv_heads,
            ffn_hidden_size=base.ffn_hidden_size * (2 if double and donor is not None else 1),
            rope=ropes[kind],
            window=window if kind == SLIDING else None,
            moe=moe,
            k_eq_v=k_eq_v and kind == FULL and donor is None,
            kv_donor=donor,
        )
        for kind, donor in zip(types, donors, strict=True)
    )


def _donors(fields: Fields, types: Sequence[str]) -> list[int | None]:
    """For each layer the one that lends it keys and values: the last of its type before the shared layers."""
    shared = fields.get("num_kv_shared_layers")
    if type(shared) is not int or not 0 <= shared < len(types):
        raise InputError(f"config.json: num_kv_shared_layers must be below the {len(types)} layers, not {shared!r}")
    first = len(types) - shared
    last = {kind: number for number, kind in enumerate(types[:first])}
    if missing := sorted(set(types[first:]) - last.keys()):
        raise InputError(f"config.json: shared layers are {missing[0]}, but no layer before them is")
    return [None] * first + [last[kind] for kind in types[first:]]


def _heads(fields: Fields, types: Sequence[str]) -> dict[str, _Heads]:
    """The head sizes of each type of layer, from whichever dialect the file is in."""
    base = _Heads(fields.integer("head_dim"), fields.integer("num_key_value_heads"))
    if "per_layer_config" in fields.raw:
        return _overridden(object_in(fields.raw, "per_layer_config"), types, base)
    old = Fields(fields.raw, OLD_DEFAULTS)
    kv_heads = old.integer_or_none("num_global_key_value_heads") if fields.flag("attention_k_eq_v") else None
    return {SLIDING: base, FULL: _Heads(old.integer("global_head_dim"), kv_heads or base.num_kv_heads)}


_OVERRIDES = ("head_dim", "num_key_value_heads")


def _overridden(overrides: Mapping[str, Any], types: Sequence[str], base: _Heads) -> dict[str, _Heads]:
    """The head sizes of each type of layer, which may differ between types, but not within one."""
    found = [base] * len(types)
    for key in overrides:
        number = int(key) if str(key).isascii() and str(key).isdigit() and len(str(key)) < 9 else -1
        if not 0 <= number < len(types):
            raise InputError(f"config.json: per_layer_config names layer {key!r} of {len(types)}")
        own = object_in(overrides, key)
        if other := sorted(own.keys() - set(_OVERRIDES)):
            raise UnsupportedError(f"config.json: per_layer_config overrides {', '.join(other)} of layer {key}")
        fields = Fields(own, {"head_dim": base.head_dim, "num_key_value_heads": base.num_kv_heads})
        found[number] = _Heads(fields.integer("head_dim"), fields.integer("num_key_value_heads"))
    heads: dict[str, _Heads] = {}
    for number, (kind, sizes) in enumerate(zip(types, found, strict=True)):
        if heads.setdefault(kind, sizes) != sizes:
            raise UnsupportedError(
                f"config.json: layer {number} has other heads than the {kind} layers before it",
                hint="layers of one type share a rotary embedding, and therefore the width of a head",
            )
    return heads


def _ropes(raw: Raw) -> dict[str, Rope]:
    """The rotary embeddings of full and of sliding layers."""
    given = object_in(raw, "rope_parameters")
    context = Fields(raw, DEFAULTS).context()
    return {
        kind: parse_rope(object_in(given, kind), rope.theta, context) if given.get(kind) else rope
        for kind, rope in ROPES.items()
    }


def _kind(layer: LayerConfig) -> str:
    return FULL if layer.window is None else SLIDING


def _first(config: ModelConfig, kind: str) -> LayerConfig | None:
    return next((layer for layer in config.layers if _kind(layer) == kind), None)


def _values(config: ModelConfig) -> dict[str, Any]:
    base, moe = _first(config, SLIDING) or config.layers[0], bool(config.num_experts)
    widths = {layer.kv_donor is not None: layer.ffn_hidden_size for layer in config.layers}
    values = {
        **CONFIG.values(config),
        "intermediate_size": widths[False],
        "num_key_value_heads": base.num_kv_heads,
        "head_dim": base.head_dim,
        "sliding_window": window_of(config) or DEFAULTS["sliding_window"],
        "layer_types": layer_types_of(config),
        "final_logit_softcapping": config.logit_softcap,
        "hidden_size_per_layer_input": config.per_layer_input_size,
        "attention_k_eq_v": any(layer.k_eq_v for layer in config.layers),
        "num_kv_shared_layers": sum(layer.kv_donor is not None for layer in config.layers),
        "use_double_wide_mlp": widths.get(True, widths[False]) != widths[False],
        "enable_moe_block": moe,
    }
    if config.per_layer_input_size:
        values["vocab_size_per_layer_input"] = config.per_layer_vocab_size
    if moe:
        values["num_experts"] = config.num_experts
        values["top_k_experts"] = config.experts_per_token
        values["moe_intermediate_size"] = config.moe_ffn_hidden_size
    return values


def _told_heads(raw: Raw) -> dict[str, _Heads]:
    fields = CONFIG.fields(raw)
    return _heads(fields, _layer_types(fields, fields.integer("num_hidden_layers")))


def _set_heads(raw: dict[str, Any], config: ModelConfig) -> None:
    """Writes the head sizes of full layers in both dialects, so that any transformers release reads them."""
    full, base = _first(config, FULL), _first(config, SLIDING) or config.layers[0]
    assert full is not None  # the last layer is always one
    own = {key: value for key, value in _sizes(full).items() if value != _sizes(base)[key]}
    digits = len(str(config.num_layers - 1))
    raw["global_head_dim"] = full.head_dim
    raw["num_global_key_value_heads"] = full.num_kv_heads if "num_key_value_heads" in own else None
    raw["per_layer_config"] = {
        f"{number:0{digits}}": dict(own) for number, layer in enumerate(config.layers) if own and _kind(layer) == FULL
    }


def _sizes(layer: LayerConfig) -> dict[str, int]:
    return {"head_dim": layer.head_dim, "num_key_value_heads": layer.num_kv_heads}


def unparse_text(config: ModelConfig, base: Raw) -> dict[str, Any]:
    """The raw config.json of a text model: `base` with the fields that differ, or all fields where there is no base.

    Raises:
        UnsupportedError: config.json of Gemma 4 cannot describe the model.
    """
    if config.layers[-1].window is not None:
        raise UnsupportedError("Gemma 4 whose last layer has a window", hint="transformers gives it none")
    raw = CONFIG.unparse(config, base, parse_text, _values)
    _set_ropes(raw, config, base)
    if not base or _names_other_layers(base, config) or not _tells_heads(raw, config):
        _set_heads(raw, config)
    if parse_text(raw).layers != config.layers:
        raise UnsupportedError("config.json of Gemma 4 cannot describe these layers")
    return raw


def _names_other_layers(base: Raw, config: ModelConfig) -> bool:
    """Whether the overrides of `base` are those of layers that `config` has elsewhere, or not at all."""
    fields = CONFIG.fields(base)
    types = _layer_types(fields, fields.integer("num_hidden_layers"))
    return "per_layer_config" in base and types != [_kind(layer) for layer in config.layers]


def _tells_heads(raw: Raw, config: ModelConfig) -> bool:
    told = _told_heads(raw)
    return all(told.get(_kind(layer)) == _Heads(layer.head_dim, layer.num_kv_heads) for layer in config.layers)


def _set_ropes(raw: dict[str, Any], config: ModelConfig, base: Raw) -> None:
    old = _ropes(base)
    ropes = {**old, **{_kind(layer): layer.rope for layer in config.layers}}
    if not base or ropes != old:
        raw["rope_parameters"] = {kind: rope_fields(rope) for kind, rope in ropes.items()}


WRAPPER = Wrapper("gemma4", "Gemma4ForConditionalGeneration", CONFIG, parse_text, unparse_text)


def to_args(config: ModelConfig) -> dict[str, Any]:
    """The arguments that only Gemma 4 has, named as in Megatron-Bridge's `Gemma4DenseProvider`."""
    full, base = _first(config, FULL), _first(config, SLIDING) or config.layers[0]
    assert full is not None  # the last layer is always one
    values = _values(config)
    return {
        "global_kv_channels": full.head_dim,
        "num_global_query_groups": full.num_kv_heads,
        "attention_k_eq_v": values["attention_k_eq_v"],
        "sliding_window_rope_base": base.rope.theta,
        "full_attention_rope_base": full.rope.theta,
        "full_attention_rope_partial_factor": full.rope.partial,
        "num_kv_shared_layers": values["num_kv_shared_layers"],
        "use_double_wide_mlp": values["use_double_wide_mlp"],
        "per_layer_embed_vocab_size": config.per_layer_vocab_size,
        "per_layer_embed_dim": config.per_layer_input_size,
        "final_logit_softcapping": config.logit_softcap,
    }


_ARGS = {
    "attention_k_eq_v": "attention_k_eq_v",
    "num_kv_shared_layers": "num_kv_shared_layers",
    "use_double_wide_mlp": "use_double_wide_mlp",
    "per_layer_embed_dim": "hidden_size_per_layer_input",
    "final_logit_softcapping": "final_logit_softcapping",
}
"""Arguments -> keys of config.json with the same values."""
_ROPE_ARGS = ("sliding_window_rope_base", "full_attention_rope_base", "full_attention_rope_partial_factor")
_HEAD_ARGS = ("kv_channels", "num_query_groups", "global_kv_channels", "num_global_query_groups")


def from_args(args: Mapping[str, Any], windows: Sequence[int | None]) -> dict[str, Any]:
    """The keys of config.json that `to_args` records.

    Args:
        args: Arguments.
        windows: Window of each layer.

    Raises:
        InputError: An argument that a Gemma 4 needs is absent.
    """
    needed = (*_ARGS, *_ROPE_ARGS, *_HEAD_ARGS)
    if missing := [key for key in needed if key not in args]:
        raise InputError(
            f"the checkpoint's args lack {', '.join(missing[:3])}, which a Gemma 4 needs",
            hint="give --hf-reference",
        )
    types = [FULL if window is None else SLIDING for window in windows]
    own = {"head_dim": args["global_kv_channels"], "num_key_value_heads": args["num_global_query_groups"]}
    ropes = {
        FULL: Rope(
            args["full_attention_rope_base"], "proportional", partial=args["full_attention_rope_partial_factor"]
        ),
        SLIDING: Rope(args["sliding_window_rope_base"]),
    }
    raw = {key: args[name] for name, key in _ARGS.items()}
    raw["layer_types"] = types
    raw["rope_parameters"] = {kind: rope_fields(rope) for kind, rope in ropes.items()}
    raw["per_layer_config"] = {str(number): own for number, kind in enumerate(types) if kind == FULL}
    raw["sliding_window"] = next((window for window in windows if window is not None), DEFAULTS["sliding_window"])
    if args["per_layer_embed_dim"]:
        raw["vocab_size_per_layer_input"] = args.get("per_layer_embed_vocab_size")
    if args.get("num_experts"):
        raw["enable_moe_block"] = True
        raw["num_experts"] = args["num_experts"]
        raw["top_k_experts"] = args.get("moe_router_topk")
        raw["moe_intermediate_size"] = args.get("moe_ffn_hidden_size")
    return raw
