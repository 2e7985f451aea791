"""Comparing two sides' gradients, or their weights after some steps, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ckptkit.io.as_torch import load
from ckptkit.io.plan import Comparison
from ckptkit.tensors import Tensor
from ckptkit.verification.reports.placement import place_of

if TYPE_CHECKING:
    import torch

NAMED = 5
"""How many tensors a sentence names before it counts the rest."""
SILENT = 1e-7
"""A gradient below this share of the model's largest one is none: float32's rounding of the largest is as large.

Where the exact one is zero or nearly so, as of a bias that a softmax cancels, each side has its own rounding."""
CLEAR = 2.0
"""Times `SILENT`: what a gradient must exceed at least to be missed on the other side."""


@dataclass(frozen=True)
class TensorError:
    """How far the candidate is off in one tensor.

    Attributes:
        name: Its Hugging Face name.
        error: Largest difference over the largest |element| of the reference.
        rms: Root mean square of the difference.
        noise: Root mean square of the reference's own error: of a run in the candidate's type, or with another
            attention; None without such a run.
        largest: Largest |element| of the reference.
        size: Root mean square of the reference.
        elements: How many it has.
    """

    name: str
    error: float
    rms: float
    noise: float | None
    largest: float
    size: float
    elements: int

    @property
    def ratio(self) -> float:
        """The error in units of the noise."""
        if not self.noise:
            return 0.0 if self.rms == 0 else math.inf
        return self.rms / self.noise


@dataclass(frozen=True)
class Comparisons:
    """All tensors of two runs.

    Attributes:
        tensors: Those that both have, worst first.
        missing: Names of those that the reference has a gradient for, and the candidate none.
        surplus: The other way round; with parts of Megatron tensors that no model uses.
        non_finite: Names of those that hold something else than numbers, on either side.
        copies: Largest difference of two ranks' copies, over the largest |element|, and what they are; or None.
    """

    tensors: list[TensorError]
    missing: list[str] = field(default_factory=list)
    surplus: list[str] = field(default_factory=list)
    non_finite: list[str] = field(default_factory=list)
    copies: tuple[float, str] | None = None


def compare(
    reference: Mapping[str, Tensor],
    candidate: Mapping[str, Tensor],
    *,
    low: Sequence[Mapping[str, Tensor]] = (),
    unused: Mapping[str, Tensor] | None = None,
    copies: Sequence[Comparison] = (),
) -> Comparisons:
    """Compares tensor by tensor; one of each is in memory at a time.

    Args:
        reference: Name -> tensor of the side that is trusted.
        candidate: The same of the side in question.
        low: Runs of the reference that say what rounding does to it.
        unused: Parts of the candidate's tensors that the model does not use.
        copies: Copies that several ranks have of the candidate's tensors.
    """
    found = Comparisons([])
    scale = max((_largest(load(tensor)) for tensor in reference.values()), default=0.0) * SILENT
    for name in sorted(reference.keys() | candidate.keys()):
        theirs = load(reference[name]).double() if name in reference else None
        ours = load(candidate[name]).double() if name in candidate else None
        if any(part is not None and not part.isfinite().all() for part in (theirs, ours)):
            found.non_finite.append(name)
            continue
        largest = [0.0 if part is None else _largest(part) for part in (theirs, ours)]
        if min(largest) <= scale and max(largest) <= CLEAR * scale:
            continue
        if largest[1] <= scale or ours is None:
            found.missing.append(name)
        elif largest[0] <= scale or theirs is None:
            found.surplus.append(name)
        else:
            noise = [_rms(load(run[name]).double() - theirs) for run in low]
            found.tensors.append(_error(name, theirs, ours, noise))
    found.surplus.extend(name for name, part in (unused or {}).items() if _largest(load(part)) > scale)
    found.tensors.sort(key=lambda tensor: -(tensor.error if tensor.noise is None else tensor.ratio))
    return Comparisons(found.tensors, found.missing, found.surplus, found.non_finite, _copies(copies))


def _error(name: str, theirs: torch.Tensor, ours: torch.Tensor, noise: Sequence[float]) -> TensorError:
    largest, difference = _largest(theirs), ours - theirs
    return TensorError(
        name,
        error=_largest(difference) / largest,
        rms=_rms(difference),
        noise=math.sqrt(sum(part**2 for part in noise) / len(noise)) if noise else None,
        largest=largest,
        size=_rms(theirs),
        elements=theirs.numel(),
    )


def _copies(copies: Sequence[Comparison]) -> tuple[float, str] | None:
    worst: tuple[float, str] | None = None
    for copy in copies:
        left, right = load(copy.left).double(), load(copy.right).double()
        error = _largest(left - right) / (max(_largest(left), _largest(right)) or 1.0)
        if worst is None or not error <= worst[0]:
            worst = (error, copy.what)
    return worst


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _rms(tensor: torch.Tensor) -> float:
    return float(tensor.square().mean().sqrt()) if tensor.numel() else 0.0


@dataclass(frozen=True)
class PlaceError:
    """The worst tensor of a place.

    Attributes:
        place: `embedding`, `layer 0`, ..., or `head` for everything behind the layers.
        name: Its Hugging Face name.
        error: Largest difference over the largest |element| of the reference.
        ratio: The error in units of the noise, or None without noise.
    """

    place: str
    name: str
    error: float
    ratio: float | None


def by_place(tensors: Sequence[TensorError]) -> list[PlaceError]:
    """The worst tensor of each place, in the order of the model.

    Args:
        tensors: All tensors, worst first.
    """
    worst: dict[tuple[float, str], TensorError] = {}
    for tensor in tensors:
        worst.setdefault(place_of(tensor.name), tensor)
    return [
        PlaceError(place, tensor.name, tensor.error, tensor.ratio if tensor.noise else None)
        for (_, place), tensor in sorted(worst.items())
    ]


def some(names: Sequence[str]) -> str:
    """A few names, and how many more there are."""
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")
