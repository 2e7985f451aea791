"""Comparing logits of two runs, a few positions at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ckptkit.verification.reports.results import Agreement, Greedy, NoiseFloor
from ckptkit.verification.runs import Run, row_logits

if TYPE_CHECKING:
    import torch

BLOCK = 64
"""Positions that are in memory at a time."""
MEDIAN_LIMIT, P99_LIMIT = 1.25, 2.0
REPEAT_P99_LIMIT = 4.0
"""For a second run of the reference, measured against one sample of noise, which is small at some position by luck."""
TIE = 1e-6
"""Two logits closer than this share of the largest one are equal to fp32."""


@dataclass(frozen=True)
class Block:
    """Logits of some positions of one row, fp32 [positions, vocabulary] of each run."""

    row: int
    start: int
    logits: list[torch.Tensor]


def blocks(*runs: Run) -> Iterator[Block]:
    """The runs' logits side by side; all runs saw the same rows."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        files = [stack.enter_context(row_logits(run)) for run in runs]
        for row, tokens in enumerate(runs[0].rows):
            for start in range(0, len(tokens), BLOCK):
                part = slice(start, min(start + BLOCK, len(tokens)))
                yield Block(row, start, [file[row][part] for file in files])


def compare(reference: Run, candidate: Run) -> Agreement:
    """Errors, top-1 agreement and divergence of `candidate` against `reference`; both saw the same rows."""
    largest, positions, agreeing, divergence, kl_max = 0.0, 0, 0, 0.0, 0.0
    errors: list[list[float]] = [[] for _ in reference.rows]
    non_finite = {"reference": 0, "candidate": 0}
    lowest, highest = math.inf, -math.inf
    for block in blocks(reference, candidate):
        expected, found = block.logits
        for side, logits in (("reference", expected), ("candidate", found)):
            non_finite[side] += int((~logits.isfinite()).sum())
        difference = (found - expected).abs().nan_to_num(nan=math.inf)
        errors[block.row] += difference.amax(-1).tolist()
        lowest, highest = min(lowest, float(expected.min())), max(highest, float(expected.max()))
        largest = max(largest, float(expected.nan_to_num(posinf=0.0, neginf=0.0).abs().max()))
        agreeing += int((expected.argmax(-1) == found.argmax(-1)).sum())
        kl = _divergence(expected, found)
        divergence, kl_max, positions = divergence + sum(kl), max([kl_max, *kl]), positions + len(kl)
    top, worst = max((error, (row, at)) for row, line in enumerate(errors) for at, error in enumerate(line))
    scale = largest or 1.0
    return Agreement(
        max_abs_error=top,
        max_abs_logit=largest,
        relative_error=top / scale,
        worst=worst,
        top1_agreement=agreeing / positions,
        kl_mean=divergence / positions,
        kl_max=kl_max,
        non_finite=non_finite,
        per_position=[[error / scale for error in line] for line in errors],
        constant=lowest == highest,
    )


def _divergence(expected: torch.Tensor, found: torch.Tensor) -> list[float]:
    """KL(expected || found) of each position, in nats; infinite where a logit is not finite."""
    import torch

    p, q = (torch.log_softmax(logits.double(), dim=-1) for logits in (expected, found))
    return (p.exp() * (p - q)).sum(-1).nan_to_num(nan=math.inf).clamp(min=0.0).tolist()


def noise_ratios(reference: Run, low_references: Sequence[Run], low_candidate: Run) -> list[list[float]]:
    """The ratio r of `NoiseFloor` at each position of each row; all runs saw the same rows.

    Args:
        reference: The reference in fp32.
        low_references: Runs of it in the candidate's dtype, which differ in rounding only.
        low_candidate: The candidate.
    """
    import torch

    ratios: list[list[float]] = [[] for _ in reference.rows]
    for block in blocks(reference, low_candidate, *low_references):
        exact, *others = (logits.double() for logits in block.logits)
        squares = [(logits - exact).square() for logits in others]
        if exact.size(-1) == 1:  # a value says too little by itself: one ratio for all positions of the block
            squares = [square.mean(0, keepdim=True).expand_as(square) for square in squares]
        theirs, *noise = (square.mean(-1) for square in squares)
        theirs, own = theirs.sqrt(), torch.stack(noise).mean(0).sqrt()
        ratio = theirs / own
        ratio[(theirs == 0) & (own == 0)] = 0.0  # a reference without rounding error is met exactly
        ratio[~own.isfinite()] = math.inf  # nothing can be measured in such units
        ratios[block.row] += ratio.nan_to_num(nan=math.inf, posinf=math.inf).tolist()
    return ratios


def noise_floor(exact: Run, low: Run, found: Run) -> tuple[NoiseFloor, list[list[float]]]:
    """The candidate's error in units of the reference's own, and its ratio at each position of each row.

    A second run of the reference, with another implementation of attention, counts only if it passes for a correct
    one itself: a faulty kernel would else raise the limit for every candidate.

    Args:
        exact: The reference in fp32.
        low: The reference in the candidate's dtype, run once or twice.
        found: The candidate.
    """
    runs, again = [low], None
    if low.again is not None:
        second = replace(low, logits=low.again)
        again = quantiles(noise_ratios(exact, runs, second))
        if again[0] <= MEDIAN_LIMIT and again[1] <= REPEAT_P99_LIMIT:
            runs.append(second)
    ratios = noise_ratios(exact, runs, found)
    return NoiseFloor(*quantiles(ratios), MEDIAN_LIMIT, P99_LIMIT, len(runs), *(again or (None, None))), ratios


def quantiles(ratios: list[list[float]]) -> tuple[float, float]:
    """Median and 99th percentile: the smallest ratio that this share of them does not exceed."""
    ordered = sorted(ratio for row in ratios for ratio in row)
    at = [max(0, math.ceil(share * len(ordered)) - 1) for share in (0.5, 0.99)]
    return ordered[at[0]], ordered[at[1]]


def compare_greedy(reference: Run, candidate: Run, steps: int, largest: float) -> tuple[Greedy, list[tuple[int, int]]]:
    """Whether the candidate continues as the reference did.

    The rows end with the `steps` tokens that the reference appended. Fed with them, a candidate that picks the same
    token at every step would have written the same text by itself.

    Args:
        reference: The reference's run.
        candidate: The candidate's run over the same rows.
        steps: Tokens that were appended to each row.
        largest: Largest |logit| of the reference; closer than `TIE` times this is a tie.

    Returns:
        The figures, and (row, position) of the logits at which another token was picked.
    """
    equal, ties, parted = 0, 0, []
    with row_logits(reference) as expected, row_logits(candidate) as found:
        for row, tokens in enumerate(reference.rows):
            part = slice(len(tokens) - steps - 1, len(tokens) - 1)
            theirs, ours = expected[row][part], found[row][part]
            for step, token in enumerate(tokens[len(tokens) - steps :]):
                choice = int(ours[step].argmax())
                if choice == token:
                    equal += 1
                elif float(theirs[step, token] - theirs[step, choice]) <= TIE * largest:
                    ties += 1
                else:
                    parted.append((row, part.start + step))
    continuation = [row[len(row) - steps :] for row in reference.rows]
    return Greedy(continuation, steps * len(reference.rows), equal, ties), parted
