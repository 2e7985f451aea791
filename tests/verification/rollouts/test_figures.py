"""The figures, against their definitions in torch, and what is told from rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckptkit.verification.rollouts.figures import column, curve
from ckptkit.verification.rollouts.judging import LEAST, Floor, explain, floor_of, judge
from ckptkit.verification.rollouts.options import RolloutOptions
from ckptkit.verification.rollouts.scores import GRID, fit_temperature, logprobs_at, score


def logits(tokens: int = 200, vocabulary: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and tokens sampled from them."""
    draw = torch.Generator().manual_seed(3)
    found = 3 * torch.randn(tokens, vocabulary, generator=draw, dtype=torch.float64)
    return found, torch.multinomial(found.softmax(-1), 1, generator=draw)[:, 0]


def taken(values: torch.Tensor, following: torch.Tensor) -> np.ndarray:
    return values.gather(1, following[:, None])[:, 0].numpy()


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 1.1, 3.9])
def test_scores_give_log_probabilities_at_any_temperature(temperature: float) -> None:
    found, following = logits()
    scores = score(found[None], following[None], GRID)[0].numpy()
    expected = taken((found / temperature).log_softmax(-1), following)
    assert np.abs(logprobs_at(scores, GRID, 1 / temperature) - expected).max() < 2e-3
    exact = sorted({*GRID, 1 / temperature})
    scores = score(found, following, exact).numpy()
    assert np.abs(logprobs_at(scores, exact, 1 / temperature) - expected).max() < 1e-12


@given(st.floats(0.3, 3.0))
def test_a_temperature_is_found(temperature: float) -> None:
    found, following = logits()
    scores = score(found, following, GRID).numpy()
    recorded = taken((found / temperature).log_softmax(-1), following)
    assert fit_temperature(scores, GRID, recorded) == pytest.approx(temperature, rel=2e-3)


def test_a_column_by_its_definitions() -> None:
    found, following = logits()
    engine = torch.from_numpy(taken(found.log_softmax(-1), following))
    model = torch.from_numpy(taken((1.2 * found).log_softmax(-1), following))
    sequences = np.repeat([3, 8], [50, 150])
    ours = column(engine.numpy(), model.numpy(), sequences)
    ratio = (model - engine).exp()
    assert ours.mean == pytest.approx(float((model - engine).abs().mean()))
    assert ours.largest == pytest.approx(float((model - engine).abs().max()))
    assert ours.k1 == pytest.approx(float((engine - model).mean()))
    assert ours.k2 == pytest.approx(float((engine - model).square().mean() / 2))
    assert ours.k3 == pytest.approx(float((ratio - 1 - ratio.log()).mean()))
    assert (ours.ratio_min, ours.ratio_max) == pytest.approx((float(ratio.min()), float(ratio.max())))
    assert ours.outside == float(((ratio < 0.8) | (ratio > 1.2)).double().mean())
    assert ours.above == float((ratio > 2).double().mean())
    geometric = [float(part.log().mean().exp()) for part in ratio.split([50, 150])]
    assert (ours.sequence_min, ours.sequence_max) == pytest.approx((min(geometric), max(geometric)))
    assert ours.effective == pytest.approx(float(ratio.sum() ** 2 / (200 * ratio.square().sum())))
    weights = torch.stack([part.log().sum().exp() for part in ratio.split([50, 150])])
    assert ours.effective_sequences == pytest.approx(float(weights.sum() ** 2 / (2 * weights.square().sum())))
    assert ours.perplexity == pytest.approx(float((-model.mean()).exp()))


def test_k3_estimates_the_divergence_of_the_sampling_model() -> None:
    found, _ = logits(1)
    engine, model = found.log_softmax(-1), (1.3 * found).log_softmax(-1)
    divergence = float((engine.exp() * (engine - model)).sum())
    drawn = torch.multinomial(engine.exp()[0], 20_000, True, generator=torch.Generator().manual_seed(1))
    ours = column(engine[0, drawn].numpy(), model[0, drawn].numpy(), np.zeros(20_000, int))
    assert ours.k3 == pytest.approx(divergence, rel=0.1) and ours.k1 == pytest.approx(divergence, rel=0.1)


