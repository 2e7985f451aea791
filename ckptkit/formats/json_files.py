"""JSON as input: what the standard allows and no more, of bounded size, before anybody works with it.

Python's parser also takes NaN and Infinity, keeps the last of two equal keys in silence, and makes integers of
thousands of digits that cannot be printed. No file means any of these.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ckptkit.errors import InputError
from ckptkit.io.regular import read_bounded

LARGEST = 100_000_000
"""The most bytes of a JSON file: the index of a model with 500,000 tensors has about 60 million."""

_MOST_DIGITS = 40
_OUT_OF_RANGE = 10**_MOST_DIGITS
_DEEPEST = 100
_MOST_CONTAINERS, _MOST_VALUES = 4_000_000, 10_000_000
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class JsonError(ValueError):
    """Text is not JSON; the message says why."""


class DuplicateKeyError(JsonError):
    """An object has a key twice."""

    def __init__(self, key: str) -> None:
        self.key = key
        super().__init__(f"the key {key} appears twice in one object")


def read_json(path: Path, limit: int = LARGEST) -> dict[str, Any]:
    """A JSON object.

    Args:
        path: The file.
        limit: The most bytes that it may have.

    Raises:
        InputError: There is no such file, it is no regular file, too large, or not a JSON object.
        StorageError: It cannot be read.
    """
    return parse_object(read_bounded(path, limit), path)


def parse_object(data: bytes, where: object) -> dict[str, Any]:
    """A JSON object of which every number is finite and has at most 40 digits.

    Raises:
        InputError: It is not one; the message names the field.
    """
    try:
        value = decode(data)
    except JsonError as error:
        raise InputError(f"not valid JSON ({error})", where=where) from None
    if not isinstance(value, dict):
        raise InputError("not a JSON object", where=where)
    _check_numbers(value, where)
    return value


def decode(data: bytes) -> Any:
    """The value of JSON text. Numbers are not looked at: NaN, Infinity and long integers come back as they are.

    Raises:
        JsonError: It is not JSON, names a key twice, or would take too much memory.
    """
    _check_extent(data)
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
        if _SURROGATE.search(data):  # half a character: it could not be written again
            json.dumps(value, ensure_ascii=False).encode()
    except JsonError:
        raise
    except RecursionError:
        raise JsonError("it is nested too deep") from None
    except UnicodeDecodeError as error:
        raise JsonError(f"byte {error.start:,} is not UTF-8") from None
    except UnicodeEncodeError:
        raise JsonError("a string has half a character in it") from None
    except ValueError as error:
        raise JsonError("a number of thousands of digits" if "integer string" in str(error) else str(error)) from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise DuplicateKeyError(next(key for key, count in counts.items() if count > 1))
    return found


def _check_extent(data: bytes) -> None:
    """Whether parsing takes bounded memory: an empty list has 2 bytes of text, and 60 in memory."""
    containers, values = data.count(b"{") + data.count(b"["), data.count(b",")
    if containers > _MOST_CONTAINERS or values > _MOST_VALUES:
        raise JsonError(f"it has {containers:,} objects and lists with {values:,} values, which are too many")


def _check_numbers(root: object, where: object) -> None:
    """Refuses numbers that JSON does not have, and those that no field can mean."""
    pending: list[tuple[str, int, object]] = [("", 0, root)]
    while pending:
        place, depth, value = pending.pop()
        if depth > _DEEPEST:
            raise InputError("not valid JSON (it is nested too deep)", where=where)
        if isinstance(value, float) and not math.isfinite(value):
            what = "NaN, which JSON does not have" if math.isnan(value) else "infinite, or too large to be a number"
            raise InputError(f"{place} is {what}", where=where)
        if isinstance(value, int) and not -_OUT_OF_RANGE < value < _OUT_OF_RANGE:
            raise InputError(f"{place} is an integer of more than {_MOST_DIGITS} digits", where=where)
        if isinstance(value, dict | list):
            steps = _steps(value, "." if place else "")
            pending.extend((place + step, depth + 1, inner) for step, inner in steps)


def _steps(value: dict[str, Any] | list[Any], dot: str) -> Iterator[tuple[str, Any]]:
    """How places inside a container are written, for all that may hold a number."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    form = (dot + "{}") if isinstance(value, dict) else "[{}]"
    return ((form.format(key), inner) for key, inner in items if type(inner) is not str)
