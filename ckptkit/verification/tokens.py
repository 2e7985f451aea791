"""The token ids that both sides see."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from ckptkit.errors import UsageError
from ckptkit.io.stores.opening import must_be_on_disk
from ckptkit.megatron.run_config import RunConfig

SEED = 20240229
LENGTH = 48
"""Tokens of a row by default."""
BEYOND = 32
"""Tokens of a row by default beyond the widest window, where the row is cut over ranks."""


def default_length(run: RunConfig) -> int:
    """Tokens of a row by default: if ranks share it out, windows must cross the cut and hide something."""
    return max(LENGTH, run.window + BEYOND) if run.cp > 1 else LENGTH


def default_rows(vocab_size: int, rows: int = 2, length: int = LENGTH) -> list[list[int]]:
    """Pseudo-random ids, the same in every run; the first row begins with the first and the last id."""
    draw = random.Random(SEED)
    ids = [[draw.randrange(vocab_size) for _ in range(length)] for _ in range(rows)]
    ids[0][:2] = [0, vocab_size - 1][:length]
    return ids


def read_rows(path: str | Path) -> list[list[int]]:
    """Token ids from a JSON file: a list of lists, lengths may differ.

    Raises:
        UsageError: The file is not that.
    """
    must_be_on_disk(path)
    try:
        rows = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read token ids ({error})", where=path, hint="write a JSON list of lists") from None
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise UsageError("not a JSON list of lists of token ids", where=path)
    return rows


def check_rows(rows: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Refuse rows that a model cannot take.

    Raises:
        UsageError: No rows, an empty row, or an id outside of the vocabulary.
    """
    if not rows:
        raise UsageError("no token ids to compare on")
    for number, row in enumerate(rows):
        if not row:
            raise UsageError(f"row {number} of the token ids is empty")
        for token in row:
            if type(token) is not int or not 0 <= token < vocab_size:
                raise UsageError(f"token id {token!r} in row {number} is not in the vocabulary of {vocab_size}")


def group_by_length(rows: Sequence[Sequence[int]]) -> dict[int, list[int]]:
    """Length -> numbers of the rows of that length: those can run together without padding."""
    groups: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(len(row), []).append(number)
    return groups
