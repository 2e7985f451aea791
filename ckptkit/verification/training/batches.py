"""Rows of tokens as training sees them: which positions count, and which rows go through the model together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ckptkit.verification.tokens import group_by_length

if TYPE_CHECKING:
    from ckptkit.megatron.training import Microbatch

_LINES = 5
"""What is known of each position of a sequence: see `Sharing._part`."""
PROMPT = 4
"""The first 1 / PROMPT of a row is a prompt, which is no target."""
Row = Sequence[int]
Weights = Sequence[float | None]
"""What the loss of each position of a row counts; None for nothing."""
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
        capacity: Tokens of a packed row, unless one sequence is longer; None for plain rows.
        cut: Whether the length of every sequence is a multiple of `split`, too, for context parallel ranks to share it
            out.
        together: Plain rows of a microbatch, padded at the end to one length.
    """

    ranks: int
    rank: int
    multiple: int = 1
    split: int = 1
    capacity: int | None = None
    cut: bool = False
    together: int = 1

    def deal(
        self,
        rows: Sequence[Row],
        experts: Experts,
        targets: Sequence[Sequence[float]] | None = None,
        *,
        weights: Sequence[Weights] | None = None,
    ) -> list[Microbatch]:
        """The microbatches of this rank.

        Every rank has as many, and microbatches of one number have one shape on all ranks: expert parallel ranks
        exchange their tokens. What fills up counts nothing.

        Args:
            rows: Token ids of all ranks' rows.
            experts: What the tokens are routed to; empty for the routers' own choice.
            targets: For each token what a value model should give; None for a language model.
            weights: What each position of each row counts, None for nothing; without it the tokens behind the prompt
                count 1.
        """
        dealt = [self._groups(rows, range(rank, len(rows), self.ranks)) for rank in range(self.ranks)]
        number = -(-max(map(len, dealt)) // self.multiple) * self.multiple
        for groups in dealt:
            groups += [[] for _ in range(number - len(groups))]
        shapes = [self._shape(rows, [groups[place] for groups in dealt]) for place in range(number)]
        of_length = group_by_length(rows)
        places = {at: place for numbers in of_length.values() for place, at in enumerate(numbers)}
        found = []
        for group, shape in zip(dealt[self.rank], shapes, strict=True):
            parts = [
                self._part(rows[at], None if weights is None else weights[at], None if targets is None else targets[at])
                for at in group
            ]
            chosen = [_of_row(experts, len(rows[at]), places[at]) for at in group if experts]
            batch = self._microbatch(parts, shape, chosen)
            found.append(
                replace(
                    batch,
                    targets=None if targets is None else batch.targets,
                    weights=None if weights is None else batch.weights,
                )
            )
        return found

    def _groups(self, rows: Sequence[Row], numbers: Sequence[int]) -> list[list[int]]:
        """Numbers of the rows of one rank, those of one microbatch together."""
        groups: list[list[int]] = []
        filled = 0
        for number in numbers:
            length = self._filled(len(rows[number]))
            full = len(groups[-1]) >= self.together if groups and self.capacity is None else False
            if not groups or full or (self.capacity is not None and filled + length > self.capacity):
                groups.append([])
                filled = 0
            groups[-1].append(number)
            filled += length
        return groups

    def _shape(self, rows: Sequence[Row], groups: Sequence[Sequence[int]]) -> tuple[int, int]:
        """Rows and their length of the microbatches of one number on all ranks."""
        lengths = [[self._filled(len(rows[at])) for at in group] for group in groups]
        packed = self.capacity is not None
        longest = max(sum(part) if packed else max(part, default=0) for part in lengths)
        count = 1 if packed else max(1, *map(len, lengths))
        return count, -(-max(self.split, longest) // self.split) * self.split

    def _filled(self, length: int) -> int:
        """The length that a sequence is filled up to."""
        return -(-length // self.split) * self.split if self.cut else length

    def _part(self, row: Row, weights: Weights | None, targets: Sequence[float] | None) -> torch.Tensor:
        """A sequence, filled up: tokens, the next ones, whether these count, how much, targets; float64 [5, length].

        Token ids are whole numbers below 2^53, so float64 has them exactly.
        """
        given = [1.0 if counts else None for counts in counted(row)] if weights is None else weights
        counts = [0.0 if weight is None else 1.0 for weight in given]
        values = [0.0 if weight is None else weight for weight in given]
        wanted = [0.0] * len(row) if targets is None else [*targets]
        part = torch.tensor([[*row], [*row[1:], 0], counts, values, wanted], dtype=torch.float64)
        return F.pad(part, (0, self._filled(len(row)) - len(row)))

    def _microbatch(
        self,
        parts: Sequence[torch.Tensor],
        shape: tuple[int, int],
        experts: Sequence[Mapping[int, torch.Tensor]],
    ) -> Microbatch:
        from ckptkit.megatron.packed_inputs.batch import PackedBatch
        from ckptkit.megatron.training import Microbatch

        packed = None
        lines = [F.pad(part, (0, shape[1] - part.size(1))) for part in parts]
        if self.capacity is not None:
            packed = PackedBatch.of_rows([part[0].long().tolist() for part in parts]).filled(shape[1])
            joined = torch.cat([torch.zeros(_LINES, 0, dtype=torch.float64), *parts], dim=1)
            lines = [F.pad(joined, (0, shape[1] - joined.size(1)))]
        lines += [torch.zeros(_LINES, shape[1], dtype=torch.float64)] * (shape[0] - len(lines))
        tokens, labels, counts, weights, targets = torch.stack(lines, dim=1)
        lengths = [part.size(1) for part in parts]
        return Microbatch(
            tokens.long(),
            labels.long(),
            counts.bool(),
            packed,
            targets,
            {layer: self._chosen([part[layer] for part in experts], lengths, shape) for layer in _layers(experts)},
            weights=weights.float(),
        )

    def _chosen(self, experts: Sequence[torch.Tensor], lengths: Sequence[int], shape: tuple[int, int]) -> torch.Tensor:
        """Experts of the tokens of a microbatch, int64 [rows, length, experts per token]; -1 for what fills up."""
        filled = [_behind(part, length) for part, length in zip(experts, lengths, strict=True)]
        if self.capacity is not None:
            return torch.cat(filled)[None]
        lines = [_behind(part, shape[1]) for part in filled]
        return torch.stack([*lines, *[torch.full_like(lines[0], -1)] * (shape[0] - len(lines))])


def _behind(experts: torch.Tensor, length: int) -> torch.Tensor:
    """Experts of a row, int64 [tokens, experts per token], with -1 behind up to a length."""
    return F.pad(experts, (0, 0, 0, length - experts.size(0)), value=-1)


def _layers(experts: Sequence[Mapping[int, torch.Tensor]]) -> list[int]:
    return list(experts[0]) if experts else []


def _of_row(experts: Experts, length: int, place: int) -> dict[int, torch.Tensor]:
    """Layer -> experts of one row, int64 [length, experts per token]."""
    return {layer: chosen[place] for layer, chosen in experts[length].items()}
