"""Recipes: the YAML of mergekit, read strictly. What is not done here is refused by name.

Source: `MergeConfiguration`, `ConfigReader` and `evaluate_setting` of mergekit 0.1.5.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptkit.conversion.options import dtype_called
from ckptkit.dtypes import DType
from ckptkit.errors import CkptkitError, InputError, UnsupportedError
from ckptkit.formats.yaml_files import parse_yaml
from ckptkit.printable import printable

LARGEST = 512 << 10
"""The most bytes of a recipe."""
_LARGEST_NUMBER = 1e6
"""Of a parameter. Far larger ones overflow, and leave nothing but infinities and what is no number."""

PASSTHROUGH, LINEAR, SLERP, TASK_ARITHMETIC = "passthrough", "linear", "slerp", "task_arithmetic"
TIES, DARE_TIES, DARE_LINEAR = "ties", "dare_ties", "dare_linear"
_OF_TASKS = ("normalize", "rescale", "lambda", "int8_mask")

SHARED: dict[str, tuple[str, ...]] = {
    PASSTHROUGH: (),
    LINEAR: ("normalize",),
    SLERP: ("t",),
    **dict.fromkeys((TASK_ARITHMETIC, TIES, DARE_TIES, DARE_LINEAR), _OF_TASKS),
}
"""Method -> the parameters that count for all inputs of a tensor."""

OWN: dict[str, tuple[str, ...]] = {
    PASSTHROUGH: ("scale",),
    LINEAR: ("weight",),
    SLERP: (),
    **dict.fromkeys((TASK_ARITHMETIC, TIES, DARE_TIES, DARE_LINEAR), ("weight", "density")),
}
"""Method -> the parameters that each input has for itself."""

METHODS = tuple(SHARED)

_TOP = (
    *("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype"),
    *("tokenizer_source", "tokenizer", "chat_template"),
)
_TOP_REFUSED = ("modules",)
_SLICE = ("sources", "base_model", "parameters")
_MOST_MULTIPLE = 1 << 16
"""Of `pad_to_multiple_of`."""
_BOOLEANS = ("normalize", "rescale", "int8_mask")

Settings = Mapping[str, Any]
Scalar = bool | int | float | str


@dataclass(frozen=True)
class Source:
    """One input of a slice.

    Attributes:
        model: The model, as the recipe names it.
        layers: First layer and the layer after the last; None for all.
        parameters: Its parameters.
    """

    model: str
    layers: tuple[int, int] | None
    parameters: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """Some layers of the result.

    Attributes:
        sources: The inputs.
        base: The base model of this slice, or None for that of the recipe.
        parameters: Parameters of this slice.
    """

    sources: tuple[Source, ...]
    base: str | None = None
    parameters: Settings = field(default_factory=dict)


UNION, BASE = "union", "base"
"""Sources of a tokenizer that are no model: all tokens of all models, and the tokenizer of the base model."""


@dataclass(frozen=True)
class TokenRow:
    """Where a model without a token takes its row from.

    Attributes:
        model: The model that gives it; None for zeros.
        token: Text or id of the token whose row it is; None for the token itself.
        force: Whether the models that have the token take this row, too.
    """

    model: str | None
    token: str | int | None = None
    force: bool = False


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer that a result has.

    Attributes:
        source: `union`, `base` or a model.
        tokens: Token -> where its row comes from; those that the source lacks are added.
        multiple: Number of rows that the vocabulary is padded to a multiple of, or None.
    """

    source: str
    tokens: Mapping[str, TokenRow] = field(default_factory=dict)
    multiple: int | None = None


@dataclass(frozen=True)
class Recipe:
    """A recipe.

    Attributes:
        method: One of `METHODS`.
        slices: The result's layers, in order.
        sliced: Whether the recipe has slices; else the one slice is all layers of all models.
        base: The base model, or None.
        parameters: Parameters of the whole recipe.
        dtype: The type that is computed in, or None.
        out_dtype: The type that is written, or None for that one.
        tokenizer: The tokenizer that the result has, or None for that of the base model, with no row moved.
        chat_template: `auto`, a template of Jinja, or None for that of the tokenizer.
        text: The recipe as it was written.
    """

    method: str
    slices: tuple[Slice, ...]
    sliced: bool
    base: str | None
    parameters: Settings
    dtype: DType | None
    out_dtype: DType | None
    tokenizer: Tokenizer | None
    chat_template: str | None
    text: str

    @property
    def models(self) -> list[str]:
        """All models that it names, in the order of their first appearance; the base model comes first."""
        bases = [self.base, *(one.base for one in self.slices)]
        named = [*bases[:1], *(source.model for one in self.slices for source in one.sources), *bases[1:]]
        return list(dict.fromkeys(name for name in named if name is not None))


