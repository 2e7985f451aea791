"""What is learnt: completions of a certain length. No tokenizer, no data, and any weights will do.

A completion ends with the first token that is an end token, or after `LONGEST` tokens. One id in `ENDS` is an end
token, so that lengths vary whatever the model says, with random weights too. The reward is the negative distance of
the length from `TARGET`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

KINDS = ("length",)
ENDS = 16
"""Of so many ids one is an end token."""
LONGEST = 16
"""Tokens of a completion at most."""
TARGET = 3
"""Tokens that a completion is to have."""
PROMPTS = 8
"""Prompts of a step, and of an evaluation, by default."""
PROMPT = 8
"""Tokens of a prompt."""
GROUP = 8
"""Completions of a prompt."""
SHARE = 0.5
"""Share of the initial error that may be left at the end."""
STEPS = 60
"""Steps at most by default."""
RATE = 0.15
"""The learning rate by default times the width: steps of AdamW then move outputs of any width alike."""
SEEDS = 2**31
"""Seeds are below this."""


def is_end(token: int) -> bool:
    """Whether a completion ends with a token."""
    return token % ENDS == 0


def prompts_of(count: int, vocab_size: int, seed: int, step: int) -> list[list[int]]:
    """Pseudo-random prompts, the same on every rank.

    Args:
        count: How many.
        vocab_size: Ids are below it.
        seed: Of the run.
        step: Of the run; -1 for the evaluations.
    """
    draw = random.Random(f"{seed} {step}")
    return [[draw.randrange(vocab_size) for _ in range(PROMPT)] for _ in range(count)]


def error_of(lengths: Sequence[int]) -> float:
    """Mean distance from the target, in tokens."""
    return _mean([abs(length - TARGET) for length in lengths])


def rewards_of(lengths: Sequence[int]) -> list[float]:
    """The reward of each completion."""
    return [-float(abs(length - TARGET)) for length in lengths]


def advantages_of(rewards: Sequence[float]) -> list[float]:
    """How much better each completion is than the others of its prompt, in units of the deviation over all.

    Args:
        rewards: Of all completions, those of a prompt one after the other.

    Returns:
        As many numbers; zeros if all completions of each prompt are equally good.
    """
    found: list[float] = []
    for first in range(0, len(rewards), GROUP):
        group = rewards[first : first + GROUP]
        mean = _mean(group)
        found += [reward - mean for reward in group]
    deviation = _mean([value * value for value in found]) ** 0.5
    return [value / deviation for value in found] if deviation else [0.0] * len(found)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
