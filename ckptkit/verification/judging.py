"""Judges two runs over the same tokens: the figures, the checks of the level logits, and the first difference."""

from __future__ import annotations

from dataclasses import dataclass

from ckptkit.errors import CkptkitError, VerificationError
from ckptkit.verification.passes import Passes
from ckptkit.verification.reports.results import (
    Agreement,
    Check,
    Greedy,
    Location,
    NoiseFloor,
    RoutingReport,
    StateError,
)
from ckptkit.verification.run_options import EXACT, RunOptions
from ckptkit.verification.runs import Run
from ckptkit.verification.sides import OpenedSide


@dataclass(frozen=True)
class Pair:
    """The two sides.

    Attributes:
        reference: The side that is trusted.
        candidate: The side in question.
    """

    reference: OpenedSide
    candidate: OpenedSide


@dataclass(frozen=True)
class Runs:
    """The runs of the two sides over the same tokens.

    Attributes:
        exact: The reference in float32, or in float64.
        low: The reference in the candidate's dtype, or None where that is the same.
        found: The candidate.
    """

    exact: Run
    low: Run | None
    found: Run


@dataclass(frozen=True)
class Judgement:
    """The judgement of the runs.

    Attributes:
        agreement: Candidate against the reference in float32.
        greedy: The greedy continuation.
        noise: Below float32: the noise floor.
        routing: With experts and replayed routing: the agreement of the routers.
        growth: Error of the hidden states, layer by layer.
        checks: The questions, with their answers.
        bad: (row, position) of logits that are too far off.
    """

    agreement: Agreement
    greedy: Greedy
    noise: NoiseFloor | None
    routing: RoutingReport | None
    growth: list[StateError]
    checks: list[Check]
    bad: list[tuple[int, int]]

    @property
    def passed(self) -> bool:
        """Whether the two are one model."""
        return all(check.passed for check in self.checks)

    @property
    def summary(self) -> str:
        """One line: what is not finite, or all figures."""
        if not self.checks[0].passed:
            return self.checks[0].summary
        texts = {check.name: check.summary for check in self.checks[1:] if check.name != "greedy"}
        if "router logits" in texts:
            texts["router logits"] = f"router logits {texts['router logits']}"
        error, *others = texts.values()
        if not self.greedy.steps:
            return ", ".join((error, *others))
        same = f"top-1 agreement {100 * self.agreement.top1_agreement:.1f} %"
        return ", ".join((error, same, _equal(self.greedy), *others))


def run_both(passes: Passes, pair: Pair, rows: list[list[int]], options: RunOptions, greedy: int) -> Runs:
    """Runs both sides, one after the other; the reference appends `greedy` tokens to every row."""
    exact = passes.run(pair.reference, rows, "reference", options.plain(), greedy=greedy)
    low = None
    if options.dtype not in EXACT:
        plain = options.plain(options.dtype)
        low = passes.run(pair.reference, exact.rows, "low_reference", plain, routed_as=exact, twice=True)
    return Runs(exact, low, passes.run(pair.candidate, exact.rows, "candidate", options, routed_as=exact))


def judge(runs: Runs, options: RunOptions, greedy: int) -> Judgement:
    """Figures and answers of two runs.

    Args:
        runs: The runs.
        options: How they were made.
        greedy: Tokens that the reference appended to every row.

    Raises:
        VerificationError: The logits cannot show what was asked for.
    """
    from ckptkit.verification.comparison import compare, compare_greedy, noise_floor
    from ckptkit.verification.error_growth import error_growth
    from ckptkit.verification.routing import judge_routing

    exact, low, found = runs.exact, runs.low, runs.found
    agreement = compare(exact, found)
    continuation, parted = compare_greedy(exact, found, greedy, agreement.max_abs_logit)
    noise = None
    if low is None:
        bad = _bad_positions(agreement.per_position, options.tolerance) + parted
    else:
        noise, ratios = noise_floor(exact, low, found)
        bad = _bad_positions(ratios, noise.p99_limit)
    routing = judge_routing(exact, low, found, options.tolerance) if options.replay else None
    growth = error_growth(exact, low, found)
    checks = _checks(agreement, continuation, noise, routing, options)
    if agreement.constant:
        checks.append(_final_norm(growth, options))
    return Judgement(agreement, continuation, noise, routing, growth, checks, bad or [agreement.worst])


