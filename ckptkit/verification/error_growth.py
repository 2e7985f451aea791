"""How the error of the hidden states grows from layer to layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ckptkit.verification.location import head_states, readable
from ckptkit.verification.probes import places_in
from ckptkit.verification.reports.results import StateError
from ckptkit.verification.runs import Run, read_probes

if TYPE_CHECKING:
    import torch

JUMP = 2.0
"""Times its own noise that the error of a hidden state may reach, as at the level of the logits."""


def error_growth(exact: Run, low: Run | None, found: Run) -> list[StateError]:
    """The error of the candidate's hidden states at the embedding, after every layer, and at the end.

    Args:
        exact: The reference in fp32, with probes between layers.
        low: The reference in the candidate's dtype, or None in fp32.
        found: The candidate.
    """
    expected, candidate = _states(exact), _states(found)
    noisy = _states(low) if low is not None else {}
    errors = []
    for place in expected:
        rms, largest = _error(expected[place][0], candidate.get(place, []))
        noise = _error(expected[place][0], noisy[place])[0] if noisy else None
        errors.append(StateError(readable(place).removesuffix(" output"), rms, largest, noise))
    return errors


def first_excess(errors: list[StateError]) -> StateError | None:
    """Below fp32: the first hidden state whose error is far more than the reference's own."""
    return next((state for state in errors if state.noise and state.rms_error > JUMP * state.noise), None)


def _states(run: Run) -> dict[str, list[torch.Tensor]]:
    """Place -> its copies, in the order of the computation; the head last."""
    found = read_probes(run)
    return {place: found[place] for place in places_in(found, ("output",))} | {"head": [head_states(run)]}


def _error(expected: torch.Tensor, copies: list[torch.Tensor]) -> tuple[float, float]:
    """RMS over all positions and largest RMS of one, of the worst copy, relative to the RMS of what is expected."""
    size = float(expected.double().square().mean().sqrt())
    worst = (0.0, 0.0) if copies else (math.inf, math.inf)
    for copy in copies:
        if copy.shape != expected.shape or not (copy.isfinite().all() and expected.isfinite().all()):
            return math.inf, math.inf
        squares = (copy - expected).double().square().mean(-1)
        found = float(squares.mean().sqrt()), float(squares.max().sqrt())
        worst = max(
            worst, (found[0] / size, found[1] / size) if size else (found[0] and math.inf, found[1] and math.inf)
        )
    return worst
