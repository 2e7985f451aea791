"""Finding the first place where two models part."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptkit.verification.probes import ALL_PARTS, KEPT, KINDS, places_in
from ckptkit.verification.reports.results import Location
from ckptkit.verification.routing import read_router_logits
from ckptkit.verification.runs import Run, read_probes, row_logits

if TYPE_CHECKING:
    import torch

NOISE = 1e-5
"""Relative error of an fp32 hidden state that rounding alone does not reach."""
JUMP = 10.0
"""Growth of the error, over all places before, that rounding alone does not show."""
ROUNDING = 1e-7


def locate(reference: Run, candidate: Run) -> Location | None:
    """The first place whose error jumps.

    Args:
        reference: A run in fp32 with probes.
        candidate: Another one, of the same rows.

    Returns:
        The place, or None if neither the hidden states nor the logits differ by more than rounding.
    """
    errors = _errors(reference, candidate)
    before, jumps = ROUNDING, []
    for place, error in errors.items():
        if not error <= NOISE:
            jumps.append((error / before, place, error, before))
        before = max(before, error)
    if not jumps:
        return None
    # The first clear jump; if the error creeps up, the steepest step.
    _, place, error, earlier = next((jump for jump in jumps if jump[0] > JUMP), max(jumps))
    return Location(readable(place), error, earlier, candidate.feeds.get(place, []))


def _errors(reference: Run, candidate: Run) -> dict[str, float]:
    """Relative error at every place, in the order of the computation, the head last."""
    expected, found = (read_probes(run) | _router_states(run) for run in (reference, candidate))
    errors = {}
    for place in places_in(expected, ALL_PARTS):
        # A layer that one side does not have is as wrong as can be.
        copies = found.get(place, [])
        errors[place] = max((_relative(expected[place][0], copy) for copy in copies), default=float("inf"))
    errors["head"] = _relative(head_states(reference), head_states(candidate))
    return errors


def _router_states(run: Run) -> dict[str, list[torch.Tensor]]:
    """Router logits of the only row as states, so that a router can be distinguished from its experts."""
    return {
        f"layers.{layer}.router": [copy[-KEPT:] for copy in copies]
        for layer, copies in read_router_logits(run.routing).items()
    }


def head_states(run: Run) -> torch.Tensor:
    """Logits at the last positions of the first row, fp32 [positions, vocabulary]."""
    with row_logits(run) as rows:
        length = len(run.rows[0])
        state: torch.Tensor = rows[0][slice(max(0, length - KEPT), length)]
        return state


def _relative(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Largest RMS error of a position, over the RMS of all of them; infinite if something is not finite or fits not."""
    if expected.shape != found.shape or not (expected.isfinite().all() and found.isfinite().all()):
        return float("inf")
    error = (found - expected).double().square().mean(-1).sqrt().max()
    size = expected.double().square().mean().sqrt()
    return float(error / size) if size > 0 else (0.0 if error == 0 else float("inf"))


def readable(place: str) -> str:
    """A place as people read it: `layer 3 mlp`."""
    kind, _, rest = place.partition(".")
    number, _, part = rest.partition(".")
    if kind not in KINDS:
        return place.replace("_", " ")
    layer = "layer" if kind == "layers" else "multi-token prediction layer"
    return f"{layer} {number} {part if part in ALL_PARTS else part.replace('_', ' ')}"
