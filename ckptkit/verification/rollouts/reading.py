"""The file of rollouts: JSON lines, read one at a time and checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ckptkit.errors import InputError
from ckptkit.formats.json_files import parse_object
from ckptkit.io.regular import open_regular
from ckptkit.io.system import storage_error
from ckptkit.verification.rollouts.conversations import Joined, join
from ckptkit.verification.rollouts.records import Turn, turns_of

LONGEST_LINE = 100_000_000
"""Bytes of a line, at most: routing of a long answer takes some ten million."""
MOST_TOKENS = 100_000_000
"""Tokens of all rows, at most."""


@dataclass(frozen=True)
class Rollouts:
    """What a file holds.

    Attributes:
        path: The file.
        joined: Its rows.
        shapes: What recorded it -> turns.
        unrecorded: Sampled tokens whose log-probability was not recorded, or was minus infinity.
    """

    path: str
    joined: Joined
    shapes: dict[str, int]
    unrecorded: int


def read_rollouts(path: str | Path) -> Rollouts:
    """Reads a file of rollouts.

    Raises:
        InputError: A line is damaged or has no known shape, or nothing was recorded.
        StorageError: It cannot be read.
    """
    shapes: Counter[str] = Counter()

    def counted() -> Iterator[Turn]:
        for turn in _turns(Path(path)):
            shapes[turn.shape] += 1
            yield turn

    joined = join(counted())
    sampled = [value for row in joined.rows for value in row.logprobs]
    if all(value is None for value in sampled):
        raise InputError(
            "no log-probability of a sampled token", where=path, hint="record those of the tokens that were sampled"
        )
    given = sum(value is not None for value in sampled)
    return Rollouts(str(path), joined, dict(shapes), sum(row.sampled for row in joined.rows) - given)


def _turns(path: Path) -> Iterator[Turn]:
    total = 0
    for number, line in _lines(path):
        record = parse_object(line, f"{path}, line {number}")
        _, turns = turns_of(record, path, number)
        for turn in turns:
            total += len(turn.prompt) + len(turn.tokens)
            if total > MOST_TOKENS:
                raise InputError(f"more than {MOST_TOKENS:,} tokens", where=path, hint="verify a part of it")
            yield turn


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number, from 1, and text of the lines that are not empty."""
    try:
        with open(open_regular(path), "rb") as file:
            number = 0
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    raise InputError(f"line {number} is longer than {LONGEST_LINE:,} bytes", where=path)
                if line.strip():
                    yield number, line
    except FileNotFoundError:
        raise InputError("there is no such file", where=path) from None
    except OSError as error:
        raise storage_error(error, path) from error
