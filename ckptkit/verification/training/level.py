"""The levels gradients and training: both sides run the same tokens backwards."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Unpack

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.errors import UnsupportedError, UsageError
from ckptkit.io.as_torch import load
from ckptkit.verification.judging import Pair
from ckptkit.verification.logits import own_ranks, rows_of
from ckptkit.verification.ranks.adapters import open_adapter, open_laid_out
from ckptkit.verification.ranks.jobs import OPENER, find
from ckptkit.verification.ranks.pool import Ranks
from ckptkit.verification.reference import OTHER_ATTENTION
from ckptkit.verification.reports.report import LevelResult, jsonable
from ckptkit.verification.reports.results import CandidateRan, Check
from ckptkit.verification.run_options import EXACT, PREDICTION_WEIGHT, RunKeywords, RunOptions
from ckptkit.verification.sides import HF, MEGATRON, Side, check_backwards, open_side
from ckptkit.verification.training import files
from ckptkit.verification.training.factors import check_same_factors, check_trained_alike, described, together
from ckptkit.verification.training.figures import Comparisons, by_place, compare
from ckptkit.verification.training.judging import differs, judge_gradients, judge_steps
from ckptkit.verification.training.names import matching
from ckptkit.verification.training.passes import Backwards, TrainingRun, open_side_with

ROWS = 4
"""Rows of the default tokens: data parallel ranks share them out."""
VALUE_LOSS = (
    "a value model: the loss is the mean squared difference of its values from the cosine of the next token's id"
)
NOTHING_BELOW = (
    "only the head has a gradient, as under a value head of zeros: the layers were not compared (--train-steps 2"
    " compares what the second step does to them)"
)
PREDICTION_LOSS = (
    f"the loss is the model's own, and {PREDICTION_WEIGHT:g} times the mean of those of its layers of multi-token"
    " prediction"
)
KEPT = 20
"""Tensors that a report lists with their figures, worst first."""


def verify_gradients(
    reference: Side | tuple[str | Path, str],
    candidate: Side | tuple[str | Path, str],
    *,
    tokens: Sequence[Sequence[int]] | str | Path | None = None,
    pool: Ranks | None = None,
    opener: str = OPENER,
    **run: Unpack[RunKeywords],
) -> LevelResult:
    """Runs two checkpoints backwards over the same tokens, and compares their gradients tensor by tensor.

    The loss is that of the next token, over the tokens behind each row's prompt (its first quarter); of a value model
    the mean squared difference of its values there from `batches.values_to_learn`. Where the sides have layers of
    multi-token prediction (`Side.prediction`), the mean of their losses is added, times `PREDICTION_WEIGHT`. The
    candidate's gradients come from
    megatron-core's own schedule and reductions, and are taken to Hugging Face's names by the table of the family.
    float32 and float64 pass if in every tensor the largest error is at most `tolerance` times the largest |g|; narrower
    types are judged by the noise floor (see `judging`).

    Args:
        reference: The side that is trusted.
        candidate: The side in question.
        tokens: Token ids, or a JSON file with a list of lists; pseudo-random ones if None.
        pool: Ranks to use; None starts as many as needed.
        opener: The function that opens a Megatron checkpoint, as `module:function`.
        run: How the sides run: the fields of `RunOptions`.

    Raises:
        UsageError: The request makes no sense.
        InputError: A checkpoint or the tokens are damaged.
        UnsupportedError: A library has no such model.
        VerificationError: A run could not be made; that says nothing about the checkpoints.
    """
    options = replace(RunOptions.of(**run), train_steps=0)
    with ExitStack() as stack:
        sides = _Sides(stack, reference, candidate, tokens, options, pool, opener)
        exact = sides.run_reference("reference", options.plain())
        lows = sides.low_runs(exact)
        found = sides.run_candidate(exact)
        figures = sides.compare(files.GRADIENTS, exact, found, lows)
        low_loss = lows[0].losses[0] if lows else None
        checks = judge_gradients(figures, (exact.losses[0], found.losses[0]), options, low_loss)
        details = {**sides.details(exact, found, figures), "messages": sides.messages(exact, found, figures)}
    return _answer("gradients", checks, details)


def verify_training(
    reference: Side | tuple[str | Path, str],
    candidate: Side | tuple[str | Path, str],
    *,
    tokens: Sequence[Sequence[int]] | str | Path | None = None,
    pool: Ranks | None = None,
    opener: str = OPENER,
    **run: Unpack[RunKeywords],
) -> LevelResult:
    """Lets two checkpoints take the same steps of training, and compares the losses and what the steps added.

    All steps see the same tokens. Rounding alone lets two correct implementations part after a few steps, so the
    candidate is judged in units of what another implementation of attention does to transformers.

    Args:
        reference: The side that is trusted.
        candidate: The side in question.
        tokens: As for `verify_gradients`.
        pool: Ranks to use; None starts as many as needed.
        opener: The function that opens a Megatron checkpoint, as `module:function`.
        run: How the sides run: the fields of `RunOptions`; `train_steps` is how many.

    Raises:
        CkptkitError: As for `verify_gradients`; or the pattern of what is trained does not fit the model.
    """
    options = RunOptions.of(**run)
    if options.dtype not in EXACT:
        raise UsageError(
            f"steps of training are compared in float32 or float64, not in {options.dtype}",
            hint="its weights would not see small updates; --level gradients judges that type",
        )
    if not options.train_steps:
        raise UsageError("the level training needs --train-steps N")
    with ExitStack() as stack:
        sides = _Sides(stack, reference, candidate, tokens, options, pool, opener)
        exact = sides.run_reference("reference", options.plain())
        other = sides.other_run(exact)
        found = sides.run_candidate(exact)
        figures = sides.compare(files.UPDATES, exact, found, [other] if other is not None else [])
        losses = [run.losses for run in (exact, found, other) if run is not None]
        checks = judge_steps(figures, losses, found.moved, options)
        details = {**sides.details(exact, found, figures), "messages": sides.loss_notes()}
        details["losses"] |= {"other attention": other.losses} if other is not None else {}
    return _answer("training", checks, details)


class _Sides:
    """The two sides, ready to run."""

    def __init__(
        self,
        stack: ExitStack,
        reference: Side | tuple[str | Path, str],
        candidate: Side | tuple[str | Path, str],
        tokens: Sequence[Sequence[int]] | str | Path | None,
        options: RunOptions,
        pool: Ranks | None,
        opener: str,
    ) -> None:
        options.check()
        self.options = options
        self.pair = Pair(*(open_side(Side(*side), opener) for side in (reference, candidate)))
        own = self.pair.candidate
        how = options.config(own.grid, own.window)
        check_backwards(own.side, how, experts=own.experts)
        rows = rows_of(tokens, self.pair.reference.vocab_size, how, ROWS)
        if not any(len(row) > 1 for row in rows):
            raise UsageError("no row has a next token", hint="give longer rows with --tokens")
        ranks = pool or stack.enter_context(own_ranks(self.pair, options))
        folder = Path(ranks.once(lambda: tempfile.mkdtemp(prefix="ckptkit-verify-")))
        stack.callback(_remove, ranks, folder)
        trained = None
        if self.pair.reference.side.adapter is not None:
            check_trainable(self.pair, opener, options)
            check_same_factors(*_adapters(self.pair, opener))
        elif options.train_only is not None:
            trained = matching(open_side_with(opener, self.pair.candidate), options.train_only)
        self.backwards = Backwards(ranks, folder, opener, rows, trained)

    def run_reference(self, name: str, options: RunOptions, **how: Any) -> TrainingRun:
        """A run of the reference.

        Raises:
            UnsupportedError: transformers has no eager attention for it.
        """
        run = self.backwards.run(self.pair.reference, name, options, **how)
        if run is None:
            raise UnsupportedError("transformers has no such attention for it", where=self.pair.reference.side.path)
        return run

    def run_candidate(self, exact: TrainingRun) -> TrainingRun:
        """The run of the candidate."""
        run = self.backwards.run(self.pair.candidate, "candidate", self.options, routed_as=exact)
        if run is None:
            raise UnsupportedError("transformers has no such attention for it", where=self.pair.candidate.side.path)
        return run

    def other_run(self, exact: TrainingRun, dtype: str | None = None) -> TrainingRun | None:
        """The reference once more, with another attention, where there is one."""
        if self.pair.reference.side.kind != HF:
            return None
        plain = self.options.plain(dtype)
        return self.backwards.run(self.pair.reference, "other", plain, routed_as=exact, attention=OTHER_ATTENTION)

    def low_runs(self, exact: TrainingRun) -> list[TrainingRun]:
        """The reference in the candidate's type, with every attention that it has; nothing for an exact type."""
        if self.options.dtype in EXACT:
            return []
        first = self.run_reference("low", self.options.plain(self.options.dtype), routed_as=exact)
        second = self.other_run(exact, self.options.dtype)
        return [first] if second is None else [first, second]

    def compare(self, kind: str, exact: TrainingRun, found: TrainingRun, noise: Sequence[TrainingRun]) -> Comparisons:
        """What two runs left, tensor by tensor."""
        sides = [self.backwards.named(run, kind) for run in (exact, found, *noise)]
        if self.pair.reference.side.adapter is not None:
            sides = together(sides)
        theirs, ours, *low = sides
        figures = compare(
            theirs.tensors,
            ours.tensors,
            low=[run.tensors for run in low],
            unused=ours.unused,
            copies=ours.copies,
        )
        return replace(figures, surplus=[*figures.surplus, *found.stray])

    def details(self, exact: TrainingRun, found: TrainingRun, figures: Comparisons) -> dict[str, Any]:
        """What the report of a level has beside its checks."""
        options = self.options
        ran = _ran(found)
        return {
            "device": options.device,
            "dtype": options.dtype,
            "tolerance": options.tolerance,
            "rows": self.backwards.rows,
            "tokens": found.tokens,
            "losses": {"reference": exact.losses, "candidate": found.losses},
            "tensors": len(figures.tensors),
            "worst": [asdict(tensor) for tensor in figures.tensors[:KEPT]],
            "places": [asdict(place) for place in by_place(figures.tensors)],
            "differing": [tensor.name for tensor in figures.tensors if differs(tensor, options)],
            "missing": figures.missing,
            "surplus": figures.surplus,
            "recompute": found.config.recompute,
            "megatron_modules": {name: n for name, n in found.modules.items() if name.startswith("megatron.")},
            "own_modules": {name: n for name, n in found.modules.items() if not name.startswith("megatron.")},
            "versions": found.versions,
            "candidate_ran": None if ran is None else asdict(ran),
            "seconds": {
                f"{side}.{phase}": seconds
                for side, run in (("reference", exact), ("candidate", found))
                for phase, seconds in run.seconds.items()
            },
        }

    def messages(self, exact: TrainingRun, found: TrainingRun, figures: Comparisons) -> list[str]:
        """What else to know."""
        ran = _ran(found)
        lines = [str(ran)] if ran is not None and found.config.changes_candidate else []
        lines += self.loss_notes()
        if self.pair.candidate.value_head:
            lines.append(VALUE_LOSS)
            if {place.place for place in by_place(figures.tensors)} == {"head"}:
                lines.append(NOTHING_BELOW)
        if self.pair.candidate.side.adapter is not None:
            return [*lines, *described(self.backwards.named(found, files.GRADIENTS).further)]
        return [*lines, *self._padding(exact, found)]

    def loss_notes(self) -> list[str]:
        """What the loss is, where it is not that of the next token alone."""
        return [PREDICTION_LOSS] if self.pair.candidate.side.prediction else []

    def _padding(self, exact: TrainingRun, found: TrainingRun) -> list[str]:
        """The rows of padding tokens, which transformers gives no gradient where it looks them up, and Megatron does.

        The reference ran without that rule, so these rows are compared like all others.
        """
        used = {token for row in self.backwards.rows for token in row}
        tensors = self.backwards.named(found, files.GRADIENTS).tensors
        lines = []
        for name, row in exact.padding.items():
            if row not in used or name not in tensors:
                continue
            gradient = load(tensors[name])
            share = float(gradient[row].abs().max()) / (float(gradient.abs().max()) or 1.0)
            lines.append(
                f"row {row} of {name} is the padding token's (padding_idx): transformers keeps the gradient of its"
                f" lookup at zero, Megatron does not ({share:.1e} of the largest |g|); compared without that rule"
            )
        return lines


