"""Which tokens of a row each context parallel rank has.

Every sequence is cut into twice as many chunks as there are ranks. Rank i has chunk i from the front and chunk i from
the back, so that under a causal mask all ranks have as much to do (source: `get_batch_on_this_cp_rank` of
megatron-core). In a packed row every sequence is cut like that, and a rank has its parts one after the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ckptkit.errors import UsageError


@dataclass(frozen=True)
class Cut:
    """How a row is shared out.

    Attributes:
        bounds: The first token of each sequence and the end of the last one, from 0.
        ranks: Context parallel ranks.

    Raises:
        UsageError: A sequence does not divide into chunks.
    """

    bounds: tuple[int, ...]
    ranks: int

    def __post_init__(self) -> None:
        for start, end in itertools.pairwise(self.bounds):
            if (end - start) % (2 * self.ranks):
                raise UsageError(
                    f"a sequence of {end - start} tokens cannot be cut into {2 * self.ranks} chunks",
                    hint=f"fill it up to a multiple of {2 * self.ranks}",
                )

    @classmethod
    def of_length(cls, length: int, ranks: int) -> Cut:
        """That of a row of one sequence."""
        return cls((0, length), ranks)

    def chunks(self, rank: int) -> Iterator[tuple[int, range]]:
        """The first token of each sequence, and the tokens of each of a rank's chunks, in its order."""
        for start, end in itertools.pairwise(self.bounds):
            width = (end - start) // (2 * self.ranks)
            for number in (rank, 2 * self.ranks - 1 - rank):
                yield start, range(start + number * width, start + (number + 1) * width)

    def tokens(self, rank: int) -> torch.Tensor:
        """The tokens of a rank, int64 (total / ranks,)."""
        return _joined([torch.arange(chunk.start, chunk.stop) for _, chunk in self.chunks(rank)])

    def positions(self, rank: int) -> torch.Tensor:
        """Their places in their sequences, int64 (total / ranks,)."""
        return _joined([torch.arange(chunk.start - first, chunk.stop - first) for first, chunk in self.chunks(rank)])

    def order(self) -> torch.Tensor:
        """Where each token of the row is if the parts of all ranks are joined, int64 (total,)."""
        return torch.cat([self.tokens(rank) for rank in range(self.ranks)]).argsort()

    def following(self, rank: int) -> torch.Tensor:
        """Where the token after each token of a rank is if the parts of all ranks are joined, int64 (total / ranks,).

        Behind the end of a sequence it is `total`.
        """
        total, after = self.bounds[-1], self.tokens(rank) + 1
        inside = ~torch.isin(after, torch.tensor(self.bounds))
        return torch.cat((self.order(), torch.tensor([total])))[torch.where(inside, after, total)]

    def part(self, whole: torch.Tensor, rank: int, dim: int) -> torch.Tensor:
        """A rank's part of something that has the tokens of the row along `dim`."""
        return whole.index_select(dim, self.tokens(rank).to(whole.device))

    def restored(self, joined: torch.Tensor, dim: int) -> torch.Tensor:
        """The parts of all ranks, joined along `dim`, in the order of the row."""
        return joined.index_select(dim, self.order().to(joined.device))


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(parts)) if parts else torch.empty(0, dtype=torch.int64)
