"""Rows cut over ranks, and what each rank's tokens see; beside megatron-core's own cut of rotary angles."""

from __future__ import annotations

import itertools

import pytest
import torch

from ckptkit.errors import UsageError
from ckptkit.megatron import masks
from ckptkit.megatron.context_parallel.cut import Cut
from ckptkit.megatron.context_parallel.plan import Plan

CPU = torch.device("cpu")
BOUNDS = [(0, 16), (0, 16, 48, 48, 56), (0,)]
WINDOWS = [None, 1, 3, 8, 100]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_every_token_has_one_rank_and_comes_back_to_its_place(bounds: tuple[int, ...], ranks: int) -> None:
    cut, row = Cut(bounds, ranks), torch.arange(bounds[-1])[None]
    parts = [cut.part(row, rank, 1) for rank in range(ranks)]
    assert {part.size(1) for part in parts} == {bounds[-1] // ranks}
    joined = torch.cat(parts, dim=1)
    assert torch.equal(cut.restored(joined, 1), row)
    assert bounds[-1] == 0 or ranks == 1 or not torch.equal(joined, row)


def test_chunks_from_the_front_and_the_back() -> None:
    cut = Cut((0, 8, 24), 2)
    assert cut.tokens(0).tolist() == [0, 1, 6, 7, 8, 9, 10, 11, 20, 21, 22, 23]
    assert cut.tokens(1).tolist() == [2, 3, 4, 5, 12, 13, 14, 15, 16, 17, 18, 19]
    assert cut.positions(1).tolist() == [2, 3, 4, 5, 4, 5, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("bounds", BOUNDS[:2], ids=str)
def test_positions_are_those_that_megatron_core_rotates_by(bounds: tuple[int, ...], ranks: int) -> None:
    from megatron.core.models.common.embeddings.rope_utils import _get_thd_freqs_on_this_cp_rank

    cut = Cut(bounds, ranks)
    for rank in range(ranks):
        angles = torch.arange(max(bounds))
        theirs = [
            _get_thd_freqs_on_this_cp_rank(rank, ranks, torch.empty((end - start) // ranks), angles)
            for start, end in itertools.pairwise(bounds)
        ]
        assert cut.positions(rank).tolist() == torch.cat(theirs).tolist()


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_the_token_after_each_one(bounds: tuple[int, ...], ranks: int) -> None:
    """Also where another rank has it; nothing follows the last one of a sequence."""
    cut, row = Cut(bounds, ranks), 1 + torch.arange(bounds[-1])
    expected = torch.cat((row[1:], row.new_zeros(min(1, len(row)))))
    expected[[end - 1 for start, end in itertools.pairwise(bounds) if end > start]] = 0
    joined = torch.cat([*(cut.part(row, rank, 0) for rank in range(ranks)), row.new_zeros(1)])
    for rank in range(ranks):
        plan = Plan.of(cut, rank, [], CPU)
        assert torch.equal(joined[plan.following], cut.part(expected, rank, 0))


def test_sequences_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UsageError, match=r"a sequence of 6 tokens cannot be cut into 4 chunks.*multiple of 4"):
        Cut((0, 8, 14), 2)


def visible(bounds: tuple[int, ...], window: int | None) -> torch.Tensor:
    """Whether the token of a row is seen by that of a column, told from the definition, token by token."""
    number = [place for place, (start, end) in enumerate(itertools.pairwise(bounds)) for _ in range(start, end)]
    rows = [
        [number[q] == number[k] and k <= q and (window is None or q - k < window) for k in range(len(number))]
        for q in range(len(number))
    ]
    return torch.tensor(rows, dtype=torch.bool).reshape(len(number), len(number))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("block", [3, 1024])
def test_a_plan_shows_each_rank_what_its_tokens_see(
    monkeypatch: pytest.MonkeyPatch, bounds: tuple[int, ...], ranks: int, block: int
) -> None:
    from ckptkit.megatron.context_parallel import plan as module

    monkeypatch.setattr(module, "QUERY_BLOCK", block)
    cut = Cut(bounds, ranks)
    for rank in range(ranks):
        plan = Plan.of(cut, rank, WINDOWS, CPU)
        for window in WINDOWS:
            found = torch.zeros(bounds[-1] // ranks, bounds[-1], dtype=torch.bool)
            for queries, keys, hidden in plan.blocks[window]:
                assert not found[queries].any() and len(found[queries]) <= block
                found[queries, keys] = ~hidden
            assert torch.equal(found, visible(bounds, window)[cut.tokens(rank)]), window


def test_a_block_reads_no_more_keys_than_its_queries_see() -> None:
    (_, keys, hidden), *_ = [masks.causal_block(0, range(20, 24), 8, 5, CPU)]
    assert (keys, hidden.shape) == (slice(16, 24), (4, 8))
