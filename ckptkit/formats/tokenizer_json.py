"""tokenizer.json, as far as others need to know: which token has which id."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ckptkit.errors import InputError
from ckptkit.formats.json_files import read_json

TOKENIZER = "tokenizer.json"
FILES = (
    TOKENIZER,
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""The files of a tokenizer; no model has all of them."""

Part = TypeVar("Part")


def tokens_in(path: Path) -> dict[str, int]:
    """Every token of a tokenizer.json -> its id; those that were added included.

    Raises:
        InputError: It is not the file of a tokenizer.
    """
    return tokens_of(read_json(path), path)


def tokens_of(content: Mapping[str, Any], path: Path) -> dict[str, int]:
    """Every token of a tokenizer -> its id; those that were added included.

    Args:
        content: Its tokenizer.json.
        path: Where that was, for messages.

    Raises:
        InputError: It is no tokenizer.
    """
    found = {**part_of(vocabulary, content, path), **part_of(_added, content, path)}
    if any(type(number) is not int or number < 0 for number in found.values()):
        raise InputError("a token whose id is no number", where=path)
    return found


def part_of(part: Callable[[Mapping[str, Any]], Part], tokenizer: Mapping[str, Any], path: Path) -> Part:
    """A part of a tokenizer.json, whose inner structure is not checked before.

    Raises:
        InputError: It does not have this part.
    """
    try:
        return part(tokenizer)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"not the tokenizer.json of a tokenizer ({error})", where=path) from None


def model_of(tokenizer: Mapping[str, Any]) -> Mapping[str, Any]:
    """The section `model`, empty if there is none."""
    model = tokenizer.get("model")
    return model if isinstance(model, dict) else {}


def vocabulary(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """The tokens of the model -> their ids, without those that were added."""
    found = model_of(tokenizer).get("vocab")
    if isinstance(found, list):  # unigram models list pairs of a token and its score
        return {str(item[0]): number for number, item in enumerate(found)}
    return dict(found) if isinstance(found, dict) else {}


def _added(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    return {str(token["content"]): token["id"] for token in tokenizer.get("added_tokens") or []}
