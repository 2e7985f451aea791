"""Split Llama: the first layers of a narrow Llama, an adapter, and the last layers, norm and head of a wide one.

On disk the layers of each half are numbered from 0, as in the published files of this architecture. In Megatron's names
one count runs through both halves. config.json holds the configurations of the halves. Published files have an older
config.json, of the model type `llama`, which names two directories instead: `complete` reads it, `legacy_config` writes
it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckptkit.errors import InputError, UnsupportedError
from ckptkit.families import llama
from ckptkit.families.llama import ATTENTION, MLP
from ckptkit.sharding.rules import COLUMN, ROW, VOCAB
from ckptkit.tables.config_fields import Fields, object_in, set_dtype
from ckptkit.tables.dims import Dim, V
from ckptkit.tables.family import Family, HfDirectory
from ckptkit.tables.model_config import Adapter, LayerConfig, ModelConfig
from ckptkit.tables.rows import Raw, once, only, renamed

HALF = llama.LLAMA
"""The family of both halves."""
ARCHITECTURE = "CustomSplitLLamaForCausalLM"
VALUE_ARCHITECTURES = ("CustomSplitLLamaForTokenClassification", "CustomSplitLLamaForSequenceClassification")
MODEL_TYPE = "split_llama"
FIRST, LAST = "first_config", "last_config"
LINEAR, TWO_LINEAR, RELU = KINDS = ("linear", "two-linear", "mlp")
"""Kinds of adapters: one matrix, two, and two with a ReLU between them."""

MODULES = ("configuration_custom_split_llama", "modeling_custom_split_llama")
CODE = tuple(Path(__file__).parents[1] / "surgery" / "remote" / f"{module}.py" for module in MODULES)
"""The Python files with which `trust_remote_code` loads a checkpoint."""
AUTO_MAP = {
    "AutoConfig": f"{MODULES[0]}.CustomSplitLLamaConfig",
    "AutoModel": f"{MODULES[1]}.CustomSplitLLamaModel",
    "AutoModelForCausalLM": f"{MODULES[1]}.{ARCHITECTURE}",
    "AutoModelForTokenClassification": f"{MODULES[1]}.{VALUE_ARCHITECTURES[0]}",
    "AutoModelForSequenceClassification": f"{MODULES[1]}.{VALUE_ARCHITECTURES[1]}",
}

_LEGACY = ("path8b", "path70b", "num_layers_8", "num_layers_70", "mlp")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_COUNTS = {FIRST: "num_layers_8", LAST: "num_layers_70"}
_PATHS = {FIRST: "path8b", LAST: "path70b"}


def parse(raw: Raw) -> ModelConfig:
    """Translates the config.json of a split Llama.

    Raises:
        InputError: A field is missing, of the wrong type, or contradicts another.
        UnsupportedError: The halves differ in a setting that all layers share.
    """
    if not (raw.get(FIRST) and raw.get(LAST)):
        raise InputError(
            f"config.json lacks {FIRST} and {LAST}, which describe the two halves",
            hint="pass --hf-reference with a complete one; a legacy one is completed where its tensors lie beside it",
        )
    first, last = half(raw, FIRST), half(raw, LAST)
    if differences := incompatible(first, last):
        raise UnsupportedError(f"the halves of a split Llama differ in {'; '.join(differences)}")
    config = joined(first, last, _kind(raw))
    _check_counts(raw, config)
    return replace(config, dtype=Fields(raw, {}).dtype() or last.dtype)


def half(raw: Raw, key: str) -> ModelConfig:
    """One half of a complete config.json as a Llama of its own."""
    return llama.parse(object_in(raw, key))


def incompatible(first: ModelConfig, last: ModelConfig) -> list[str]:
    """Settings that a split Llama has once and that two Llamas do not agree on, as `name 1 and 2`."""
    common = ("vocab_size", "activation", "qkv_bias", "out_bias", "mlp_bias")
    pairs = [(name, getattr(first, name), getattr(last, name)) for name in common]
    return [f"{name} {one} and {other}" for name, one, other in pairs if one != other]


def joined(first: ModelConfig, last: ModelConfig, kind: str) -> ModelConfig:
    """The split Llama of two Llamas, each cut down to the layers that it gives."""
    eps = None if first.norm_eps == last.norm_eps else first.norm_eps
    narrow = (replace(layer, hidden_size=first.hidden_size, norm_eps=eps) for layer in first.layers)
    return replace(
        last,
        family=MODEL_TYPE,
        architecture=ARCHITECTURE,
        layers=(*narrow, *last.layers),
        tied=False,
        max_position_embeddings=min(first.max_position_embeddings, last.max_position_embeddings),
        adapter=Adapter(kind, first.num_layers, first.hidden_size),
    )


def _halves(config: ModelConfig) -> dict[str, ModelConfig]:
    """The two Llamas that `joined` takes, except for their context lengths and element types."""
    adapter = config.adapter
    if adapter is None:
        raise InputError("a split Llama without an adapter", hint="give --hf-reference")
    whole = replace(config, family="llama", architecture="LlamaForCausalLM", adapter=None, dtype=None)
    first = config.layers[: adapter.after]
    return {
        FIRST: replace(
            whole,
            hidden_size=adapter.hidden_size,
            layers=tuple(replace(layer, hidden_size=None, norm_eps=None) for layer in first),
            norm_eps=first[0].norm_eps or config.norm_eps,
        ),
        LAST: replace(whole, layers=config.layers[adapter.after :]),
    }


def _kind(raw: Raw) -> str:
    kind = raw.get("adapter", LINEAR)
    if kind not in KINDS:
        raise InputError(f"config.json: adapter must be one of {', '.join(KINDS)}, not {kind!r}")
    if "mlp" in raw and raw["mlp"] != (kind == RELU):
        raise InputError(f"config.json: adapter is {kind}, but mlp is {raw['mlp']!r}")
    return str(kind)


def _check_counts(raw: Raw, config: ModelConfig) -> None:
    """config.json states the numbers of layers several times; a contradiction would drop layers in silence."""
    assert config.adapter is not None
    counts = (config.adapter.after, config.num_layers - config.adapter.after, config.num_layers)
    for key, count in zip(("num_layers_8", "num_layers_70", "num_hidden_layers"), counts, strict=True):
        if key in raw and raw[key] != count:
            raise InputError(f"config.json: {key} is {raw[key]!r}, the halves have {count} layers")
    if "vocab_size" in raw and raw["vocab_size"] != config.vocab_size:
        raise InputError(f"config.json: vocab_size is {raw['vocab_size']!r}, that of the halves is {config.vocab_size}")


def compose(first: Raw, last: Raw, num_first: int, num_last: int, kind: str) -> dict[str, Any]:
    """The config.json of a split Llama.

    Args:
        first: config.json of the narrow Llama.
        last: config.json of the wide one.
        num_first: Layers that it takes from the front of the narrow one.
        num_last: Layers that it takes from the end of the wide one.
        kind: Kind of the adapter.

    Raises:
        InputError: One of the two is not a valid config.json.
        UnsupportedError: The two differ in a setting that a split Llama has once.
    """
    halves = {
        FIRST: {**deepcopy(dict(first)), "num_hidden_layers": num_first},
        LAST: {**deepcopy(dict(last)), "num_hidden_layers": num_last},
    }
    for raw in halves.values():
        for key in ("auto_map", "_name_or_path"):
            raw.pop(key, None)
        raw.update(architectures=["LlamaForCausalLM"], model_type="llama")
    composed: dict[str, Any] = {
        "architectures": [ARCHITECTURE],
        "auto_map": dict(AUTO_MAP),
        "model_type": MODEL_TYPE,
        "adapter": kind,
        **{key: first[key] for key in _TOKENS if key in first},
        **halves,
    }
    config = parse(composed)
    return {**composed, **_top_level(config), **({"dtype": config.dtype} if config.dtype else {})}


def _top_level(config: ModelConfig) -> dict[str, Any]:
    """The keys that generic tools read at the top level: sizes of the wide half, and of the whole model."""
    assert config.adapter is not None
    wide = config.layers[-1]
    return {
        "num_layers_8": config.adapter.after,
        "num_layers_70": config.num_layers - config.adapter.after,
        "mlp": config.adapter.kind == RELU,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": wide.ffn_hidden_size,
        "num_attention_heads": wide.num_heads,
        "num_key_value_heads": wide.num_kv_heads,
        "head_dim": wide.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": False,
    }


def unparse(config: ModelConfig, base: Raw) -> dict[str, Any]:
    """The raw config.json of a split Llama: `base` with the fields that differ, or all fields without a base."""
    if base and parse(base) == config:
        return deepcopy(dict(base))
    halves = _halves(config)
    assert config.adapter is not None
    raws = {key: _unparse_half(model, config, base, key) for key, model in halves.items()}
    counts = [model.num_layers for model in halves.values()]
    raw = compose(raws[FIRST], raws[LAST], counts[0], counts[1], config.adapter.kind)
    if base:
        raw.pop("dtype", None)  # `base` has it, perhaps under its older name
    raw = {**deepcopy(dict(base)), **raw}
    set_dtype(raw, config.dtype)
    return raw


def _unparse_half(model: ModelConfig, config: ModelConfig, base: Raw, key: str) -> dict[str, Any]:
    """The config.json of a half; fields that the whole model does not determine stay as in `base`."""
    if not base:
        return llama.unparse(model, {})
    old, whole = half(base, key), parse(base)
    unchanged = [n for n in ("max_position_embeddings", "init_std") if getattr(config, n) == getattr(whole, n)]
    kept = {name: getattr(old, name) for name in ("dtype", "tied", *unchanged)}
    return llama.unparse(replace(model, **kept), object_in(base, key))


def complete(
    raw: Raw, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Raw | None]
) -> tuple[dict[str, Any], list[str]]:
    """Makes a legacy config.json self-contained, and returns a self-contained one as it is.

    The directories that `path8b` and `path70b` name hold the config.json of each half. Where one is absent, the sizes
    of its half follow from the tensors; all other fields come from the top level, which is that of the narrow model and
    must have them. The tensors decide the kind of the adapter.

    Args:
        raw: The config.json.
        shapes: Names and shapes of the tensors beside it.
        read: Gives the config.json in a directory that config.json names, or None.

    Returns:
        The complete config.json, and notes for the user.

    Raises:
        InputError: A field cannot be derived, or config.json contradicts the tensors.
    """
    if FIRST in raw or LAST in raw:
        return dict(raw), []
    counts = {key: _count(raw, shapes, key) for key in (FIRST, LAST)}
    halves, notes = {}, ["the legacy layout of a split Llama: config.json is made self-contained"]
    for key in (FIRST, LAST):
        path = raw.get(_PATHS[key])
        found = read(path) if isinstance(path, str) and path else None
        if found is None:
            notes.append(f"{_PATHS[key]} is not there: {key} follows from the tensors and the top level of config.json")
        halves[key] = _derived(raw, shapes, key) if found is None else found
    kind = _stored_kind(raw, shapes)
    whole = compose(halves[FIRST], halves[LAST], counts[FIRST], counts[LAST], kind)
    kept = {key: raw[key] for key in (*_PATHS.values(), *_TOKENS, "dtype", "torch_dtype") if key in raw}
    if "torch_dtype" in kept:
        whole.pop("dtype", None)
    return {**whole, **kept}, notes


def _group(key: str) -> str:
    return "model.layers_first." if key == FIRST else "model.layers_last."


def _count(raw: Raw, shapes: Mapping[str, tuple[int, ...]], key: str) -> int:
    pattern = re.compile(rf"{re.escape(_group(key))}(\d+)\.")
    stored = {int(match[1]) for name in shapes if (match := pattern.match(name))}
    if not stored:
        raise InputError(f"no tensors of {_group(key)}*", hint="a split Llama has layers on both sides")
    count = 1 + max(stored)
    if raw.get(_COUNTS[key], count) != count:
        raise InputError(f"config.json: {_COUNTS[key]} is {raw[_COUNTS[key]]!r}, the tensors hold {count} layers")
    return count


def _stored_kind(raw: Raw, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The published code drops the ReLU with `mlp`, and builds two matrices only with it."""
    one = "model.adapter.weight" in shapes
    two = [f"model.adapter_linear_{number}.weight" in shapes for number in (1, 2)]
    if one and not any(two):
        return LINEAR
    if all(two) and not one:
        return RELU if raw.get("mlp") else TWO_LINEAR
    raise InputError(
        "the tensors hold neither an adapter of one matrix nor one of two",
        hint="it needs model.adapter.weight, or model.adapter_linear_1.weight and model.adapter_linear_2.weight",
    )


