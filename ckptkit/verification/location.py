"""Finding the first place where two models part."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptkit.verification.probes import KEPT, places
from ckptkit.verification.report import Location
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
    return Location(_readable(place), error, earlier, candidate.feeds.get(place, []))


def _errors(reference: Run, candidate: Run) -> dict[str, float]:
    """Relative error at every place, in the order of the computation, the head last."""
    expected, found = read_probes(reference), read_probes(candidate)
    num_layers = sum(name.endswith(".mlp") for name in expected)
    errors = {}
    for place in places(num_layers):
        # A layer that one side does not have is as wrong as can be.
        copies = found.get(place, [])
        errors[place] = max((_relative(expected[place][0], copy) for copy in copies), default=float("inf"))
    with row_logits(reference) as theirs, row_logits(candidate) as ours:
        length = len(reference.rows[0])
        part = slice(max(0, length - KEPT), length)
        errors["head"] = _relative(theirs[0][part], ours[0][part])
    return errors


def _relative(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Largest RMS error of a position, over the RMS of all of them; infinite if something is not finite or fits not."""
    if expected.shape != found.shape or not (expected.isfinite().all() and found.isfinite().all()):
        return float("inf")
    error = (found - expected).double().square().mean(-1).sqrt().max()
    size = expected.double().square().mean().sqrt()
    return float(error / size) if size > 0 else (0.0 if error == 0 else float("inf"))


def _readable(place: str) -> str:
    kind, _, rest = place.partition(".")
    number, _, part = rest.partition(".")
    return f"layer {number} {part}" if kind == "layers" else place.replace("_", " ")
