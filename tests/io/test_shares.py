"""Shares cover every byte once, no two write one page, and they are of equal size."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptkit.dtypes import DTYPES
from ckptkit.io.plan import Comparison, OutputFile, Plan
from ckptkit.io.segments import Form, Place
from ckptkit.io.shares import PAGE, shares, whole
from ckptkit.tensors import Tensor


def plan_of(sizes: list[int], compared: list[int] | None = None) -> Plan:
    comparisons = [Tensor.full(DTYPES["U8"], (size,)) for size in compared or ()]
    return Plan(
        tuple(OutputFile(f"file{index}", size, ()) for index, size in enumerate(sizes)),
        tuple(Comparison(tensor, tensor, "two") for tensor in comparisons),
    )


SIZES = st.lists(st.one_of(st.integers(0, 3 * PAGE), st.integers(0, 1 << 34)), max_size=12)


@given(SIZES, st.integers(1, 9), st.lists(st.integers(0, 1 << 20), max_size=9), st.data())
def test_every_byte_has_one_owner(sizes: list[int], count: int, compared: list[int], data: st.DataObject) -> None:
    plan = plan_of(sizes, compared)
    live = data.draw(st.lists(st.sampled_from(range(len(sizes))), unique=True).map(sorted)) if sizes else []
    found = shares(plan, live, count)
    assert len(found) == count
    for index, size in enumerate(sizes):
        windows = sorted(share.windows[index] for share in found if index in share.windows)
        if index not in live:
            assert windows == []
            continue
        assert windows[0].start == 0 and windows[-1].stop == size
        for before, after in pairwise(windows):
            assert before.stop == after.start and before.stop % PAGE == 0 and before.start < before.stop
    given_out = [comparison for share in found for comparison in share.comparisons]
    assert given_out == list(plan.comparisons)
    mean = sum(sizes[index] for index in live) / count
    assert all(abs(share.nbytes - mean) <= max(PAGE, mean / 32) for share in found)


@given(SIZES)
def test_one_process_does_everything(sizes: list[int]) -> None:
    plan = plan_of(sizes, [5])
    share = whole(plan, range(len(sizes)))
    assert share.windows == {index: (0, size) for index, size in enumerate(sizes)}
    assert (share.nbytes, share.comparisons) == (plan.nbytes, list(plan.comparisons))


def test_comparisons_are_balanced_by_bytes() -> None:
    found = shares(plan_of([], [100, 1, 1, 98]), [], 2)
    assert [[item.left.nbytes for item in share.comparisons] for share in found] == [[100], [1, 1, 98]]


def stage(ranks: int, rows: int, width: int) -> list[OutputFile]:
    """Files of one form: columns of one matrix of bytes for each of `ranks`."""
    whole = Tensor.from_file("source", 0, DTYPES["U8"], (rows, width))
    size = rows * width // ranks
    form = Form(size, (Place(0, size),))
    step = width // ranks
    cuts = [partial(columns, rank * step, (rank + 1) * step) for rank in range(ranks)]
    return [OutputFile.filled(f"rank{rank}", form, [(whole, cut)]) for rank, cut in enumerate(cuts)]


def columns(start: int, stop: int, tensor: Tensor) -> Tensor:
    return tensor.cols(start, stop)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_columns_of_one_matrix_are_cut_at_one_height(count: int) -> None:
    plan = Plan(tuple(stage(4, 1 << 16, 1 << 12)))
    found = shares(plan, range(4), count)
    for share in found:
        assert set(share.windows) == {0, 1, 2, 3}
        assert len(set(share.windows.values())) == 1
    assert sum(share.nbytes for share in found) == plan.nbytes
    mean = plan.nbytes / count
    assert all(abs(share.nbytes - mean) <= mean / 32 for share in found)
    for before, after in pairwise(found):
        assert before.windows[0].stop == after.windows[0].start and before.windows[0].stop % PAGE == 0


def test_small_files_are_cut_one_by_one() -> None:
    """A cut through all of them would move by a page of each."""
    plan = Plan(tuple(stage(4, 64, 4 * PAGE)))
    found = shares(plan, range(4), 7)
    assert all(len(share.windows) < 4 for share in found)
    mean = plan.nbytes / 7
    assert all(abs(share.nbytes - mean) <= PAGE for share in found)
