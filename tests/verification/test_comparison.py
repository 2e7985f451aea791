from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptkit.errors import VerificationError
from ckptkit.verification.comparison import compare, compare_greedy, noise_floor, noise_ratios, quantiles
from ckptkit.verification.location import locate
from ckptkit.verification.probes import places
from ckptkit.verification.runs import Run, row_logits, save_logits, save_probes

STATES = ("self_attention", "mlp", "output")
ROWS = [[1, 2, 3], [4, 5, 6], [7]]


def made(path: Path, three: torch.Tensor, one: torch.Tensor) -> Run:
    """A run over `ROWS`: logits of the rows of length 3 and of the row of length 1."""
    save_logits(path, {3: three, 1: one})
    return Run(ROWS, path)


@pytest.fixture
def exact(tmp_path: Path) -> Run:
    torch.manual_seed(0)
    return made(tmp_path / "exact", torch.randn(2, 3, 11) * 4, torch.randn(1, 1, 11))


def altered(run: Run, path: Path, row: int, position: int, token: int, value: float) -> Run:
    with row_logits(run) as rows:
        parts = [rows[number][slice(0, len(tokens))].clone() for number, tokens in enumerate(ROWS)]
    parts[row][position, token] = value
    return made(path, torch.stack(parts[:2]), parts[2][None])


def test_equal_runs_agree(exact: Run) -> None:
    figures = compare(exact, exact)
    assert (figures.relative_error, figures.top1_agreement) == (0.0, 1.0)
    assert figures.kl_max == pytest.approx(0.0, abs=1e-12)
    assert [len(line) for line in figures.per_position] == [3, 3, 1]


def test_the_worst_position_is_found(exact: Run, tmp_path: Path) -> None:
    figures = compare(exact, altered(exact, tmp_path / "other", 1, 2, 5, 100.0))
    assert figures.worst == (1, 2)
    assert figures.relative_error == figures.per_position[1][2] > 1
    assert sum(error > 0 for line in figures.per_position for error in line) == 1
    assert figures.top1_agreement == pytest.approx(6 / 7)
    assert figures.kl_max > 10 and figures.kl_mean == pytest.approx(figures.kl_max / 7)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["reference", "candidate"])
def test_what_is_not_finite_never_passes(exact: Run, tmp_path: Path, value: float, side: str) -> None:
    broken = altered(exact, tmp_path / "other", 2, 0, 3, value)
    figures = compare(broken, exact) if side == "reference" else compare(exact, broken)
    assert not figures.finite and figures.non_finite[side] == 1
    assert figures.worst == (2, 0) and not figures.relative_error <= 1e30
    for low, found in ((exact, broken), (broken, exact), (broken, broken)):
        assert math.inf in noise_ratios(exact, [low], found)[2]
    assert not noise_floor(exact, exact, broken)[0].passed


def test_noise_is_measured_in_units_of_the_reference(exact: Run, tmp_path: Path) -> None:
    def noisy(name: str, scale: float) -> Run:
        torch.manual_seed(1)
        with row_logits(exact) as rows:
            parts = [rows[number][slice(0, len(tokens))] for number, tokens in enumerate(ROWS)]
        parts = [part + scale * torch.randn_like(part) for part in parts]
        return made(tmp_path / name, torch.stack(parts[:2]), parts[2][None])

    low = noisy("low", 0.01)
    for factor, passes in ((0.5, True), (1.2, True), (1.3, False), (3.0, False)):
        floor, _ = noise_floor(exact, low, noisy("found", 0.01 * factor))
        assert floor.median == pytest.approx(factor, rel=1e-3)
        assert floor.passed == passes
    twice = replace(low, again=noisy("quieter", 0.005).logits)
    floor, _ = noise_floor(exact, twice, noisy("found", 0.01))
    assert floor.median == pytest.approx((2 / 1.25) ** 0.5, rel=1e-3)  # of two samples the mean square
    assert floor.samples == 2 and floor.repeat_median == pytest.approx(0.5, rel=1e-3)
    assert noise_floor(exact, exact, exact)[0].passed  # no noise at all is met by none
    assert not noise_floor(exact, exact, low)[0].passed
    # A second run that is no correct one must not raise the limit for the candidate.
    faulty = replace(low, again=noisy("loud", 3.0).logits)
    floor, _ = noise_floor(exact, faulty, noisy("found", 1.5))
    assert not floor.passed and floor.median == pytest.approx(150, rel=1e-2)
    assert floor.samples == 1 and floor.repeat_median == pytest.approx(300, rel=1e-2)


