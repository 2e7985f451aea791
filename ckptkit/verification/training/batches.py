"""Rows of tokens as training sees them: which positions count, and which rows go through the model together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ckptkit.verification.tokens import group_by_length

if TYPE_CHECKING:
    from ckptkit.megatron.training import Microbatch

PROMPT = 4
"""The first 1 / PROMPT of a row is a prompt, which is no target."""
Row = Sequence[int]
Experts = Mapping[int, Mapping[int, torch.Tensor]]
"""Length of a row -> layer -> experts of the rows of that length, int64 [rows, length, experts per token]."""


def counted(row: Row) -> list[bool]:
    """Which positions of a row count: those whose next token is there and no part of the prompt."""
    first = len(row) // PROMPT
    return [first <= at < len(row) - 1 for at in range(len(row))]


def tokens_that_count(rows: Sequence[Row]) -> int:
    """How many positions of some rows do."""
    return sum(sum(counted(row)) for row in rows)


def values_to_learn(row: Row) -> list[float]:
    """What a value model should give at each position of a row, in [-1, 1].

    It is the cosine of the id of the next token: a number that follows from the tokens alone, and another one at every
    position. The last position, which never counts, has 0.
    """
    return [*(math.cos(token) for token in row[1:]), *[0.0] * bool(row)]


@dataclass(frozen=True)
class Sharing:
    """How rows are shared out over data parallel ranks and microbatches.

    Attributes:
        ranks: Data parallel ranks, those that share experts included.
        rank: This one.
        multiple: The number of microbatches is a multiple of this.
        split: The length of a microbatch is a multiple of this.
        capacity: Tokens of a packed row, unless one sequence is longer; None for plain rows, each by itself.
        cut: Whether the length of every sequence is a multiple of `split`, too, for context parallel ranks to share it
            out.
    """

    ranks: int
    rank: int
    multiple: int = 1
    split: int = 1
    capacity: int | None = None
    cut: bool = False

    def deal(
        self, rows: Sequence[Row], experts: Experts, targets: Sequence[Sequence[float]] | None = None
    ) -> list[Microbatch]:
        """The microbatches of this rank.

        Every rank has as many, and microbatches of one number are equally long on all ranks: expert parallel ranks
        exchange their tokens. What fills up counts nothing.

        Args:
            rows: Token ids of all ranks' rows.
            experts: What the tokens are routed to; empty for the routers' own choice.
            targets: For each token what a value model should give; None for a language model.
        """
        dealt = [self._groups(rows, range(rank, len(rows), self.ranks)) for rank in range(self.ranks)]
        number = -(-max(map(len, dealt)) // self.multiple) * self.multiple
        for groups in dealt:
            groups += [[] for _ in range(number - len(groups))]
        lengths = [
            max(self.split, max(sum(self._filled(len(rows[at])) for at in groups[place]) for groups in dealt))
            for place in range(number)
        ]
        of_length = group_by_length(rows)
        places = {at: place for numbers in of_length.values() for place, at in enumerate(numbers)}
        return [
            self._microbatch(
                [rows[at] for at in group],
                -(-length // self.split) * self.split,
                [_of_row(experts, len(rows[at]), places[at]) for at in group if experts],
                None if targets is None else [targets[at] for at in group],
            )
            for group, length in zip(dealt[self.rank], lengths, strict=True)
        ]

    def _groups(self, rows: Sequence[Row], numbers: Sequence[int]) -> list[list[int]]:
        """Numbers of the rows of one rank, those of one microbatch together."""
        groups: list[list[int]] = []
        filled = 0
        for number in numbers:
            if not groups or self.capacity is None or filled + self._filled(len(rows[number])) > self.capacity:
                groups.append([])
                filled = 0
            groups[-1].append(number)
            filled += self._filled(len(rows[number]))
        return groups

    def _filled(self, length: int) -> int:
        """The length that a sequence is filled up to."""
        return -(-length // self.split) * self.split if self.cut else length

    def _microbatch(
        self,
        rows: Sequence[Row],
        length: int,
        experts: Sequence[Mapping[int, torch.Tensor]],
        targets: Sequence[Sequence[float]] | None,
    ) -> Microbatch:
        from ckptkit.megatron.packed_inputs.batch import PackedBatch
        from ckptkit.megatron.training import Microbatch

        missing = [self._filled(len(row)) - len(row) for row in rows]
        lists = [[*row, *[0] * more] for row, more in zip(rows, missing, strict=True)]
        tokens = [token for row in lists for token in row]
        labels = [token for row in lists for token in [*row[1:], 0]]
        counts = [count for row, more in zip(rows, missing, strict=True) for count in [*counted(row), *[False] * more]]
        packed = PackedBatch.of_rows(lists).filled(length) if self.capacity is not None else None
        chosen = {
            layer: torch.cat(
                [F.pad(part[layer], (0, 0, 0, more), value=-1) for part, more in zip(experts, missing, strict=True)]
            )[None]
            for layer in (experts[0] if experts else ())
        }
        parts = (torch.tensor([part], dtype=torch.int64) for part in (tokens, labels, counts))
        tokens_, labels_, counts_ = (F.pad(part, (0, length - part.size(1))) for part in parts)
        wanted = None
        if targets is not None:
            values = [value for row, more in zip(targets, missing, strict=True) for value in [*row, *[0.0] * more]]
            wanted = torch.tensor([[*values, *[0.0] * (length - len(values))]], dtype=torch.float64)
        return Microbatch(tokens_, labels_, counts_.bool(), packed, wanted, chosen)


def _of_row(experts: Experts, length: int, place: int) -> dict[int, torch.Tensor]:
    """Layer -> experts of one row, int64 [length, experts per token]."""
    return {layer: chosen[place] for layer, chosen in experts[length].items()}