def _derived(raw: Raw, shapes: Mapping[str, tuple[int, ...]], key: str) -> dict[str, Any]:
    """The config.json of a half, derived from the tensors and the top level."""
    widths = {FIRST: "model.embed_tokens.weight", LAST: "model.norm.weight"}
    layer = _group(key) + "0."
    names = {
        "hidden": widths[key],
        "query": layer + "self_attn.q_proj.weight",
        "key": layer + "self_attn.k_proj.weight",
        "ffn": layer + "mlp.gate_proj.weight",
    }
    if missing := [name for name in names.values() if not shapes.get(name)]:
        raise InputError(f"{len(missing)} tensors missing: {', '.join(missing)}")
    head_dim = _head_dim(raw)
    unknown = ["head_dim (or hidden_size and num_attention_heads)"] if head_dim is None else []
    unknown += [] if {"rope_theta", "rope_parameters"} & raw.keys() else ["rope_theta (or rope_parameters)"]
    unknown += [name for name in ("rms_norm_eps", "max_position_embeddings") if name not in raw]
    if head_dim is None or unknown:
        raise InputError(
            f"config.json does not say {', '.join(unknown)}, and {_PATHS[key]} ({raw.get(_PATHS[key])!r}) is not there",
            hint=f"point {_PATHS[key]} to the directory of the model, or add the fields",
        )
    stored = {name: shapes[tensor] for name, tensor in names.items()}
    if stored["query"][0] % head_dim or stored["key"][0] % head_dim:
        raise InputError(f"the projections of {_group(key)}* are no multiples of head_dim {head_dim}")
    return {
        **{name: value for name, value in raw.items() if name not in (*_LEGACY, "auto_map")},
        "vocab_size": shapes.get("model.embed_tokens.weight", (raw.get("vocab_size"),))[0],
        "hidden_size": stored["hidden"][-1],
        "intermediate_size": stored["ffn"][0],
        "num_attention_heads": stored["query"][0] // head_dim,
        "num_key_value_heads": stored["key"][0] // head_dim,
        "head_dim": head_dim,
    }