def _bad_positions(errors: list[list[float]], limit: float) -> list[tuple[int, int]]:
    return [(row, at) for row, line in enumerate(errors) for at, error in enumerate(line) if not error <= limit]


def _checks(
    agreement: Agreement,
    greedy: Greedy,
    noise: NoiseFloor | None,
    routing: RoutingReport | None,
    options: RunOptions,
) -> list[Check]:
    """Every question of the level with its answer, the same ones for one dtype and model whatever the answers are."""
    sides = ", ".join(f"{count} of the {side}" for side, count in agreement.non_finite.items() if count)
    checks = [
        Check("finite", agreement.finite, f"logits are not finite: {sides}" if sides else "all logits are finite")
    ]
    if noise is None:
        limit = options.tolerance
        text = f"largest error {agreement.relative_error:.1e} of the largest |logit| (tolerance {limit:.0e})"
        checks.append(Check("error", agreement.relative_error <= limit, text))
        if greedy.steps:
            checks.append(Check("greedy", greedy.passed, _equal(greedy)))
    else:
        text = (
            f"{options.dtype} error {noise.median:.2f} (median) and {noise.p99:.2f} (p99) times the reference's own"
            f" (limits {noise.median_limit:g} and {noise.p99_limit:g})"
        )
        if noise.repeat_median is not None:
            text += f"; a second run of the reference {noise.repeat_median:.2f} and {noise.repeat_p99:.2f}"
            text += ", which is too far off to count" if noise.samples == 1 else ""
        checks.append(Check("noise floor", noise.passed, text))
    return checks + (routing.checks() if routing is not None else [])


def _final_norm(growth: list[StateError], options: RunOptions) -> Check:
    """Compares the inputs of the head, for a head whose outputs are all equal (a value head of zeros)."""
    from ckptkit.verification.comparison import MEDIAN_LIMIT

    if options.packed:
        raise VerificationError(
            "all logits of the reference are one number, which cannot tell packed rows apart",
            hint="verify without --packed, or with another head (convert --head-init normal)",
        )
    (state,) = (state for state in growth if state.place == "final norm")
    limit = options.tolerance if state.noise is None else MEDIAN_LIMIT * state.noise
    text = f"all logits of the reference are one number; what the head is fed is off by {state.rms_error:.1e}"
    return Check("final norm", state.rms_error <= limit, f"{text} (limit {limit:.1e})")


def _equal(greedy: Greedy) -> str:
    return f"greedy tokens {greedy.equal + greedy.ties} of {greedy.steps} equal"


def find_place(
    passes: Passes, pair: Pair, runs: Runs, judgement: Judgement, options: RunOptions
) -> tuple[Location | None, list[str]]:
    """Runs both sides again in float32, up to the earliest bad position, to find the layer where they part.

    Returns:
        The place, or None if float32 shows none, and what to say about it.
    """
    from ckptkit.verification.error_growth import first_excess
    from ckptkit.verification.location import locate

    row, position = min(judgement.bad, key=lambda place: (place[1], place[0]))
    messages = [f"first seen in row {row} at position {position}"]
    behind = pair.reference.side.prediction  # tokens that multi-token prediction sees beside the one at the position
    prefix, exact = [runs.exact.rows[row][: position + 1 + behind]], options.in_dtype(options.exact_dtype)
    try:
        theirs = passes.run(pair.reference, prefix, "probe_reference", options.plain(), whole_layers=False)
        ours = passes.run(pair.candidate, prefix, "probe_candidate", exact, whole_layers=False, routed_as=theirs)
    except CkptkitError as error:
        return None, [*messages, f"the layer could not be found: {error}"]
    location = locate(theirs, ours)
    if location is not None:
        return location, [*messages, str(location)]
    if options.packed:
        return None, [*messages, "that row alone, the models agree: the difference arises only beside other rows"]
    if options.dtype in EXACT:
        return None, [*messages, "no hidden state of that row differs by more than the noise"]
    messages.append(f"in float32 the models agree there: the difference arises only in {options.dtype}")
    excess = first_excess(judgement.growth)
    if excess is not None and excess.noise:
        times = excess.rms_error / excess.noise
        messages.append(f"it is first seen at {excess.place}: {times:.1f} times the reference's own error")
    return None, messages
