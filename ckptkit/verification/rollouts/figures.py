"""How far log-probabilities of a model are from those that an engine recorded.

With the recorded log-probability `e` of a sampled token and the model's `m`, the ratio is `r = exp(m - e)`. As the
engine sampled the tokens, the means of `k1 = e - m`, `k2 = (e - m)^2 / 2` and `k3 = r - 1 - log r` estimate
KL(engine || model), per token in nats (source: J. Schulman, "Approximating KL Divergence", 2020).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

INSIDE = (0.8, 1.2)
"""Ratios that are not clipped by the usual surrogate of PPO."""
LARGE = 2.0
SPAN = 50.0
"""A larger |log ratio| is taken for this one where it is raised to a power of e."""
BINS = 64


@dataclass(frozen=True)
class Column:
    """A model against the engine.

    Attributes:
        mean: Mean |difference| of the log-probabilities of sampled tokens, in nats.
        p99: Its 99th percentile.
        largest: Its maximum.
        rms: Root of the mean square.
        k1: Estimate of KL(engine || model) per token, in nats.
        k2: Another, with less variance.
        k3: Another, unbiased and never negative.
        ratio_min: Smallest ratio of model to engine.
        ratio_max: Largest one.
        outside: Share of the tokens whose ratio is outside of `INSIDE`.
        above: Share of the tokens whose ratio is above `LARGE`.
        sequence_min: Smallest geometric mean of the ratios of a sequence.
        sequence_mean: Mean of these.
        sequence_max: Largest one.
        effective: Effective sample size of the ratios as weights of tokens, as a share of the tokens.
        effective_sequences: The same for whole sequences, whose weights are products.
        perplexity: exp of the mean negative log-probability that the model gives the sampled tokens.
        not_finite: Log-probabilities of the model that are no numbers; they count in nothing else.
    """

    mean: float
    p99: float
    largest: float
    rms: float
    k1: float
    k2: float
    k3: float
    ratio_min: float
    ratio_max: float
    outside: float
    above: float
    sequence_min: float
    sequence_mean: float
    sequence_max: float
    effective: float
    effective_sequences: float
    perplexity: float
    not_finite: int


def column(engine: Array, model: Array, sequences: Array) -> Column:
    """The figures of a model.

    Args:
        engine: Recorded log-probabilities, float64 [tokens].
        model: The model's, float64 [tokens].
        sequences: Number of each token's sequence, int [tokens].
    """
    import numpy as np

    finite = np.isfinite(model)
    engine, kept, sequences = engine[finite], model[finite], sequences[finite]
    if not len(kept):
        nothing: dict[str, Any] = {part.name: math.nan for part in fields(Column)}
        return Column(**{**nothing, "not_finite": len(model)})
    log_ratio = kept - engine
    error, bounded = np.abs(log_ratio), np.clip(log_ratio, -SPAN, SPAN)
    ratio = np.exp(bounded)
    _, place = np.unique(sequences, return_inverse=True)
    counts = np.bincount(place)
    sums = np.bincount(place, bounded)
    geometric = np.exp(sums / counts)
    return Column(
        mean=float(error.mean()),
        p99=quantile(error, 0.99),
        largest=float(error.max()),
        rms=float(np.sqrt((error**2).mean())),
        k1=float(-log_ratio.mean()),
        k2=float((log_ratio**2).mean() / 2),
        k3=float((np.expm1(bounded) - bounded).mean()),
        ratio_min=float(ratio.min()),
        ratio_max=float(ratio.max()),
        outside=float(((ratio < INSIDE[0]) | (ratio > INSIDE[1])).mean()),
        above=float((ratio > LARGE).mean()),
        sequence_min=float(geometric.min()),
        sequence_mean=float(geometric.mean()),
        sequence_max=float(geometric.max()),
        effective=_effective(bounded),
        effective_sequences=_effective(sums),
        perplexity=float(np.exp(-kept.mean())),
        not_finite=int((~finite).sum()),
    )


def quantile(values: Array, share: float) -> float:
    """The smallest value that this share of them does not exceed."""
    import numpy as np

    return float(np.sort(values)[max(0, math.ceil(share * len(values)) - 1)])


def _effective(logarithms: Array) -> float:
    """(sum w)^2 / (n sum w^2) of weights given by their logarithms."""
    import numpy as np

    weights = np.exp(logarithms - logarithms.max())
    return float(weights.sum() ** 2 / (len(weights) * (weights**2).sum()))


@dataclass(frozen=True)
class Bin:
    """Tokens at neighbouring positions of all rows.

    Attributes:
        first: First position.
        last: Last one.
        tokens: Sampled tokens there.
        mean: Mean |difference| of their log-probabilities.
    """

    first: int
    last: int
    tokens: int
    mean: float


def curve(error: Array, positions: Sequence[int]) -> list[Bin]:
    """The mean |difference| by position in the row, in at most `BINS` bins; bins without tokens are left out."""
    import numpy as np

    places = np.asarray(positions)
    first, last = int(places.min()), int(places.max())
    width = max(1, math.ceil((last - first + 1) / BINS))
    found = []
    for start in range(first, last + 1, width):
        inside = (places >= start) & (places < start + width)
        if inside.any():
            found.append(Bin(start, min(start + width - 1, last), int(inside.sum()), float(error[inside].mean())))
    return found