def check_trainable(pair: Pair, opener: str, options: RunOptions) -> None:
    """Whether the adapters of two sides can be trained alike.

    Raises:
        UsageError: The candidate has its adapter in its weights, or something else is to be trained.
        UnsupportedError: Steps do something else to the candidate's factors, in its layout, than to those of peft.
    """
    candidate = pair.candidate.side.adapter
    if candidate is None:
        raise UsageError(
            "a merged model has no factors that could have gradients",
            where=pair.candidate.side.path,
            hint="stop at --level logits, or give the adapter itself for CANDIDATE",
        )
    if options.train_only is not None:
        raise UsageError("with --adapter exactly the adapter is trained", hint="drop --train-only")
    if options.train_steps and pair.candidate.side.kind == MEGATRON:
        model = open_side_with(opener, pair.candidate)
        laid = open_laid_out(candidate, model, pair.candidate.grid, find(opener))
        check_trained_alike(_adapters(pair, opener)[0], laid)


def _adapters(pair: Pair, opener: str) -> list[Checkpoint]:
    """The adapters of two sides that have one."""
    jobs = [(side, side.side.adapter) for side in (pair.reference, pair.candidate)]
    return [open_adapter(job, open_side_with(opener, side), find(opener)) for side, job in jobs if job is not None]


def _ran(found: TrainingRun) -> CandidateRan | None:
    if found.opened.side.kind != MEGATRON:
        return None
    devices = sorted({facts["device"] for facts in found.seen})
    run = found.config
    return CandidateRan(run.packed, run.sequence_parallel, run.cp, run.dp, run.dp_kind, devices)


def _remove(ranks: Ranks, folder: Path) -> None:
    """Removes the files, after all ranks have finished reading them."""
    ranks.wait_for_all()
    ranks.once(lambda: shutil.rmtree(folder, ignore_errors=True))


def _answer(name: str, checks: list[Check], details: dict[str, Any]) -> LevelResult:
    failed = [check.summary for check in checks if not check.passed]
    summary = "; ".join(failed or [check.summary for check in checks if check.name not in ("finite", "frozen")])
    return LevelResult(name, not failed, summary, jsonable(details), checks)
