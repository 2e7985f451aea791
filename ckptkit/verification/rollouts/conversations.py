"""Turns of a conversation as one row: each prompt extends the turn before it, token by token."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ckptkit.verification.rollouts.records import Turn
from ckptkit.verification.rollouts.routing import Recorded


@dataclass
class Row:
    """A sequence that goes through the model once.

    Attributes:
        tokens: Token ids.
        logprobs: The engine's log-probability of each token that it sampled; None for others.
        prompt_logprobs: Those of tokens of prompts, where the engine gave them.
        prompt: Tokens of the first prompt.
        sampled: Tokens that the engine sampled, or was made to take.
        routings: What was recorded of the experts, turn by turn.
        lines: Lines of the file that it is made of.
    """

    tokens: list[int]
    logprobs: list[float | None]
    prompt_logprobs: list[float | None]
    prompt: int
    sampled: int = 0
    routings: list[Recorded] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)

    def extend(self, turn: Turn) -> None:
        """Appends a turn, whose prompt begins with all tokens of the row."""
        more = turn.prompt[len(self.tokens) :]
        given = turn.prompt_logprobs[len(self.tokens) :] or [None] * len(more)
        self.tokens += [*more, *turn.tokens]
        self.logprobs += [*[None] * len(more), *turn.logprobs]
        self.prompt_logprobs += [*given, *[None] * len(turn.tokens)]
        self.sampled += len(turn.tokens)
        self.lines.append(turn.line)
        if turn.routing is not None:
            self.routings.append(turn.routing)


@dataclass(frozen=True)
class Joined:
    """The rows of a file.

    Attributes:
        rows: In the order of their first turns.
        turns: How many turns there were.
        joined: Turns that continue another one.
        apart: Turns whose prompt continues the prompt of another turn, but not what was sampled after it: rendered
            again, cut, or summarised. They stay rows of their own.
    """

    rows: list[Row]
    turns: int
    joined: int
    apart: int


def join(turns: Iterable[Turn]) -> Joined:
    """Joins turns. Of several samples of one prompt, each goes on by itself."""
    rows: list[Row] = []
    ends: dict[tuple[int, int], list[Row]] = {}
    prompts: set[tuple[int, int]] = set()
    lengths: set[int] = set()
    count = joined = apart = 0
    for turn in turns:
        count += 1
        hashes = _prefixes(turn.prompt, lengths)
        row = _continued(turn.prompt, hashes, ends)
        if row is None:
            begun = any((length, hash_) in prompts and length < len(turn.prompt) for length, hash_ in hashes)
            apart += begun
            row = Row([], [], [], len(turn.prompt))
            rows.append(row)
        else:
            joined += 1
        row.extend(turn)
        prompts.add((len(turn.prompt), _hash(turn.prompt)))
        ends.setdefault((len(row.tokens), _hash(row.tokens)), []).append(row)
        lengths |= {len(turn.prompt), len(row.tokens)}
    return Joined(rows, count, joined, apart)


def _continued(prompt: list[int], hashes: list[tuple[int, int]], ends: dict[tuple[int, int], list[Row]]) -> Row | None:
    """The longest row that a prompt begins with, no longer among `ends`."""
    for key in reversed(hashes):
        waiting = ends.get(key, [])
        for row in waiting:
            if row.tokens == prompt[: len(row.tokens)]:
                waiting.remove(row)
                return row
    return None


def _hash(tokens: list[int]) -> int:
    value = 0
    for token in tokens:
        value = hash((value, token))
    return value


def _prefixes(tokens: list[int], lengths: set[int]) -> list[tuple[int, int]]:
    """Length and hash of the prefixes whose length is one of `lengths`, shortest first."""
    found, value = [], 0
    for length, token in enumerate(tokens, 1):
        value = hash((value, token))
        if length in lengths:
            found.append((length, value))
    return found