def _head_dim(raw: Raw) -> int | None:
    fields = Fields(raw, {"head_dim": None, "hidden_size": None, "num_attention_heads": None})
    head_dim = fields.integer_or_none("head_dim")
    hidden, heads = (fields.integer_or_none(name) for name in ("hidden_size", "num_attention_heads"))
    if head_dim is None and hidden is not None and heads is not None and hidden % heads == 0:
        return hidden // heads
    return head_dim


def legacy_config(raw: Raw) -> dict[str, Any]:
    """The legacy config.json of a split Llama: that of the narrow model with a few keys more.

    Raises:
        UnsupportedError: The published code cannot build the adapter.
    """
    config = parse(raw)
    assert config.adapter is not None
    if config.adapter.kind == TWO_LINEAR:
        raise UnsupportedError("two linear maps without a ReLU have no legacy layout", hint="drop --layout legacy")
    legacy = {
        **deepcopy(object_in(raw, FIRST)),
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        **{key: raw.get(key, "") for key in _PATHS.values()},
        **{key: value for key, value in _top_level(config).items() if key in (*_LEGACY, "tie_word_embeddings")},
        "vocab_size": config.vocab_size,
    }
    set_dtype(legacy, config.dtype)
    return legacy


NARROW = Dim("hidden_size of the first layers", lambda config, layer: config.layers[0].hidden_size or 0)
WIDE = Dim("hidden_size of the last layers", lambda config, layer: config.hidden_size)


