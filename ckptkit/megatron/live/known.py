"""The Hugging Face directories that running models were loaded from, so that `save_hf` need not be told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from ckptkit.errors import UsageError

_references: WeakKeyDictionary[Any, Path] = WeakKeyDictionary()


def remember(chunks: Sequence[Any], reference: Path) -> None:
    """Notes where the config and the tokenizer of a model are."""
    for chunk in chunks:
        _references[chunk] = reference


def reference_of(chunks: Sequence[Any], given: str | Path | None) -> Path:
    """The directory with the config and the tokenizer of a model.

    Raises:
        UsageError: It is not known.
    """
    if given is not None:
        return Path(given)
    known = _references.get(chunks[0])
    if known is None:
        raise UsageError(
            "the running model does not say which model it is",
            hint="pass hf_reference, the directory with its config.json and tokenizer",
        )
    return known
