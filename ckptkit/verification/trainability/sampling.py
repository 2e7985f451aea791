"""Completions sampled from the Megatron model itself, on all its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ckptkit.megatron import parallel
from ckptkit.megatron.pipeline import Pipeline
from ckptkit.verification.trainability.goal import GROUP, LONGEST, is_end

NO_NUMBER = -1
"""Sent in place of a token where the logits are no numbers."""


class NotFiniteError(Exception):
    """Something of the run is no number."""


@dataclass(frozen=True)
class Completions:
    """What was sampled.

    Attributes:
        rows: Token ids, prompt and completion.
        starts: Tokens of the prompt of each row.
    """

    rows: list[list[int]]
    starts: list[int]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each completion."""
        return [len(row) - start for row, start in zip(self.rows, self.starts, strict=True)]

    def weighted(self, advantages: Sequence[float]) -> list[list[float | None]]:
        """What the loss of each position counts: the advantage where the next token was sampled, else nothing."""
        return [
            [None] * (start - 1) + [advantage] * (len(row) - start) + [None]
            for row, start, advantage in zip(self.rows, self.starts, advantages, strict=True)
        ]


def sample(pipeline: Pipeline, prompts: Sequence[Sequence[int]], seed: int) -> Completions:
    """Samples `GROUP` completions of each prompt, at temperature 1.

    All ranks call this with the same arguments, and get the same. Nothing is cached: whole rows run for each token. The
    last rank draws, on the CPU, so that the device has no part in it but the logits.

    Args:
        pipeline: This rank's part of the model.
        prompts: Token ids, all of one length.
        seed: Of the draws.

    Raises:
        NotFiniteError: The logits are no numbers, on every rank.
    """
    start, draw = len(prompts[0]), torch.Generator().manual_seed(seed)
    rows = [list(prompt) for prompt in prompts for _ in range(GROUP)]
    going = list(range(len(rows)))
    for chunk in pipeline.chunks:
        chunk.eval()
    while going:
        tokens = _next_tokens(pipeline, torch.tensor([rows[at] for at in going]), draw)
        for at, token in zip(going, tokens, strict=True):
            rows[at].append(token)
        going = [at for at in going if not is_end(rows[at][-1]) and len(rows[at]) - start < LONGEST]
    for chunk in pipeline.chunks:
        chunk.train()
    return Completions(rows, [start] * len(rows))


def _next_tokens(pipeline: Pipeline, tokens: torch.Tensor, draw: torch.Generator) -> list[int]:
    """A token for each row [batch, sequence], the same on every rank."""
    logits = pipeline.next_logits(tokens)
    chosen = torch.full((len(tokens),), NO_NUMBER)
    if logits is not None and logits.isfinite().all():
        chosen = torch.multinomial(logits.softmax(-1), 1, generator=draw)[:, 0]
    chosen = parallel.broadcast(chosen.to(pipeline.device), dist.get_world_size() - 1)
    if bool((chosen == NO_NUMBER).any()):
        raise NotFiniteError("logits are no numbers")
    found: list[int] = chosen.tolist()
    return found
