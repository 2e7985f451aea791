"""What passes: gradients, and steps of training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from ckptkit.verification.comparison import MEDIAN_LIMIT
from ckptkit.verification.reports.results import Check
from ckptkit.verification.run_options import EXACT, RunOptions
from ckptkit.verification.training.figures import Comparisons, TensorError, some

WORST_LIMIT = 4.0
"""Largest error of a tensor's gradient below float32, in units of the reference's own."""
FEW = 16
"""Tensors with fewer elements say too little one by one, and are judged together."""
TINY = 1e-30
STEP_LIMIT = 4.0
"""Largest error of an update, or of a loss, in units of what another attention does to transformers."""
WORST_UPDATE = 100.0
"""Error of a single tensor's update that passes in any case, in units of the tolerance.

An optimizer that divides by the size of a gradient turns the sign of an element that is nothing but rounding into a
whole step."""


def differs(tensor: TensorError, options: RunOptions) -> bool:
    """Whether the gradient of one tensor is too far off."""
    if options.dtype in EXACT:
        return not tensor.error <= options.tolerance
    return not tensor.ratio <= WORST_LIMIT


def judge_gradients(
    found: Comparisons, losses: Sequence[float], options: RunOptions, low_loss: float | None = None
) -> list[Check]:
    """The questions about gradients.

    Args:
        found: The comparison.
        losses: Loss of the reference and of the candidate.
        options: How the candidate ran.
        low_loss: Loss of the reference in the candidate's type, where that is judged by the noise floor.
    """
    checks = [_loss(losses, options, low_loss), *_presence(found, "gradient")]
    if not found.tensors:
        return [*checks, Check("gradients", False, "no tensor has a gradient on both sides")]
    checks.append(_tolerance(found.tensors, options) if options.dtype in EXACT else _noise(found.tensors, options))
    if found.copies is not None:
        error, what = found.copies
        text = f"copies on several ranks differ by {error:.1e} of the largest |g| at most"
        text += f": {what}" if not error <= options.tolerance else ""
        checks.append(Check("copies", error <= options.tolerance, text))
    return checks


def _loss(losses: Sequence[float], options: RunOptions, low_loss: float | None) -> Check:
    """Is the loss that gradients belong to the same?"""
    theirs, ours = losses
    limit = options.tolerance * abs(theirs)
    if low_loss is not None:  # one number says little: half a per cent is let pass in any case
        limit = max(WORST_LIMIT * abs(low_loss - theirs), 5e-3 * abs(theirs))
    error = abs(ours - theirs)
    text = f"loss {ours:.6g}, the reference's {theirs:.6g}"
    return Check("loss", error <= limit, text)


def _presence(found: Comparisons, what: str) -> list[Check]:
    """Are the numbers numbers, and does the candidate have what the reference has?"""
    bad, missing, surplus = found.non_finite, found.missing, found.surplus
    texts = [f"none for {some(missing)}"] * bool(missing)
    texts += [f"one for {some(surplus)}, where the reference has none"] * bool(surplus)
    same = f"the same {len(found.tensors)} tensors have {what}s on both sides"
    return [
        Check("finite", not bad, f"not finite: {some(bad)}" if bad else f"every {what} is finite"),
        Check("present", not texts, f"{what}: {'; '.join(texts)}" if texts else same),
    ]


def _tolerance(tensors: Sequence[TensorError], options: RunOptions) -> Check:
    over = [tensor for tensor in tensors if differs(tensor, options)]
    worst = over[0] if over else tensors[0]
    text = f"largest error {worst.error:.1e} of the largest |g|, in {worst.name} (tolerance {options.tolerance:.0e})"
    if len(over) > 1:
        text += f"; beyond it are {len(over)} of {len(tensors)}: {some([tensor.name for tensor in over])}"
    return Check("gradients", not over, text)


def _noise(tensors: Sequence[TensorError], options: RunOptions) -> Check:
    judged = sorted(_pooled(tensors), key=lambda tensor: -tensor.ratio)
    middle = median(tensor.ratio for tensor in judged)
    over = [tensor for tensor in judged if differs(tensor, options)]
    text = (
        f"{options.dtype} error {middle:.2f} (median of the tensors) and {judged[0].ratio:.2f} (worst,"
        f" {judged[0].name}) times the reference's own (limits {MEDIAN_LIMIT:g} and {WORST_LIMIT:g})"
    )
    if len(over) > 1:
        text += f"; beyond it are {len(over)} of {len(judged)}: {some([tensor.name for tensor in over])}"
    return Check("noise floor", not over and middle <= MEDIAN_LIMIT, text)


def _pooled(tensors: Sequence[TensorError]) -> list[TensorError]:
    """The tensors, those of few elements as one, each of them in units of its largest element."""
    small = [tensor for tensor in tensors if tensor.elements < FEW]
    if not small:
        return list(tensors)
    together = replace(
        small[0],
        name=f"{len(small)} tensors of fewer than {FEW} elements, {small[0].name} first among them",
        rms=math.sqrt(sum((tensor.rms / tensor.largest) ** 2 for tensor in small)),
        noise=math.sqrt(sum(((tensor.noise or 0.0) / tensor.largest) ** 2 for tensor in small)),
    )
    return [*(tensor for tensor in tensors if tensor.elements >= FEW), together]


def judge_steps(
    found: Comparisons,
    losses: Sequence[Sequence[float]],
    moved: Sequence[str],
    options: RunOptions,
) -> list[Check]:
    """The questions about steps of training.

    Args:
        found: The comparison of what the steps added to the weights; its noise is a run with another attention.
        losses: Losses of the reference, of the candidate, and, if there is one, of the reference with another
            attention: before every step, and after the last one.
        moved: Tensors that changed although they are not trained.
        options: How the candidate ran.
    """
    theirs, ours = losses[0], losses[1]
    checks = _presence(found, "update")
    fall = all(side[-1] < side[0] for side in (theirs, ours))
    path = f"the loss went from {ours[0]:.6g} to {ours[-1]:.6g}, the reference's"
    path = f"{'' if fall else 'no fall: '}{path} from {theirs[0]:.6g} to {theirs[-1]:.6g}"
    checks.append(Check("losses fall", fall, path))
    units = [0.0] * len(theirs) if len(losses) < 3 else [abs(a - b) for a, b in zip(theirs, losses[2], strict=True)]
    off = [
        abs(b - a) / (max(options.tolerance * abs(a), STEP_LIMIT * unit) or TINY)
        for a, b, unit in zip(theirs, ours, units, strict=True)
    ]
    worst = max(range(len(off)), key=lambda step: off[step])
    error = abs(ours[worst] - theirs[worst])
    when = f"after {worst} step{'s' * (worst > 1)}" if worst else "before the first step"
    text = f"{when} the loss is off by {error:.1e}, {off[worst]:.2f} of what passes"
    checks.append(Check("losses", off[worst] <= 1, text))
    if found.tensors:
        checks.append(_updates(found.tensors, options))
    where = f"outside of {options.train_only!r} " if options.train_only else ""
    still = f"nothing {where}moved" if not moved else f"moved without being trained: {some(moved)}"
    return [*checks, Check("frozen", not moved, still)]


def _updates(tensors: Sequence[TensorError], options: RunOptions) -> Check:
    """Each tensor's error, and that of the other attention, in units of its own update."""
    off = sorted(((tensor.rms / tensor.size, tensor.name) for tensor in tensors), reverse=True)
    units = [(tensor.noise or 0.0) / tensor.size for tensor in tensors]
    middle, usual = median(error for error, _ in off), median(units)
    limits = (
        max(options.tolerance, STEP_LIMIT * usual),
        max(WORST_UPDATE * options.tolerance, STEP_LIMIT * max(units)),
    )
    text = (
        f"updates are off by {middle:.1e} of their size (median of the tensors; limit {limits[0]:.1e}) and"
        f" {off[0][0]:.1e} (worst, {off[0][1]}; limit {limits[1]:.1e}); another attention moves transformers by"
        f" {usual:.1e} and {max(units):.1e}"
    )
    return Check("updates", middle <= limits[0] and off[0][0] <= limits[1], text)
