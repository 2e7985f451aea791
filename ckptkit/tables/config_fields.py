"""Reading raw config.json fields, in the old and the new spelling, with the class defaults of transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ckptkit.errors import InputError, UnsupportedError
from ckptkit.tables.bounds import MAX_EXPERTS, MAX_LAYERS, MAX_SIZE
from ckptkit.tables.model_config import Rope
from ckptkit.tables.rows import Raw

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
_MOST = {
    "num_hidden_layers": MAX_LAYERS,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), MAX_EXPERTS),
}
PARTIAL = "partial_rotary_factor"
"""The key of the share of a head that rotates; the classes of some families do not know it."""
_YARN = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")


class Fields:
    """A config.json with the class defaults of its family behind it.

    Args:
        raw: The JSON object.
        defaults: Class default of every key that may be absent; a null in the file stays a null.
        aliases: Other names of keys; in a file that has both, the other name counts, as in transformers.
    """

    def __init__(
        self, raw: Raw, defaults: Mapping[str, Any], aliases: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.raw = raw
        self.defaults = defaults
        self.aliases = aliases

    def get(self, key: str) -> Any:
        """The value of `key`, or its class default."""
        if self.aliases.get(key) in self.raw:
            return self.raw[self.aliases[key]]
        if key in self.raw:
            return self.raw[key]
        if key not in self.defaults:
            raise InputError(f"config.json lacks {key}", hint="every model of this family states it")
        return self.defaults[key]

    def integer(self, key: str) -> int:
        """A positive integer, of a size that a model may have.

        Raises:
            InputError: It is absent without a default, not a positive integer, or too large.
        """
        value = self.get(key)
        if type(value) is not int or value < 1:
            raise InputError(f"config.json: {key} must be a positive integer, not {value!r}")
        if value > (most := _MOST.get(key, MAX_SIZE)):
            raise InputError(f"config.json: {key} is {value:,}, and at most {most:,} are read")
        return value

    def integer_or_none(self, key: str) -> int | None:
        """A positive integer, or None for null.

        Raises:
            InputError: It is anything else.
        """
        return None if self.get(key) is None else self.integer(key)

    def experts(self, key: str) -> tuple[int, int]:
        """(Experts of a layer, experts that a token is sent to).

        Args:
            key: The key of the first number; that of the second is `num_experts_per_tok`.

        Raises:
            InputError: One is no such integer, or a token is sent to more experts than there are.
        """
        count, chosen = self.integer(key), self.integer("num_experts_per_tok")
        if chosen > count:
            raise InputError(f"config.json: num_experts_per_tok {chosen} of {key} {count}")
        return count, chosen

    def refuse_unless(self, granted: Mapping[str, Sequence[Any]]) -> None:
        """Refuses what the file says of keys that the class of transformers does not read.

        Args:
            granted: Such a key -> the values that the class takes for granted, whatever the file says. Null is as
                absent.

        Raises:
            UnsupportedError: The file has another value.
        """
        for key, values in granted.items():
            stated = self.raw.get(key)
            if stated is not None and not any(type(stated) is type(one) and stated == one for one in values):
                raise UnsupportedError(
                    f"config.json: {key} is {stated!r}, and the class of transformers takes {values[0]!r} for granted"
                )

    def number(self, key: str) -> float:
        """A number.

        Raises:
            InputError: It is absent without a default, or not a number.
        """
        return _number(self.get(key), key)

    def flag(self, key: str) -> bool:
        """A boolean; null counts as false."""
        value = self.get(key)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise InputError(f"config.json: {key} must be true or false, not {value!r}")
        return value

    def dtype(self) -> str | None:
        """Element type as torch names it (`bfloat16`), from `dtype` or the older `torch_dtype`."""
        value = self.raw.get("dtype", self.raw.get("torch_dtype"))
        return None if value is None else str(value).removeprefix("torch.")

    def number_or_none(self, key: str) -> float | None:
        """A number, or None for null.

        Raises:
            InputError: It is anything else.
        """
        return None if self.get(key) is None else self.number(key)

    def layer_types(self, default: Sequence[str], known: tuple[str, ...] = (FULL, SLIDING)) -> list[str]:
        """Kind of attention of each layer.

        Args:
            default: The types that transformers assumes where the file has no `layer_types`.
            known: The types that the family has.

        Raises:
            InputError: There is not one of these for each layer.
        """
        types = self.raw.get("layer_types")
        if types is None:
            return list(default)
        if not isinstance(types, list) or len(types) != len(default):
            raise InputError(f"config.json: layer_types must name {len(default)} layers, not {types!r}")
        if unknown := sorted({str(kind) for kind in types} - set(known)):
            raise InputError(f"config.json: unknown layer_types {', '.join(unknown)}")
        return types

    def rope(self, default: Rope) -> Rope:
        """The rotary embedding, from `rope_parameters` or the older `rope_theta` and `rope_scaling`.

        Args:
            default: The class default; its base alone where it is unscaled.
        """
        scaling = object_in(self.raw, "rope_scaling") or _without_types(object_in(self.raw, "rope_parameters"))
        if not scaling and default.kind != "default":
            return default  # a class with a scaled default keeps it whole and does not look at rope_theta
        rope = parse_rope(scaling, self.raw.get("rope_theta", default.theta), self.context())
        if PARTIAL not in self.defaults:
            return rope
        return replace(rope, partial=_share(scaling.get(PARTIAL, self.get(PARTIAL))))

    def context(self) -> int:
        """Context length in tokens, which scaled ropes fall back to; 0 where neither file nor class states it."""
        value = self.raw.get("max_position_embeddings", self.defaults.get("max_position_embeddings"))
        return value if type(value) is int else 0


def object_in(raw: Raw, key: str) -> dict[str, Any]:
    """The JSON object under `key`; null and nothing are an empty one.

    Raises:
        InputError: It is no object.
    """
    value = raw.get(key)
    if value is not None and not isinstance(value, dict):
        raise InputError(f"config.json: {key} must be an object, not {value!r}")
    return value or {}


def _without_types(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """Rope parameters of all layers; empty where each type of layer has its own.

    transformers 5 adds a `rope_type` and a null `rope_theta` beside the types if a model lacks layers of one type.
    Source: `standardize_rope_params` of transformers 5.0 to 5.23.
    """
    return {} if any(isinstance(parameters.get(kind), dict) for kind in (FULL, SLIDING)) else parameters


def parse_rope(scaling: Mapping[str, Any], theta: Any, context: int = 0) -> Rope:
    """A `Rope` from one rope dictionary of config.json.

    Args:
        scaling: The dictionary.
        theta: The base where the dictionary has none.
        context: `max_position_embeddings`, the original context length where the dictionary has none.

    Raises:
        InputError: A field is missing or is not a number.
    """
    theta = _number(scaling.get("rope_theta", theta), "rope_theta")
    kind = str(scaling.get("rope_type", scaling.get("type", "default")) or "default")
    if kind == "default":
        return Rope(theta)
    if kind == "llama3":
        return _llama3(scaling, theta, context)
    if kind == "yarn":
        return _yarn(scaling, theta, context)
    factor = _number(scaling.get("factor", 1.0), "rope factor")
    if kind == "proportional":
        return Rope(
            theta, kind, factor, partial=_number(scaling.get("partial_rotary_factor", 1.0), "partial_rotary_factor")
        )
    return Rope(theta, kind, factor)


def _llama3(scaling: Mapping[str, Any], theta: float, context: int) -> Rope:
    names = ("factor", "low_freq_factor", "high_freq_factor")
    if missing := [name for name in names if name not in scaling]:
        raise InputError(f"config.json: llama3 rope lacks {', '.join(missing)}")
    factor, low, high = (_number(scaling[name], name) for name in names)
    return Rope(theta, "llama3", factor, low, high, _original(scaling, context))


def _yarn(scaling: Mapping[str, Any], theta: float, context: int) -> Rope:
    """Source of the defaults: `_compute_yarn_parameters` of transformers."""
    original = _original(scaling, context)
    factor = scaling.get("factor")
    given = {name: _number(scaling[name], name) for name in _YARN if scaling.get(name) is not None}
    stretched = context / original if factor is None else _number(factor, "rope factor")
    truncate = scaling.get("truncate", True)
    if theta <= 1 or min(stretched, *(given.get(name, 1.0) for name in _YARN[:2])) <= 0:
        raise InputError("config.json: yarn needs a rope_theta above 1, and a factor and betas above 0")
    if not isinstance(truncate, bool):
        raise InputError(f"config.json: truncate must be true or false, not {truncate!r}")
    return Rope(
        theta,
        "yarn",
        stretched,
        original_max_position=original,
        truncate=truncate,
        **given,
    )


def _original(scaling: Mapping[str, Any], context: int) -> int:
    value = _number(scaling.get("original_max_position_embeddings", context), "original_max_position_embeddings")
    if value < 1:
        raise InputError("config.json: scaled rope lacks original_max_position_embeddings")
    return int(value)


def rope_fields(rope: Rope) -> dict[str, Any]:
    """`rope_parameters` as transformers 5 writes it."""
    fields: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind == "proportional":
        fields["partial_rotary_factor"] = rope.partial
    if rope.kind != "default" and (rope.kind, rope.factor) != ("proportional", 1.0):
        fields["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn"):
        fields["original_max_position_embeddings"] = rope.original_max_position
    if rope.kind == "llama3":
        fields["low_freq_factor"] = rope.low_freq_factor
        fields["high_freq_factor"] = rope.high_freq_factor
    if rope.kind == "yarn":
        plain = Rope(rope.theta)
        names = [name for name in (*_YARN, "truncate") if getattr(rope, name) != getattr(plain, name)]
        fields.update({name: getattr(rope, name) for name in names})
    return fields


def set_rope(raw: dict[str, Any], rope: Rope, default: Rope, defaults: Mapping[str, Any]) -> None:
    """Writes `rope` into `raw` in the spelling that `raw` already uses; an equal one is left alone.

    Args:
        raw: The config.json to change.
        rope: The rotary embedding.
        default: The family's class default.
        defaults: Class defaults of the other keys.
    """
    if raw and Fields(raw, defaults).rope(default) == rope:
        return
    fields = rope_fields(rope)
    if PARTIAL in defaults:
        raw.pop(PARTIAL, None)
        fields[PARTIAL] = rope.partial
    old = "rope_theta" in raw or "rope_scaling" in raw
    if old and "rope_parameters" not in raw and default.kind == "default":
        raw["rope_theta"] = fields.pop("rope_theta")
        raw.update({PARTIAL: fields.pop(PARTIAL)} if PARTIAL in defaults else {})
        raw["rope_scaling"] = None if rope.kind == "default" else fields
        return
    for key in ("rope_theta", "rope_scaling"):
        raw.pop(key, None)
    raw["rope_parameters"] = fields


def set_dtype(raw: dict[str, Any], dtype: str | None) -> None:
    """Writes the element type, as torch names it, where `raw` and the configs in it state one; None does nothing."""
    if dtype is None:
        return
    for inner in (value for value in raw.values() if isinstance(value, dict)):
        if Fields(inner, {}).dtype() not in (None, dtype):
            inner["torch_dtype" if "torch_dtype" in inner else "dtype"] = dtype
    if Fields(raw, {}).dtype() != dtype:
        raw["torch_dtype" if "torch_dtype" in raw else "dtype"] = dtype


def _share(value: Any) -> float:
    share = _number(value, PARTIAL)
    if not 0 < share <= 1:
        raise InputError(f"config.json: {PARTIAL} must be above 0 and at most 1, not {value!r}")
    return share


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"config.json: {key} must be a number, not {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InputError(f"config.json: {key} must be a finite number")
    return number
