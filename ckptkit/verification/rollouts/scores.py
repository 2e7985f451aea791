"""What is kept of logits: enough for the log-probability of the next token at any temperature.

At the inverse temperature b the log-probability of a token is `b z - Z(b)`, with its logit `z` and
`Z(b) = log sum exp(b logits)`, whose derivative is the mean of the logits under b. Both are kept for some b, with the
largest logit subtracted; between those, a cubic through values and derivatives (Hermite) gives the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

GRID = tuple(2.0 ** (step / 4) for step in range(-8, 9))
"""Inverse temperatures among which a fit looks: temperatures from 4 to 1/4."""
BLOCK = 256
"""Positions that are widened to float64 at a time."""


def score(logits: torch.Tensor, following: torch.Tensor, inverse: Sequence[float]) -> torch.Tensor:
    """What is kept of logits.

    Args:
        logits: [..., vocabulary].
        following: The token that follows each position, int64 [...].
        inverse: Inverse temperatures.

    Returns:
        float64 [..., 1 + 2 * len(inverse)] in host memory: `z`, `Z` of each inverse temperature, and its derivative.
    """
    import torch

    flat, wanted = logits.reshape(-1, logits.size(-1)), following.reshape(-1, 1).to(logits.device)
    parts = []
    for at in range(0, len(flat), BLOCK):
        block = flat[at : at + BLOCK].double()
        block = block - block.amax(-1, keepdim=True)
        found = [block.gather(-1, wanted[at : at + BLOCK])[:, 0]]
        weights = [(block * beta).exp() for beta in inverse]
        sums = [weight.sum(-1) for weight in weights]
        found += [total.log() for total in sums]
        found += [(weight * block).sum(-1) / total for weight, total in zip(weights, sums, strict=True)]
        parts.append(torch.stack(found, -1).cpu())
    return torch.cat(parts).view(*logits.shape[:-1], -1)


def logprobs_at(scores: np.ndarray[Any, Any], inverse: Sequence[float], beta: float) -> np.ndarray[Any, Any]:
    """Log-probabilities at an inverse temperature.

    Args:
        scores: From `score`, [tokens, 1 + 2 * len(inverse)].
        inverse: Its inverse temperatures, ascending.
        beta: One of them, or one between them.

    Returns:
        float64 [tokens].
    """
    count = len(inverse)
    z, values, slopes = scores[:, 0], scores[:, 1 : 1 + count], scores[:, 1 + count :]
    if beta in inverse:
        exact: np.ndarray[Any, Any] = beta * z - values[:, inverse.index(beta)]
        return exact
    above = next(place for place, known in enumerate(inverse) if known > beta)
    low, high = inverse[above - 1], inverse[above]
    width, t = high - low, (beta - low) / (high - low)
    between = (
        (1 + 2 * t) * (1 - t) ** 2 * values[:, above - 1]
        + t * (1 - t) ** 2 * width * slopes[:, above - 1]
        + t * t * (3 - 2 * t) * values[:, above]
        - t * t * (1 - t) * width * slopes[:, above]
    )
    found: np.ndarray[Any, Any] = beta * z - between
    return found


def fit_temperature(scores: np.ndarray[Any, Any], inverse: Sequence[float], recorded: np.ndarray[Any, Any]) -> float:
    """The temperature at which the log-probabilities are closest to recorded ones, in the mean of the squares.

    Args:
        scores: From `score`.
        inverse: Its inverse temperatures, ascending.
        recorded: float64 [tokens].
    """

    def distance(logarithm: float) -> float:
        beta = min(max(math.exp(logarithm), inverse[0]), inverse[-1])
        return float(((logprobs_at(scores, inverse, beta) - recorded) ** 2).mean())

    logarithms = [math.log(beta) for beta in inverse]
    best = min(range(len(inverse)), key=lambda place: distance(logarithms[place]))
    low, high = logarithms[max(0, best - 1)], logarithms[min(len(inverse) - 1, best + 1)]
    shrink = (math.sqrt(5) - 1) / 2
    for _ in range(60):  # the golden section
        left, right = high - shrink * (high - low), low + shrink * (high - low)
        low, high = (low, right) if distance(left) < distance(right) else (left, high)
    return math.exp(-(low + high) / 2)
