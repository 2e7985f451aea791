"""How rows are shared out: every one once, and as much on every rank."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckptkit.verification.tokens import group_by_length
from ckptkit.verification.training.batches import Sharing, counted, tokens_that_count, values_to_learn

ROWS = st.lists(st.lists(st.integers(1, 249), min_size=1, max_size=12), min_size=1, max_size=7)


def experts_of(rows: list[list[int]]) -> dict[int, dict[int, torch.Tensor]]:
    """Experts that can be told apart: those of a token are its own id."""
    groups = group_by_length(rows)
    return {
        length: {1: torch.tensor([rows[number] for number in numbers])[..., None]} for length, numbers in groups.items()
    }


@given(
    ROWS,
    st.integers(1, 4),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([None, 1, 9, 100]),
    st.booleans(),
    st.integers(1, 3),
)
def test_every_row_once(
    rows: list[list[int]], ranks: int, multiple: int, split: int, capacity: int | None, cut: bool, most: int
) -> None:
    dealt = [
        Sharing(ranks, rank, multiple, split, capacity, cut, most).deal(rows, experts_of(rows)) for rank in range(ranks)
    ]
    assert len({len(batches) for batches in dealt}) == 1 and len(dealt[0]) % multiple == 0
    for together in zip(*dealt, strict=True):
        shapes = {tuple(batch.tokens.shape) for batch in together}
        assert len(shapes) == 1
        count, length = shapes.pop()
        assert length % split == 0 and count <= (most if capacity is None else 1)
    pairs: list[tuple[int, int]] = []
    for batches in dealt:
        for batch in batches:
            assert batch.tokens.shape == batch.labels.shape == batch.counted.shape
            pairs += zip(batch.tokens[batch.counted].tolist(), batch.labels[batch.counted].tolist(), strict=True)
            for chosen in batch.experts.values():
                filled = chosen[..., 0] < 0
                assert cut or capacity is None or not filled.any()
                assert len(chosen) == len(batch.tokens)
                assert not batch.counted[:, : chosen.size(1)][filled].any()
                assert torch.equal(chosen[..., 0][~filled], batch.tokens[:, : chosen.size(1)][~filled])
            if capacity is not None:
                assert batch.packed is not None and torch.equal(batch.packed.input_ids, batch.tokens[0])
                assert not cut or not any(length % split for length in batch.packed.lengths)
    expected = [(row[at], row[at + 1]) for row in rows for at, counts in enumerate(counted(row)) if counts]
    assert sorted(pairs) == sorted(expected)
    assert len(pairs) == tokens_that_count(rows)


@given(ROWS, st.integers(1, 4), st.sampled_from([1, 2, 4]), st.sampled_from([None, 9, 100]), st.booleans())
def test_targets_stay_with_their_tokens(
    rows: list[list[int]], ranks: int, split: int, capacity: int | None, cut: bool
) -> None:
    targets = [[token / 256 for token in row] for row in rows]
    found = []
    for rank in range(ranks):
        for batch in Sharing(ranks, rank, 1, split, capacity, cut).deal(rows, {}, targets):
            assert batch.targets is not None and torch.equal(batch.targets, batch.tokens / 256)
            found += batch.tokens[batch.counted].tolist()
    assert len(found) == tokens_that_count(rows)


def test_values_to_learn_follow_from_the_next_token() -> None:
    assert values_to_learn([5, 0, 7]) == [1.0, math.cos(7), 0.0]
    assert [values_to_learn(row) for row in ([5], [])] == [[0.0], []]


@pytest.mark.parametrize("capacity", [None, 9])
def test_weights_stay_with_their_positions(capacity: int | None) -> None:
    """The weight of a position is a tenth of the id that follows it; what has none does not count."""
    rows = [[1, 2, 3], [4, 5, 6, 7, 8], [9, 10]]
    weights = [[None, *(token / 10 for token in row[2:]), None] for row in rows]
    found = {}
    for batch in Sharing(1, 0, capacity=capacity, together=2).deal(rows, {}, weights=weights):
        assert batch.weights is not None and not batch.weights[~batch.counted].any()
        labels, values = batch.labels[batch.counted], batch.weights[batch.counted]
        found |= dict(zip(labels.tolist(), values.tolist(), strict=True))
    assert found == pytest.approx({3: 0.3, 6: 0.6, 7: 0.7, 8: 0.8})


def test_the_prompt_and_the_last_token_do_not_count() -> None:
    assert counted(range(8)) == [False, False, True, True, True, True, True, False]
    assert counted([5]) == [False]


@pytest.mark.parametrize(("capacity", "sizes"), [(None, [3, 4, 5]), (7, [7, 5]), (100, [12]), (1, [3, 4, 5])])
def test_capacity(capacity: Any, sizes: list[int]) -> None:
    rows = [[1] * 3, [2] * 4, [3] * 5]
    assert [batch.tokens.size(1) for batch in Sharing(1, 0, capacity=capacity).deal(rows, {})] == sizes
