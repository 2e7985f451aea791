"""`adapter_config.json` of PEFT: which modules a LoRA adapter is for, their ranks, and their scales.

Ranks and scales have defaults (`r`, `lora_alpha`) and exceptions by regular expressions (`rank_pattern`,
`alpha_pattern`). An expression is input: one that could take long is refused before it is tried.

Source: `LoraConfig`, `LoraModel._create_and_replace`, `get_pattern_key` and `check_target_module_exists` of peft 0.21.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from ckptkit.errors import InputError, UnsupportedError

ALL_LINEAR = "all-linear"
Number = TypeVar("Number", int, float)
_LONGEST = 10_000
_MOST_STEPS = 20_000_000
_MOST_RANK, _LARGEST_ALPHA = 1 << 20, 1e9
_REPEATS = re.compile(r"(?<!\\)(?:\\\\)*(?:[*+]|\{\d*,\d*\})")
_ENDLESS = re.compile(r"\)(?:[*+]|\{)|\\[1-9]|\(\?(?:P[=>]|[<(#])")
_LAYER = re.compile(r"[^.]*\.(?P<index>\d+)\.")

_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_OTHER_METHODS = {
    "use_qalora": "QALoRA",
    "lora_bias": "biases of lora_B",
    "fan_in_fan_out": "transposed weights (fan_in_fan_out)",
    "layer_replication": "repeated layers (layer_replication)",
    "trainable_token_indices": "rows of embeddings that are trained (trainable_token_indices)",
    "alora_invocation_tokens": "Activated LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "Monteclora",
}
"""Entries that make an adapter something else than W + scale * B A -> what they make it."""


@dataclass(frozen=True)
class AdapterConfig:
    """A parsed adapter_config.json.

    Attributes:
        raw: All of it.
        rank: `r`, the default rank, or None.
        alpha: `lora_alpha`, the default alpha.
        ranks: `rank_pattern`: expression -> rank.
        alphas: `alpha_pattern`: expression -> alpha.
        where: The file, for messages.
    """

    raw: Mapping[str, Any]
    rank: int | None
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    where: Path | str

    @classmethod
    def parse(cls, raw: Mapping[str, Any], where: Path | str) -> AdapterConfig:
        """Checks an adapter_config.json.

        Raises:
            InputError: A field is missing or makes no sense. Alpha has no default.
            UnsupportedError: It is no LoRA, or a method that computes something else.
        """
        _refuse_other_methods(raw, where)
        if raw.get("lora_alpha") is None:
            raise InputError("no lora_alpha, so the scale of the adapter is not known", where=where, hint="add it")
        rank = raw.get("r")
        return cls(
            raw,
            None if rank is None else _rank(rank, "r", where),
            _alpha(raw["lora_alpha"], "lora_alpha", where),
            {key: _rank(value, f"rank_pattern[{key}]", where) for key, value in _patterns(raw, "rank", where)},
            {key: _alpha(value, f"alpha_pattern[{key}]", where) for key, value in _patterns(raw, "alpha", where)},
            where,
        )

    @property
    def rslora(self) -> bool:
        """Whether the scale is alpha / sqrt(rank) and not alpha / rank."""
        return bool(self.raw.get("use_rslora"))

    @property
    def dora(self) -> bool:
        """Whether the rows of the sum get stored magnitudes (DoRA)."""
        return bool(self.raw.get("use_dora"))

    def rank_of(self, module: str) -> int | None:
        """The rank that it states for a module, by its name inside the model; None if it states none."""
        return _exception(self.ranks, module, self.rank, self.where)

    def scale_of(self, module: str, rank: int) -> float:
        """The factor of B A for a module."""
        alpha = _exception(self.alphas, module, self.alpha, self.where)
        assert alpha is not None
        return scale(alpha, rank, rslora=self.rslora)

    def targets(self, module: str) -> bool:
        """Whether PEFT would put an adapter on a module of this name."""
        if self._matches("exclude_modules", module, default=False):
            return False
        found = self._matches("target_modules", module, default=False)
        if isinstance(self.raw.get("target_modules"), list):
            found = found and self._in_layers(module)
        return found

    def targets_parameter(self, name: str) -> bool:
        """Whether PEFT would put an adapter on a parameter of this name (`target_parameters`)."""
        listed = _strings(self.raw.get("target_parameters") or [], "target_parameters", self.where)
        return name in listed or any(name.endswith(f".{ending}") for ending in listed)

    def called(self, module: str) -> str:
        """The name by which patterns know a module: that of its weight, where `target_parameters` alone includes it."""
        weight = f"{module}.weight"
        return weight if not self.targets(module) and self.targets_parameter(weight) else module

    def _matches(self, field: str, module: str, *, default: bool) -> bool:
        value = self.raw.get(field)
        if value is None:
            return default
        if isinstance(value, str):
            if value == ALL_LINEAR:
                return module.rpartition(".")[2] != "lm_head"
            return _safe(value, self.where).match(module)
        names = _strings(value, field, self.where)
        return module in names or any(module.endswith(f".{name}") for name in names)

    def _in_layers(self, module: str) -> bool:
        """Whether `layers_to_transform` includes the layer of a module."""
        layers = self.raw.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        numbers = layers if isinstance(layers, list) else [layers]
        if any(type(number) is not int for number in numbers):
            raise InputError("layers_to_transform must hold integers", where=self.where)
        patterns = self.raw.get("layers_pattern") or []
        names = _strings([patterns] if isinstance(patterns, str) else patterns, "layers_pattern", self.where)
        if not names:
            match = _LAYER.search(module)
            return match is not None and int(match["index"][:9]) in numbers
        parts = module.split(".")
        found = [
            int(after[:9])
            for part, after in pairwise(parts)
            if after.isdigit() and any(_safe(name, self.where).match(part) for name in names)
        ]
        return bool(found) and found[0] in numbers

    def stating(self, modules: Mapping[str, tuple[int, float]]) -> AdapterConfig:
        """The same config with an exception for each module whose rank or scale it does not state.

        Args:
            modules: Name inside the model -> (rank, scale).
        """
        ranks = {name: rank for name, (rank, _) in modules.items() if self.rank_of(name) != rank}
        alphas = {
            name: _alpha_for(found, rank, self.rslora)
            for name, (rank, found) in modules.items()
            if self.scale_of(name, rank) != found
        }
        if not ranks and not alphas:
            return self
        # The first expression that matches counts, so the new ones come first.
        raw = {
            **self.raw,
            "rank_pattern": {**ranks, **(self.raw.get("rank_pattern") or {})},
            "alpha_pattern": {**alphas, **(self.raw.get("alpha_pattern") or {})},
        }
        return replace(self, raw=raw, ranks={**ranks, **self.ranks}, alphas={**alphas, **self.alphas})

    def targeting(self, modules: Iterable[str]) -> AdapterConfig:
        """The same config with these modules among the targets, if they are not."""
        others = sorted(
            module for module in modules if not self.targets(module) and not self.targets_parameter(f"{module}.weight")
        )
        if not others:
            return self
        targets = self.raw.get("target_modules")
        if isinstance(targets, str):
            raise UnsupportedError(
                f"target_modules is an expression that does not include {others[0]}",
                where=self.where,
                hint="list the modules in target_modules",
            )
        return replace(self, raw={**self.raw, "target_modules": [*(targets or []), *others]})

    @cached_property
    def is_old(self) -> bool | None:
        """Whether it was written by a PEFT before 0.19, or None if it does not say by which."""
        match = re.match(r"(\d{1,4})\.(\d{1,4})", str(self.raw.get("peft_version")))
        return None if match is None else (int(match[1]), int(match[2])) < (0, 19)

    @cached_property
    def base(self) -> str:
        """The model that it names as its base, or an empty string."""
        name = self.raw.get("base_model_name_or_path")
        return name if isinstance(name, str) else ""


def raw_config(base: str, rank: int, alpha: float, *, rslora: bool = False) -> dict[str, Any]:
    """An adapter_config.json of plain LoRA, without its targets.

    Args:
        base: The model that it is for, as the hub calls it, or an empty string.
        rank: `r`.
        alpha: `lora_alpha`.
        rslora: `use_rslora`.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "use_rslora": rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def scale(alpha: float, rank: int, *, rslora: bool) -> float:
    """The factor of B A."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def _alpha_for(found: float, rank: int, rslora: bool) -> float:
    """The alpha that gives a scale exactly, if there is one."""
    alpha = found * (math.sqrt(rank) if rslora else rank)
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, 0))
    exact = next((one for one in near if scale(one, rank, rslora=rslora) == found), alpha)
    return int(exact) if exact.is_integer() else exact


def alpha_for(found: float, rank: int) -> float:
    """The alpha that gives `alpha / rank` as a scale; an integer where it is one."""
    return _alpha_for(found, rank, rslora=False)


def _refuse_other_methods(raw: Mapping[str, Any], where: Path | str) -> None:
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(
            f"an adapter of type {str(kind)[:40]}, and only LORA is read", where=where, hint="merge it with peft"
        )
    for field, what in _OTHER_METHODS.items():
        if raw.get(field):
            raise UnsupportedError(f"{what} is not read ({field})", where=where, hint="merge the adapter with peft")
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_THE_BASE):
        raise UnsupportedError(
            f"init_lora_weights {start[:40]} changes the weights of the base, and the adapter is for those",
            where=where,
            hint="save it with peft's path_initial_model_for_weight_conversion, which makes it an adapter of the base",
        )


def _rank(value: Any, name: str, where: Path | str) -> int:
    if type(value) is not int or not 0 < value <= _MOST_RANK:
        raise InputError(f"{name} must be a rank of at least 1, not {str(value)[:40]}", where=where)
    return value


def _alpha(value: Any, name: str, where: Path | str) -> float:
    if type(value) not in (int, float) or not 0 < abs(value) <= _LARGEST_ALPHA:
        raise InputError(f"{name} must be a number besides 0, not {str(value)[:40]}", where=where)
    return float(value)


def _patterns(raw: Mapping[str, Any], kind: str, where: Path | str) -> list[tuple[str, Any]]:
    found = raw.get(f"{kind}_pattern") or {}
    if not isinstance(found, dict):
        raise InputError(f"{kind}_pattern must be an object", where=where)
    return list(found.items())


def _strings(value: Any, field: str, where: Path | str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InputError(f"{field} must be a list of names", where=where)
    return value


def _exception(patterns: Mapping[str, Number], module: str, default: Number | None, where: Path | str) -> Number | None:
    for pattern, value in patterns.items():
        if pattern == module or _safe(pattern, where, ending=True).match(module):
            return value
    return default


@dataclass(frozen=True)
class _Safe:
    """An expression that takes bounded time."""

    compiled: re.Pattern[str]
    repeats: int
    ending: bool
    where: Path | str

    def match(self, name: str) -> bool:
        if math.comb(len(name) + self.repeats, self.repeats) > _MOST_STEPS:
            text = self.compiled.pattern[:60]
            raise UnsupportedError(f"the expression {text} could take very long", where=self.where, hint="list names")
        return self.compiled.fullmatch(name) is not None


def _safe(pattern: str, where: Path | str, *, ending: bool = False) -> _Safe:
    """Compiles an expression for whole names, or for the end of names behind a dot.

    Raises:
        InputError: It is no regular expression.
        UnsupportedError: It repeats a group, or looks back or ahead: nothing bounds the time that it takes.
    """
    if len(pattern) > _LONGEST or _ENDLESS.search(pattern):
        raise UnsupportedError(f"the expression {pattern[:60]} could take very long", where=where, hint="list names")
    full = rf"(?:.*\.)?(?:{pattern})" if ending else pattern
    try:
        return _Safe(re.compile(full), len(_REPEATS.findall(full)), ending, where)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"{pattern[:60]} is no regular expression ({error})", where=where) from None
