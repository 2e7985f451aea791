"""Whether an engine's log-probabilities are the model's, but for rounding.

The unit is the noise floor: what rounding does to the log-probabilities of the same tokens when a correct
implementation runs in the engine's type. The limits were fixed before any fault was tried.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptkit.verification.reports.results import Check
from ckptkit.verification.rollouts.figures import Column, quantile

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

MEAN_LIMIT, P99_LIMIT = 2.0, 3.0
LEAST = 2e-5
"""The smallest floor of the mean, in nats: kernels in float32 approximate exponentials to about so much."""
SCALED = 0.02
"""A temperature is another one than asked for if its logarithm differs by so much."""
EXPLAINED = 0.2
"""A temperature explains what the engine recorded if so much of the mean difference is left at most."""
ONE_SIDED, SEEN = 0.01, 0.05
"""Renormalised are log-probabilities of which at most the first share is below the model's, and at least the second one
above, both by more than the noise."""
LEAST_KEPT = 0.01
"""A part of the vocabulary of less probability is what no filter keeps: the engine had another model."""


@dataclass(frozen=True)
class Floor:
    """What rounding alone does to the log-probabilities.

    Attributes:
        mean: Mean |difference|, in nats.
        p99: Its 99th percentile.
        dtypes: Types whose rounding is in it: the engine's, and the candidate's where it is as coarse.
        source: `reference` or `candidate`: whose rounding was measured.
        least: Whether it is `LEAST`, because less was measured.
    """

    mean: float
    p99: float
    dtypes: list[str]
    source: str
    least: bool


def floor_of(errors: dict[str, Array], dtypes: list[str], source: str) -> Floor:
    """The floor for the difference of two runs, each with the rounding of a type.

    Args:
        errors: Type -> |difference| of log-probabilities in that type and in a finer one, [tokens].
        dtypes: The types that round; one may be there twice.
        source: Whose.
    """
    mean = math.sqrt(sum(float(errors[dtype].mean()) ** 2 for dtype in dtypes))
    p99 = math.sqrt(sum(quantile(errors[dtype], 0.99) ** 2 for dtype in dtypes))
    least = mean < LEAST
    return Floor(max(mean, LEAST), max(p99, 3 * LEAST), dtypes, source, least)


@dataclass(frozen=True)
class Explanation:
    """What was done to the engine's log-probabilities before they were recorded.

    Attributes:
        temperature: The temperature that fits best, or None where one was given.
        residual: Mean |difference| at that temperature; None like it.
        scaled: Whether the log-probabilities are those of that temperature.
        renormalised: Whether they are those of a part of the vocabulary.
        kept: Then: the median probability of that part.
    """

    temperature: float | None = None
    residual: float | None = None
    scaled: bool = False
    renormalised: bool = False
    kept: float | None = None


def explain(engine: Array, model: Array, floor: Floor, fitted: float | None, at_fit: Array | None) -> Explanation:
    """Tells scaled and renormalised log-probabilities from others.

    Args:
        engine: Recorded, [tokens].
        model: The model's, at the temperature that was asked for.
        floor: The unit.
        fitted: The temperature that fits best, or None.
        at_fit: The model's log-probabilities at that temperature.
    """
    import numpy as np

    error = float(np.abs(engine - model).mean())
    differs = error > MEAN_LIMIT * floor.mean
    residual = None if at_fit is None else float(np.abs(engine - at_fit).mean())
    scaled = (
        differs
        and fitted is not None
        and residual is not None
        and abs(math.log(fitted)) > SCALED
        and residual <= max(EXPLAINED * error, MEAN_LIMIT * floor.mean)
    )
    noise = P99_LIMIT * floor.p99
    above, below = engine - model > noise, engine - model < -noise
    one_sided = bool(differs and not scaled and below.mean() <= ONE_SIDED and above.mean() >= SEEN)
    kept = float(np.exp(-np.median((engine - model)[above]))) if one_sided else 0.0
    renormalised = kept >= LEAST_KEPT
    return Explanation(fitted, residual, bool(scaled), renormalised, kept if renormalised else None)


def judge(found: Column, floor: Floor, explanation: Explanation, max_kl: float | None) -> list[Check]:
    """The questions, with their answers."""
    mean, p99 = found.mean / floor.mean, found.p99 / floor.p99
    checks = [
        Check("finite", found.not_finite == 0, f"{found.not_finite} log-probabilities of the candidate are no numbers"),
        Check(
            "mean",
            mean <= MEAN_LIMIT,
            f"log-probabilities differ by {found.mean:.2e} in the mean: {mean:.2f} times the floor (at most"
            f" {MEAN_LIMIT:g})",
        ),
        Check("p99", p99 <= P99_LIMIT, f"99th percentile {found.p99:.2e}: {p99:.2f} times (at most {P99_LIMIT:g})"),
        _scale(explanation),
    ]
    if max_kl is not None:
        summary = f"KL (k3) {found.k3:.2e} nats a token, at most {max_kl:g} (--max-kl)"
        checks.append(Check("kl", found.k3 <= max_kl, summary))
    return checks


def _scale(explanation: Explanation) -> Check:
    if explanation.scaled:
        assert explanation.temperature is not None and explanation.residual is not None
        text = (
            f"the log-probabilities were recorded at temperature {explanation.temperature:.3g} (mean difference there"
            f" {explanation.residual:.2e}): give --temperature, or record unscaled ones"
        )
    elif explanation.renormalised:
        text = (
            "the log-probabilities were renormalised over a part of the vocabulary, as after top-p, top-k or min-p"
            f" (median probability of that part {explanation.kept:.3g}): record those of the whole"
        )
    else:
        text = "log-probabilities of the whole vocabulary at the temperature asked for"
    return Check("scale", not (explanation.scaled or explanation.renormalised), text)