def read_recipe(data: bytes, where: object) -> Recipe:
    """A recipe.

    Raises:
        InputError: It is no YAML in UTF-8, or not a recipe.
        UnsupportedError: A method or a key is not known, or not done here.
    """
    if len(data) > LARGEST:
        raise InputError(f"a recipe of {len(data):,} bytes", where=where, hint=f"at most {LARGEST:,} are read")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"byte {error.start:,} is not UTF-8", where=where) from None
    raw = parse_yaml(data, where)
    reader = _Reader(where)
    top = reader.mapping(raw, "the recipe")
    for key in _TOP_REFUSED:
        if top.get(key) is not None:
            reader.refuse(key)
    reader.check(top, _TOP, "")
    method = top.get("merge_method")
    if method not in METHODS:
        raise UnsupportedError(
            f"merge_method {printable(repr(method), _SHOWN, _SHOWN)}",
            where=where,
            hint=f"done are {', '.join(METHODS)}",
        )
    known = (*SHARED[method], *OWN[method])
    if (top.get("models") is None) == (top.get("slices") is None):
        raise InputError("a recipe has either models or slices", where=where)
    sliced = top.get("models") is None
    if sliced:
        slices = [reader.slice(one, f"slices[{at}]", known) for at, one in enumerate(reader.sequence(top, "slices"))]
    else:
        found = [reader.model(one, f"models[{at}]", known) for at, one in enumerate(reader.sequence(top, "models"))]
        slices = [Slice(tuple(found))]
    base = reader.text(top, "base_model", "")
    if not sliced and base is not None and all(source.model != base for source in slices[0].sources):
        slices = [Slice((*slices[0].sources, Source(base, None)))]
    return Recipe(
        method,
        tuple(slices),
        sliced,
        base,
        reader.parameters(top, "", known),
        reader.dtype(top, "dtype"),
        reader.dtype(top, "out_dtype"),
        reader.tokenizer(top),
        reader.text(top, "chat_template", ""),
        text,
    )


