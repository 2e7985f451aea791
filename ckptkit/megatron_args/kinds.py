"""The types that Megatron-LM's arguments have: in words, as a test, and as Python reads them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ckptkit.sharding.pipeline_layout import in_letters
from ckptkit.tables.bounds import MAX_EXPERTS, MAX_LAYERS, MAX_SIZE
from ckptkit.tables.model_config import SIGMOID, SOFTMAX


def _as_it_is(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Kind:
    """A type of arguments.

    Attributes:
        text: Description of valid values.
        holds: Whether a value has this type.
        read: Value -> the same as a field of `ModelConfig`.
    """

    text: str
    holds: Callable[[Any], bool]
    read: Callable[[Any], Any] = _as_it_is


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_SIZE


def _is_number(value: Any) -> bool:
    return (_is_whole(value) or isinstance(value, float)) and math.isfinite(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, int) for item in value)


def _is_layout(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list | tuple) and all(isinstance(stage, list | tuple) for stage in value)
    )


def _layout(value: Any) -> str:
    return value if isinstance(value, str) else in_letters(value)


COUNT = Kind("a positive integer", lambda value: _is_whole(value) and value > 0)
COUNT_OR_ZERO = Kind("an integer of at least 0", lambda value: _is_whole(value) and value >= 0)
LAYERS = Kind(f"a positive integer of at most {MAX_LAYERS:,}", lambda value: COUNT.holds(value) and value <= MAX_LAYERS)
EXPERTS = Kind(
    f"an integer from 0 to {MAX_EXPERTS:,}", lambda value: COUNT_OR_ZERO.holds(value) and value <= MAX_EXPERTS
)
NUMBER = Kind("a number of at least 0", lambda value: _is_number(value) and value >= 0, float)
POSITIVE = Kind("a positive number", lambda value: _is_number(value) and value > 0, float)
FLAG = Kind("true or false", lambda value: value in (0, 1), bool)
FACTOR = Kind(POSITIVE.text, POSITIVE.holds, lambda value: 1.0 if value is None else float(value))
POSITIVE_OR_NONE = Kind(POSITIVE.text, POSITIVE.holds, lambda value: None if value is None else float(value))
GROUPS = Kind(COUNT_OR_ZERO.text, COUNT_OR_ZERO.holds, lambda value: value or 1)
"""As Megatron-LM has a factor of 1 and a single group: None."""
COUNT_OR_NONE = Kind(
    COUNT_OR_ZERO.text, lambda value: value is False or COUNT_OR_ZERO.holds(value), lambda value: value or 0
)
NAME = Kind("a name", lambda value: isinstance(value, str))
SCORE = Kind(f"{SOFTMAX} or {SIGMOID}", lambda value: value in (SOFTMAX, SIGMOID))
LEARNABLE = "learnable"
SOFTMAX_TYPE = Kind(
    "vanilla, off-by-one or learnable",
    lambda value: value in ("vanilla", "off-by-one", LEARNABLE),
    lambda value: value == LEARNABLE,
)
WINDOW = Kind("two integers", lambda value: _is_list(value) and len(value) == 2)
FREQUENCY = Kind("a positive integer or a list of integers", lambda value: COUNT.holds(value) or _is_list(value))
LAYOUT = Kind("a pipeline layout such as Et|tL, or a list of lists", _is_layout, _layout)