def test_what_is_no_number_is_counted_and_fails() -> None:
    model = np.array([-1.0, np.nan, -np.inf])
    ours = column(np.full(3, -1.0), model, np.zeros(3, int))
    assert ours.not_finite == 2 and ours.mean == 0
    floor = Floor(1e-3, 1e-2, ["bfloat16"], "candidate", False)
    explanation = explain(np.full(3, -1.0), np.full(3, -1.0), floor, None, None)
    assert [check.passed for check in judge(ours, floor, explanation, None)] == [False, True, True, True]
    nothing = column(np.full(1, -1.0), np.array([np.nan]), np.zeros(1, int))
    assert not any(check.passed for check in judge(nothing, floor, explanation, 0.1) if check.name != "scale")


def test_the_floor_adds_the_rounding_of_both() -> None:
    errors = {"bfloat16": np.full(10, 3e-3), "float16": np.full(10, 4e-3)}
    assert floor_of(errors, ["bfloat16"], "reference").mean == pytest.approx(3e-3)
    assert floor_of(errors, ["bfloat16", "float16"], "reference").mean == pytest.approx(5e-3)
    least = floor_of({"float32": np.zeros(10)}, ["float32"], "reference")
    assert least.least and least.mean == LEAST


FLOOR = Floor(LEAST, 3 * LEAST, ["float32"], "candidate", True)


def asked(recorded: np.ndarray, scores: np.ndarray) -> tuple[bool, bool]:
    model = logprobs_at(scores, GRID, 1.0)
    fitted = fit_temperature(scores, GRID, recorded)
    explanation = explain(recorded, model, FLOOR, fitted, logprobs_at(scores, GRID, min(max(1 / fitted, 0.25), 4.0)))
    return explanation.scaled, explanation.renormalised


def test_scaled_renormalised_and_wrong_are_three_things() -> None:
    found, following = logits()
    scores = score(found, following, GRID).numpy()
    plain = taken(found.log_softmax(-1), following)
    assert asked(plain, scores) == (False, False)
    assert asked(taken((found / 0.8).log_softmax(-1), following), scores) == (True, False)
    noise = torch.randn(found.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert asked(taken((found + 0.5 * noise).log_softmax(-1), following), scores) == (False, False)
    top = found.topk(8).indices
    within = (top == following[:, None]).any(-1).numpy()
    kept = torch.full_like(found, -torch.inf).scatter(1, top, found.gather(1, top)).log_softmax(-1)
    assert asked(taken(kept, following)[within], scores[within]) == (False, True)


def test_the_curve_covers_every_token() -> None:
    bins = curve(np.arange(300.0), list(range(5, 305)))
    assert sum(part.tokens for part in bins) == 300
    assert (bins[0].first, bins[-1].last) == (5, 304) and len(bins) <= 64
    assert bins[0].mean < bins[-1].mean
    assert [part.tokens for part in curve(np.ones(2), [3, 9])] == [1, 1]


@pytest.mark.parametrize(
    "wrong", [{"asked_temperature": 0.0}, {"asked_temperature": 9.0}, {"engine_dtype": "fp8"}, {"max_kl": -1.0}]
)
def test_options_out_of_range(wrong: dict, tmp_path: Path) -> None:
    from ckptkit.errors import UsageError

    with pytest.raises(UsageError):
        RolloutOptions(**wrong).check()


def test_another_model_is_not_called_a_part_of_the_vocabulary() -> None:
    model = np.linspace(-9.0, -1.0, 50)
    assert explain(model + 2.0, model, FLOOR, None, None).renormalised
    found = explain(model + 20.0, model, FLOOR, None, None)
    assert not found.renormalised and found.kept is None