def _is_first(config: ModelConfig, layer: LayerConfig) -> bool:
    return layer.hidden_size is not None


def _is_last(config: ModelConfig, layer: LayerConfig) -> bool:
    return layer.hidden_size is None


def _is_linear(config: ModelConfig, layer: LayerConfig) -> bool:
    return config.adapter is not None and config.adapter.kind == LINEAR


def _is_double(config: ModelConfig, layer: LayerConfig) -> bool:
    return not _is_linear(config, layer)


ENDS = (
    once("embedding.word_embeddings.weight", "model.embed_tokens.weight", (V, NARROW), VOCAB, first=True),
    once("decoder.final_layernorm.weight", "model.norm.weight", (WIDE,)),
    once("output_layer.weight", "lm_head.weight", (V, WIDE), VOCAB),
)
"""Embedding, last norm and head, which have different widths."""

_ONE, _FIRST, _SECOND = "model.adapter.weight", "model.adapter_linear_1.weight", "model.adapter_linear_2.weight"
ADAPTER = (
    once("decoder.adapter.linear_1.weight", _ONE, (WIDE, NARROW), COLUMN, when=_is_linear, at_cut=True),
    once("decoder.adapter.linear_1.weight", _FIRST, (WIDE, NARROW), COLUMN, when=_is_double, at_cut=True),
    once("decoder.adapter.linear_2.weight", _SECOND, (WIDE, WIDE), ROW, when=_is_double, at_cut=True),
)
"""A single matrix is column-parallel and its output gathered; of two, the second is row-parallel."""

SPLIT_LLAMA = Family(
    name=MODEL_TYPE,
    architectures=(ARCHITECTURE,),
    parse=parse,
    unparse=unparse,
    rows=(
        *ENDS,
        *ADAPTER,
        *only(renamed((*ATTENTION, *MLP), ("model.layers.{i}.", "model.layers_first.{j}.")), _is_first),
        *only(renamed((*ATTENTION, *MLP), ("model.layers.{i}.", "model.layers_last.{j}.")), _is_last),
    ),
    marks=("decoder.adapter.linear_1.weight",),
    value_architectures=VALUE_ARCHITECTURES,
    value_directory=HfDirectory(code=CODE, auto_map=AUTO_MAP),
    directory=HfDirectory(complete, legacy_config, CODE, AUTO_MAP),
)
