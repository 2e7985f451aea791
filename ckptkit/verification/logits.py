"""The level logits: both sides run over the same tokens, and must compute the same."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Unpack

from ckptkit.megatron.run_config import RunConfig
from ckptkit.steps import Step, Tell, nobody
from ckptkit.verification.judging import Judgement, Pair, Runs, find_place, judge, run_both
from ckptkit.verification.passes import Passes
from ckptkit.verification.ranks.jobs import OPENER
from ckptkit.verification.ranks.pool import RankPool, Ranks, TorchrunRanks, inside_torchrun
from ckptkit.verification.reports.report import LogitsReport
from ckptkit.verification.reports.results import CandidateRan, Check, Location
from ckptkit.verification.rounding import Rounding
from ckptkit.verification.run_options import RunKeywords, RunOptions
from ckptkit.verification.runs import Run, keep_logits
from ckptkit.verification.sides import MEGATRON, Side, check_candidate, open_side
from ckptkit.verification.tokens import check_rows, default_length, default_rows, read_rows

GREEDY_STEPS = 8

Tokens = Sequence[Sequence[int]] | str | Path | None
"""Token ids, or a JSON file with a list of lists, or None for pseudo-random ones."""


def verify_logits(
    reference: Side | tuple[str | Path, str],
    candidate: Side | tuple[str | Path, str],
    *,
    tokens: Tokens = None,
    greedy: int = GREEDY_STEPS,
    pool: Ranks | None = None,
    opener: str = OPENER,
    tell: Tell = nobody,
    **run: Unpack[RunKeywords],
) -> LogitsReport:
    """Runs two checkpoints over the same tokens and compares their logits at every position.

    The reference also continues every row greedily, and the candidate must pick the same tokens. float32 passes if the
    largest error is at most `tolerance` times the largest |logit| and the greedy texts are equal. Below float32 the
    candidate's error is measured in units of the reference's own error in that dtype (see `NoiseFloor`). Routers are
    judged by themselves (see `routing.judge_routing`). After a failure both run again in float32, on the tokens up to
    the first bad position, to find the layer where they part.

    The sides run one after the other. Inside torchrun every process calls this and is its own rank; all must share the
    directory for temporary files.

    Args:
        reference: The side that is trusted.
        candidate: The side in question.
        tokens: Token ids, or a JSON file with a list of lists; pseudo-random ones if None.
        greedy: Tokens of the greedy continuation.
        pool: Ranks to use; None starts as many as needed.
        opener: The function that opens a Megatron checkpoint, as `module:function`; ranks import it.
        tell: Told what runs, and how far it is.
        run: How the sides run: the fields of `RunOptions`.

    Raises:
        UsageError: The request makes no sense.
        InputError: A checkpoint or the tokens are damaged.
        UnsupportedError: A library has no such model.
        VerificationError: A run could not be made; that says nothing about the checkpoints.
    """
    options = RunOptions.of(**run)
    options.check()
    pair = Pair(*(open_side(Side(*side), opener) for side in (reference, candidate)))
    how = options.config(pair.candidate.grid, pair.candidate.window)
    check_candidate(pair.candidate.side, how)
    vocabularies = pair.reference.vocab_size, pair.candidate.vocab_size
    if vocabularies[0] != vocabularies[1]:
        summary = f"the vocabularies differ: {vocabularies[0]} and {vocabularies[1]} tokens"
        checks = [Check("vocabulary", False, summary)]
        return LogitsReport(False, summary, options.device, options.dtype, options.tolerance, [], checks=checks)
    rows = rows_of(tokens, vocabularies[0], how)
    steps = 0 if pair.reference.value_head or pair.candidate.value_head else greedy
    with ExitStack() as stack:
        ranks = pool or stack.enter_context(own_ranks(pair, options))
        folder = Path(ranks.once(lambda: tempfile.mkdtemp(prefix="ckptkit-verify-")))
        stack.callback(_remove, ranks, folder)
        passes = Passes(ranks, folder, opener, tell)
        runs = run_both(passes, pair, rows, options, steps)
        tell(Step("comparing the logits"))
        judgement = judge(runs, options, steps)
        location, messages = None, _notes(pair, runs)
        if not judgement.passed:
            location, more = find_place(passes, pair, runs, judgement, options)
            messages += more
        if options.save_logits is not None:
            target, lengths = Path(options.save_logits), [len(row) for row in rows]
            ranks.once(lambda: keep_logits(target, runs.exact, runs.found, lengths))
    return _report(runs, judgement, location, messages, options, pair.reference.side.rounding)


def rows_of(tokens: Tokens, vocab_size: int, run: RunConfig, default: int = 2) -> list[list[int]]:
    """The token ids to run; where none are given, `default` pseudo-random rows, long enough for the candidate's run.

    Raises:
        UsageError: They are not what a model can take.
    """
    if tokens is None:
        return default_rows(vocab_size, default, default_length(run))
    rows = read_rows(tokens) if isinstance(tokens, str | Path) else [list(row) for row in tokens]
    check_rows(rows, vocab_size)
    return rows


def own_ranks(pair: Pair, options: RunOptions) -> AbstractContextManager[Ranks]:
    """The processes that are there, or a pool for the larger grid, which starts while transformers runs its side."""
    if inside_torchrun():
        return nullcontext(TorchrunRanks())
    sides = (pair.reference, pair.candidate)
    pool = RankPool(max(options.config(side.grid, side.window).world_size for side in sides))
    if any(side.side.kind == MEGATRON for side in sides):
        pool.begin(options.device)
    return pool


def _remove(ranks: Ranks, folder: Path) -> None:
    """Removes the files, after all ranks have finished reading them."""
    ranks.wait_for_all()
    ranks.once(lambda: shutil.rmtree(folder, ignore_errors=True))


def _notes(pair: Pair, runs: Runs) -> list[str]:
    """Notes about features that the tokens could not show, and about a candidate that ran in a special way."""
    notes = []
    window, longest = runs.exact.config.window, max(map(len, runs.exact.rows))
    if window >= longest:
        notes.append(
            f"no row is longer than the sliding window of {window} tokens, so nothing was hidden by it"
            " (--tokens FILE with longer rows)"
        )
    if pair.reference.side.rounding.casts:
        notes.append(str(pair.reference.side.rounding))
    ran = _ran(runs.found)
    return [*notes, str(ran)] if ran is not None and runs.found.config.changes_candidate else notes


def _ran(found: Run) -> CandidateRan | None:
    """How the candidate ran, for the report; `check_ran` has compared it with what the ranks saw."""
    if not found.seen:
        return None
    devices = sorted({facts["device"] for facts in found.seen})
    run = found.config
    replication = run.dp_kind if run.dp > 1 else None
    return CandidateRan(run.packed, run.sequence_parallel, run.cp, run.dp, replication, devices)


def _report(
    runs: Runs,
    judgement: Judgement,
    location: Location | None,
    messages: list[str],
    options: RunOptions,
    rounding: Rounding,
) -> LogitsReport:
    modules = {**runs.exact.modules, **runs.found.modules}
    return LogitsReport(
        passed=judgement.passed,
        summary=judgement.summary,
        device=options.device,
        dtype=options.dtype,
        tolerance=options.tolerance,
        rows=runs.exact.rows,
        agreement=judgement.agreement,
        greedy=judgement.greedy,
        noise=judgement.noise,
        routing=judgement.routing,
        hidden_states=judgement.growth,
        checks=judgement.checks,
        location=location,
        messages=messages,
        megatron_modules={name: count for name, count in modules.items() if name.startswith("megatron.")},
        own_modules={name: count for name, count in modules.items() if not name.startswith("megatron.")},
        versions=runs.found.versions,
        candidate_ran=_ran(runs.found),
        seconds={
            f"{side}.{phase}": seconds
            for side, run in (("reference", runs.exact), ("candidate", runs.found))
            for phase, seconds in run.seconds.items()
        },
        reference_rounded=list(rounding.casts),
    )