class _Reader:
    """Reads parts of a recipe. `place` says where a part is, for messages."""

    def __init__(self, where: object) -> None:
        self.where = where

    def refuse(self, place: str, hint: str | None = None) -> None:
        raise UnsupportedError(f"{place} of a recipe is not done here", where=self.where, hint=hint)

    def mapping(self, value: Any, place: str) -> dict[str, Any]:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise InputError(f"{place} must be a mapping of names", where=self.where)
        return value

    def sequence(self, raw: Mapping[str, Any], key: str) -> list[Any]:
        value = raw[key]
        if not isinstance(value, list) or not value:
            raise InputError(f"{key} must be a list", where=self.where)
        return value

    def check(self, raw: Mapping[str, Any], known: Collection[str], place: str) -> None:
        for key in raw:
            if key not in known:
                close = difflib.get_close_matches(key, known, 1)
                hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
                self.refuse(_inside(place, key), hint)

    def text(self, raw: Mapping[str, Any], key: str, place: str) -> str | None:
        value = raw.get(key)
        if value is not None and not isinstance(value, str):
            what = "a path or a name" if not isinstance(value, dict) else "a path or a name, not a mapping"
            raise InputError(f"{_inside(place, key)} must be {what}", where=self.where)
        return value

    def dtype(self, top: Mapping[str, Any], key: str) -> DType | None:
        name = self.text(top, key, "")
        try:
            return dtype_called(name)
        except CkptkitError as error:
            what = f"{key} {printable(str(name), _SHOWN, _SHOWN)} of a recipe"
            raise UnsupportedError(what, where=self.where, hint=error.hint) from None

    def required(self, raw: Mapping[str, Any], place: str) -> str:
        found = self.text(raw, "model", place)
        if found is None:
            raise InputError(f"{place} names no model", where=self.where)
        return found

    def model(self, value: Any, place: str, known: Collection[str]) -> Source:
        raw = self.mapping(value, place)
        self.check(raw, ("model", "parameters"), place)
        return Source(self.required(raw, place), None, self.parameters(raw, place, known))

    def slice(self, value: Any, place: str, known: Collection[str]) -> Slice:
        raw = self.mapping(value, place)
        self.check(raw, _SLICE, place)
        if raw.get("sources") is None:
            raise InputError(f"{place} has no sources", where=self.where)
        sources = [
            self.source(one, f"{place}.sources[{at}]", known) for at, one in enumerate(self.sequence(raw, "sources"))
        ]
        if len({source.layers[1] - source.layers[0] for source in sources if source.layers}) > 1:
            raise InputError(f"{place}: all sources must have as many layers", where=self.where)
        return Slice(tuple(sources), self.text(raw, "base_model", place), self.parameters(raw, place, known))

    def source(self, value: Any, place: str, known: Collection[str]) -> Source:
        raw = self.mapping(value, place)
        self.check(raw, ("model", "layer_range", "parameters"), place)
        layers = raw.get("layer_range")
        if (
            not isinstance(layers, list)
            or len(layers) != 2
            or not all(type(number) is int for number in layers)
            or not 0 <= layers[0] < layers[1]
        ):
            what = f"{place}.layer_range must be two numbers, the first layer and the one after the last"
            raise InputError(what, where=self.where, hint="as in [0, 16]")
        return Source(self.required(raw, place), (layers[0], layers[1]), self.parameters(raw, place, known))

    def tokenizer(self, top: Mapping[str, Any]) -> Tokenizer | None:
        source = self.text(top, "tokenizer_source", "")
        if top.get("tokenizer") is None:
            return None if source is None else Tokenizer(source)
        if source is not None:
            raise InputError("a recipe has either tokenizer_source or tokenizer", where=self.where)
        raw = self.mapping(top["tokenizer"], "tokenizer")
        self.check(raw, ("source", "tokens", "pad_to_multiple_of"), "tokenizer")
        tokens = {} if raw.get("tokens") is None else self.mapping(raw["tokens"], "tokenizer.tokens")
        multiple = raw.get("pad_to_multiple_of")
        if multiple is not None and (type(multiple) is not int or not 0 < multiple <= _MOST_MULTIPLE):
            raise InputError(
                "tokenizer.pad_to_multiple_of must be a number of rows",
                where=self.where,
                hint=f"1 to {_MOST_MULTIPLE:,}",
            )
        rows = {token: self.token_row(one, _inside("tokenizer.tokens", token)) for token, one in tokens.items()}
        return Tokenizer(self.text(raw, "source", "tokenizer") or UNION, rows, multiple)

    def token_row(self, value: Any, place: str) -> TokenRow:
        raw = self.mapping(value, place)
        self.check(raw, ("source", "force"), place)
        force = raw.get("force", False)
        if not isinstance(force, bool):
            raise InputError(f"{place}.force must be true or false", where=self.where)
        source, inside = raw.get("source"), f"{place}.source"
        if isinstance(source, str):
            return TokenRow(source, None, force)
        given = self.mapping(source, inside)
        if given.get("kind") == "zero":
            self.check(given, ("kind",), inside)
            return TokenRow(None, None, force)
        self.check(given, ("kind", "model", "token", "token_id"), inside)
        number, text = given.get("token_id"), self.text(given, "token", inside)
        if given.get("kind") != "model_token" or (number is None) == (text is None):
            raise InputError(
                f"{inside} must be a model, a token of a model, or zeros",
                where=self.where,
                hint="as in {kind: model_token, model: A, token: B}, with token_id instead of token, or {kind: zero}",
            )
        if number is not None and (type(number) is not int or number < 0):
            raise InputError(f"{inside}.token_id must be the number of a row", where=self.where)
        return TokenRow(self.required(given, inside), number if text is None else text, force)

    def parameters(self, raw: Mapping[str, Any], place: str, known: Collection[str]) -> Settings:
        if raw.get("parameters") is None:
            return {}
        inside = _inside(place, "parameters")
        found = self.mapping(raw["parameters"], inside)
        self.check(found, known, inside)
        for name, value in found.items():
            self._check_setting(value, _inside(inside, name))
        return found

    def _check_setting(self, value: Any, place: str) -> None:
        """A value, a list of values (a gradient), or a list of conditions with a value or gradient each."""
        if _is_scalar(value) or (isinstance(value, list) and value and all(map(_is_scalar, value))):
            return
        conditions = [value] if isinstance(value, dict) else value
        if not isinstance(conditions, list) or not conditions:
            raise InputError(f"{place} must be a value, a list of values, or conditions", where=self.where)
        for at, one in enumerate(conditions):
            inside = f"{place}[{at}]"
            raw = self.mapping(one, inside)
            self.check(raw, ("value", "filter"), inside)
            self.text(raw, "filter", inside)
            plain = raw.get("value")
            if not _is_scalar(plain) and not (isinstance(plain, list) and plain and all(map(_is_scalar, plain))):
                raise InputError(f"{inside}.value must be a value or a list of values", where=self.where)