@settings(max_examples=30)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=300))
def test_quantiles_are_members_that_enough_others_do_not_exceed(ratios: list[float]) -> None:
    for value, share in zip(quantiles([ratios]), (0.5, 0.99), strict=True):
        assert value in ratios
        assert sum(ratio <= value for ratio in ratios) >= share * len(ratios)
        assert sum(ratio < value for ratio in ratios) < share * len(ratios)


def test_greedy_ties_are_not_differences(tmp_path: Path) -> None:
    theirs = torch.zeros(2, 3, 11)
    theirs[0, 1, 3] = theirs[1, 1, 6] = 5.0
    exact = made(tmp_path / "a", theirs, torch.zeros(1, 1, 11))
    rows = Run(ROWS[:2], exact.logits)
    assert compare_greedy(rows, rows, 1, 5.0)[0].equal == 2
    ours = theirs.clone()
    ours[0, 1, 7] = 5.1
    found = Run(rows.rows, made(tmp_path / "b", ours, torch.zeros(1, 1, 11)).logits)
    greedy, parted = compare_greedy(rows, found, 1, 5.0)
    assert not greedy.passed and parted == [(0, 1)]
    tied = theirs.clone()
    tied[0, 1, 7] = 5.0 - 4e-6
    tied_run = Run(rows.rows, made(tmp_path / "c", tied, torch.zeros(1, 1, 11)).logits)
    greedy, parted = compare_greedy(tied_run, found, 1, 5.0)
    assert greedy.passed and (greedy.equal, greedy.ties) == (1, 1) and not parted


def test_a_missing_file_is_not_a_difference(exact: Run, tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="all ranks must share the directory"):
        compare(exact, Run(ROWS, tmp_path / "absent"))


def probed(folder: Path, noise: dict[str, float], layers: int = 2, ranks: int = 1, head: float = 0.0) -> Run:
    """One row of 3 tokens with hidden states that carry `noise` from a place on."""
    torch.manual_seed(0)
    states, level = {}, 0.0
    for place in places(layers, STATES):
        state = torch.randn(3, 8)
        level = max(level, noise.get(place, 0.0))
        states[place] = state + level * torch.ones(3, 8)
    for rank in range(ranks):
        bad = {name: state * (1 + 0.1 * (rank > 0 and name == "final_norm")) for name, state in states.items()}
        save_probes(folder / "probes", bad, rank)
    save_logits(folder / "logits", {3: torch.randn(1, 3, 11) + head})
    feeds = {place: [f"tensor of {place}"] for place in [*places(layers, STATES), "head"]}
    return Run([[1, 2, 3]], folder / "logits", probes=folder / "probes", feeds=feeds)


def at(location: object) -> str:
    return getattr(location, "place", "nowhere")


def test_the_first_jump_is_the_place(tmp_path: Path) -> None:
    exact = probed(tmp_path / "exact", {})
    assert locate(exact, exact) is None
    for place in places(2, STATES):
        found = locate(exact, probed(tmp_path / place, {place: 0.01}))
        assert found is not None and found.tensors == [f"tensor of {place}"]
    jump = locate(exact, probed(tmp_path / "jump", {"embedding": 1e-6, "layers.1.mlp": 1e-3, "final_norm": 0.5}))
    assert at(jump) == "layer 1 mlp"
    assert at(locate(exact, probed(tmp_path / "noise", {"embedding": 1e-6}))) == "nowhere"
    assert at(locate(exact, probed(tmp_path / "head", {}, head=0.1))) == "head"
    # No step is tenfold, and the steepest, fivefold, is twice as steep as the one before it.
    creeping = {"embedding": 6e-6, "layers.0.mlp": 1.2e-5, "layers.1.mlp": 9e-5, "final_norm": 1e-4}
    assert at(locate(exact, probed(tmp_path / "creep", creeping))) == "layer 1 mlp"


def test_tensor_ranks_must_agree_and_layers_must_exist(tmp_path: Path) -> None:
    exact = probed(tmp_path / "exact", {})
    assert at(locate(exact, probed(tmp_path / "ranks", {}, ranks=2))) == "final norm"
    assert at(locate(exact, probed(tmp_path / "short", {}, layers=1))) == "layer 1 self_attention"