_SHOWN = 60
"""Characters of a key or a name that messages show."""


def _inside(place: str, key: str) -> str:
    """The place of a key, for messages."""
    shown = printable(key, _SHOWN, _SHOWN)
    return f"{place}.{shown}" if place else shown


def _is_scalar(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def resolved(scopes: Iterable[Settings], name: str, tensor: str, t: float, where: object) -> float | bool | None:
    """The value of a parameter for a tensor, or None where nothing sets it.

    Args:
        scopes: Parameters, the most special ones first.
        name: Name of the parameter.
        tensor: Name of the tensor, which filters must occur in.
        t: The place of the layer in its slice, from 0 to 1.
        where: The recipe, for messages.

    Raises:
        InputError: A value is of the wrong type.
    """
    kind = _as_bool if name in _BOOLEANS else _as_number
    for scope in scopes:
        if name in scope:
            value = _evaluated(scope[name], tensor, t, lambda one: kind(one, name, where))
            if value is not None:
                return value
    return None


def _evaluated(setting: Any, tensor: str, t: float, validated: Callable[[Scalar], float | bool]) -> float | bool | None:
    if _is_scalar(setting):
        return validated(setting)
    if isinstance(setting, list) and _is_scalar(setting[0]):
        return _interpolated([validated(one) for one in setting], t)
    for condition in _conditions(setting):
        wanted = condition.get("filter")
        if wanted in (None, "*") or wanted in tensor:
            return _evaluated(condition["value"], tensor, t, validated)
    return None


def _conditions(setting: Any) -> Iterator[Mapping[str, Any]]:
    yield from [setting] if isinstance(setting, dict) else setting


def _interpolated(values: list[float | bool], t: float) -> float | bool:
    """The value of a gradient at t: between its two nearest anchors, which are evenly spaced; flags jump."""
    if any(isinstance(value, bool) for value in values):
        return values[int(t * (len(values) - 1))]
    scaled = t * (len(values) - 1)
    first = int(scaled)
    share = scaled - first
    return (1 - share) * values[first] + share * values[min(first + 1, len(values) - 1)]


def _as_number(value: Scalar, name: str, where: object) -> float:
    try:
        found = float(value)
    except ValueError:
        found = math.nan
    if not abs(found) <= _LARGEST_NUMBER:
        raise InputError(
            f"{name} must be a number of at most {_LARGEST_NUMBER:g}, not {str(value)[:40]!r}", where=where
        )
    return found


def _as_bool(value: Scalar, name: str, where: object) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    raise InputError(f"{name} must be true or false, not {str(value)[:40]!r}", where=where)


def model_path(name: str, recipe: Path | None) -> str:
    """The path of a model that a recipe names: a relative one counts from the current directory, or from the recipe.

    Raises:
        UnsupportedError: It is a model with an adapter, `model+adapter`.
    """
    if Path(name).exists():
        return name
    if recipe is not None and (recipe.parent / name).exists():
        return str(recipe.parent / name)
    if "+" in name:
        model, _, adapter = name.partition("+")
        hint = f"merge it first: ckptkit adapter merge {model} {adapter} -o MERGED --to hf"
        raise UnsupportedError(f"{name}: a model with an adapter", where=recipe, hint=hint)
    return name
