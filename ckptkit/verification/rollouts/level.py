"""The level rollouts: what an engine sampled goes through the model, and the log-probabilities are compared."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptkit.errors import UnsupportedError
from ckptkit.steps import Step, Tell, nobody
from ckptkit.tables.model_config import ModelConfig
from ckptkit.verification.passes import Passes
from ckptkit.verification.ranks.pool import RankPool, Ranks, TorchrunRanks, inside_torchrun
from ckptkit.verification.reports.report import LevelResult, jsonable
from ckptkit.verification.rollouts.conversations import Row
from ckptkit.verification.rollouts.figures import Bin, Column, column, curve
from ckptkit.verification.rollouts.judging import (
    EXPLAINED,
    MEAN_LIMIT,
    P99_LIMIT,
    Explanation,
    Floor,
    explain,
    floor_of,
    judge,
)
from ckptkit.verification.rollouts.options import RolloutOptions
from ckptkit.verification.rollouts.reading import Rollouts
from ckptkit.verification.rollouts.scores import GRID, fit_temperature, logprobs_at
from ckptkit.verification.run_options import EXACT, RunOptions
from ckptkit.verification.runs import Run, row_logits
from ckptkit.verification.sides import OpenedSide
from ckptkit.verification.tokens import check_rows

if TYPE_CHECKING:
    import numpy as np

    from ckptkit.verification.rollouts.replay import FreeRouting

    Array = np.ndarray[Any, Any]

WORST, CONTEXT = 10, 16
"""Tokens that a report lists, and those before each."""


@dataclass(frozen=True)
class Worst:
    """A token whose log-probabilities differ much.

    Attributes:
        row: Its row, from 0.
        position: Its place there.
        line: The last line of the file that this row is made of.
        token: Its id.
        engine: Recorded log-probability.
        candidate: The candidate's.
        reference: The reference's, or None.
        context: Ids before it.
        text: Context and token as text, or None without a tokenizer.
    """

    row: int
    position: int
    line: int
    token: int
    engine: float
    candidate: float
    reference: float | None
    context: list[int]
    text: str | None


@dataclass(frozen=True)
class RolloutsReport:
    """Details of the level rollouts.

    Attributes:
        file: The file of rollouts.
        shapes: What recorded a turn -> turns.
        turns: Turns in the file.
        joined: Turns that continue another one, in its row.
        apart: Turns whose prompt continues another prompt, but not what was sampled after it.
        rows: Rows that ran.
        tokens: Tokens that ran.
        sampled: Tokens with a recorded log-probability, which are compared.
        unrecorded: Tokens of responses without one.
        device: Where the models ran.
        dtype: Type that the candidate ran in.
        engine_dtype: Type that the engine is taken to have run in.
        temperature: Temperature of the recorded log-probabilities, as asked for.
        fitted_temperature: The one that fits best, where none was asked for.
        fitted_mean: Mean |difference| at that temperature.
        scaled: Whether the log-probabilities are those of another temperature.
        renormalised: Whether they are those of a part of the vocabulary.
        kept: Then: the median probability of that part.
        floor: The unit of the verdict.
        mean_limit: Floors that the mean may have.
        p99_limit: Floors that the 99th percentile may have.
        max_kl: Limit of k3, or None.
        engine_perplexity: exp of the mean negative recorded log-probability.
        columns: `reference`, `candidate`, `replayed` (the candidate with the engine's routing) -> its figures.
        judged: The column that the verdict is about.
        prompt: Mean |difference| over tokens of prompts, where the engine gave those; or None.
        candidate_mean: Mean |difference| of candidate and reference, or None without a reference.
        routing: What the candidate chooses by itself, where the engine's routing was recorded; or None.
        curve: Error by position.
        window: The widest sliding window in tokens, 0 without one.
        prompt_ends: Shortest, median and longest first prompt.
        worst: The worst tokens.
        messages: What else to know, one line each.
        megatron_modules: As in `LogitsReport`.
        own_modules: As in `LogitsReport`.
        seconds: `<run>.<phase>` -> wall-clock seconds.
    """

    file: str
    shapes: dict[str, int]
    turns: int
    joined: int
    apart: int
    rows: int
    tokens: int
    sampled: int
    unrecorded: int
    device: str
    dtype: str
    engine_dtype: str
    temperature: float
    fitted_temperature: float | None
    fitted_mean: float | None
    scaled: bool
    renormalised: bool
    kept: float | None
    floor: Floor
    mean_limit: float
    p99_limit: float
    max_kl: float | None
    engine_perplexity: float
    columns: dict[str, Column]
    judged: str
    prompt: float | None
    candidate_mean: float | None
    routing: FreeRouting | None
    curve: list[Bin]
    window: int
    prompt_ends: list[int]
    worst: list[Worst]
    messages: list[str] = field(default_factory=list)
    megatron_modules: dict[str, int] = field(default_factory=dict)
    own_modules: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def verify_rollouts(
    reference: OpenedSide | None,
    candidate: OpenedSide,
    config: ModelConfig,
    rollouts: Rollouts,
    asked: RolloutOptions,
    options: RunOptions,
    *,
    opener: str,
    pool: Ranks | None = None,
    tell: Tell = nobody,
    decode: Callable[[list[int]], str] | None = None,
) -> LevelResult:
    """Runs the recorded tokens through the candidate, and compares its log-probabilities with the recorded ones.

    Args:
        reference: The model in transformers, to which the noise is measured and which tells an engine's fault from one
            of the conversion; or None, and the noise is the candidate's own.
        candidate: The model as it is trained.
        config: The candidate's.
        rollouts: What was recorded.
        asked: What is known about the recording.
        options: How the candidate runs.
        opener: The function that opens a Megatron checkpoint, as `module:function`.
        pool: Ranks to use; None starts as many as needed.
        tell: Told what runs.
        decode: Text of token ids, or None.

    Raises:
        UsageError: The request makes no sense.
        InputError: The recording is not of this model.
        UnsupportedError: It has no logits.
        VerificationError: A run could not be made.
    """
    if candidate.value_head or (reference is not None and reference.value_head):
        raise UnsupportedError("a value model has no log-probabilities", where=candidate.side.path)
    rows = rollouts.joined.rows
    check_rows([row.tokens for row in rows], candidate.vocab_size)
    with ExitStack() as stack:
        ranks = pool or stack.enter_context(_own_ranks(candidate, options))
        folder = Path(ranks.once(lambda: tempfile.mkdtemp(prefix="ckptkit-verify-")))
        stack.callback(_remove, ranks, folder)
        runs = _Runs(Passes(ranks, folder, opener, tell), reference, candidate, config, rows, asked, options)
        runs.run()
        tell(Step("comparing the log-probabilities"))
        return _Comparison(runs, rollouts, asked, options, decode).result()


def _own_ranks(candidate: OpenedSide, options: RunOptions) -> AbstractContextManager[Ranks]:
    if inside_torchrun():
        return nullcontext(TorchrunRanks())
    return RankPool(options.config(candidate.grid, candidate.window).world_size)


def _remove(ranks: Ranks, folder: Path) -> None:
    """Removes the files, after all ranks have finished reading them."""
    ranks.wait_for_all()
    ranks.once(lambda: shutil.rmtree(folder, ignore_errors=True))


class _Runs:
    """All runs over the recorded tokens.

    Attributes:
        free: The candidate.
        engine: The engine's routing, or None.
        replayed: The candidate with the engine's routing, or None.
        exact: What the noise is measured against: the reference in a finer type, or the candidate; None where the
            candidate's own run is that.
        low: Type -> run in it.
    """

    def __init__(
        self,
        passes: Passes,
        reference: OpenedSide | None,
        candidate: OpenedSide,
        config: ModelConfig,
        rows: list[Row],
        asked: RolloutOptions,
        options: RunOptions,
    ) -> None:
        self.passes, self.reference, self.candidate, self.config = passes, reference, candidate, config
        self.rows, self.asked, self.options = rows, asked, options
        self.tokens = [row.tokens for row in rows]
        self.beta = 1 / asked.temperature
        self.inverse = sorted({*GRID, self.beta})
        self.engine_dtype = asked.engine_dtype or config.dtype or "float32"
        self.noisy = _noisy(self.engine_dtype, options.dtype)
        self.finer = "float64" if set(self.noisy) == {"float32"} else "float32"
        self.engine: Run | None = None
        self.replayed: Run | None = None
        self.low: dict[str, Run] = {}

    def run(self) -> None:
        """Makes the runs, one after the other."""
        options = self.options
        self.free = self._candidate("candidate", options)
        if options.replay and any(row.routings for row in self.rows):
            self._replay()
        if self.reference is not None:
            self.exact = self._reference("reference", self.finer)
        elif options.dtype == self.finer:
            self.exact = self.replayed or self.free
        else:
            self.exact = self._candidate("exact_candidate", options.in_dtype(self.finer), self.engine)
        for dtype in dict.fromkeys(self.noisy):
            self.low[dtype] = self._low(dtype)

    def _replay(self) -> None:
        from ckptkit.verification.rollouts.replay import check_replayed, engine_run

        ranks, folder = self.passes.ranks, self.passes.folder / "engine.routing"

        def task() -> None:
            engine_run(self.rows, self.config, folder)

        ranks.once(task)
        self.engine = Run(self.tokens, folder / "none", routing=folder)
        self.replayed = self._candidate("replayed", self.options, self.engine)
        check_replayed(self.engine, self.replayed)

    def _low(self, dtype: str) -> Run:
        """A run whose rounding is part of the floor. With the engine's routing, no choice of experts is."""
        if self.reference is not None:
            return self._reference("low_reference", dtype, self.exact if self.engine is not None else None)
        if dtype == self.options.dtype:
            return self.replayed or self.free
        return self._candidate("low_candidate", self.options.in_dtype(dtype), self.engine)

    def _candidate(self, name: str, options: RunOptions, routed_as: Run | None = None) -> Run:
        return self.passes.run(self.candidate, self.tokens, name, options, routed_as=routed_as, scored=self.inverse)

    def _reference(self, name: str, dtype: str, routed_as: Run | None = None) -> Run:
        assert self.reference is not None
        plain = self.options.plain(dtype)
        return self.passes.run(self.reference, self.tokens, name, plain, routed_as=routed_as, scored=self.inverse)


def _noisy(engine: str, candidate: str) -> list[str]:
    """The types whose rounding parts the engine from the candidate: those of a coarse one drown those of a fine one."""
    both = [dtype for dtype in (engine, candidate) if dtype != "float64"]
    coarse = [dtype for dtype in both if dtype not in EXACT]
    return coarse or both or ["float32"]


class _Comparison:
    """What the runs show."""

    def __init__(
        self,
        runs: _Runs,
        rollouts: Rollouts,
        asked: RolloutOptions,
        options: RunOptions,
        decode: Callable[[list[int]], str] | None,
    ) -> None:
        import numpy as np

        self.runs, self.rollouts, self.asked, self.options, self.decode = runs, rollouts, asked, options, decode
        rows = rollouts.joined.rows
        self.places = [(n, at) for n, row in enumerate(rows) for at, p in enumerate(row.logprobs) if p is not None]
        self.engine = np.array([rows[n].logprobs[at] for n, at in self.places], np.float64)
        self.sequences = np.array([n for n, _ in self.places])
        self.judged = "replayed" if runs.replayed is not None else "candidate"

    def result(self) -> LevelResult:
        """The answer of the level."""
        import numpy as np

        scores = {"candidate": self._scores(self.runs.free)}
        if self.runs.replayed is not None:
            scores["replayed"] = self._scores(self.runs.replayed)
        exact = self._scores(self.runs.exact)
        if self.runs.reference is not None:
            scores = {"reference": exact, **scores}
        found = {name: self._at(part, self.runs.beta) for name, part in scores.items()}
        columns = {name: column(self.engine, values, self.sequences) for name, values in found.items()}
        floor = self._floor(self._at(exact, self.runs.beta))
        explanation = self._explain(scores[self.judged], found[self.judged], floor)
        checks = judge(columns[self.judged], floor, explanation, self.asked.max_kl)
        failed = [check.summary for check in checks if not check.passed]
        error = np.nan_to_num(np.abs(found[self.judged] - self.engine), nan=np.inf)
        report = self._report(columns, found, floor, explanation, error)
        summary = "; ".join(failed) if failed else "; ".join(check.summary for check in checks[1:3])
        return LevelResult("rollouts", not failed, summary, jsonable(asdict(report)), checks)

    def _report(
        self, columns: dict[str, Column], found: dict[str, Array], floor: Floor, explanation: Explanation, error: Array
    ) -> RolloutsReport:
        import numpy as np

        runs, joined = self.runs, self.rollouts.joined
        between = None
        if "reference" in found:
            between = float(np.abs(found[self.judged] - found["reference"]).mean())
        modules = {**runs.exact.modules, **runs.free.modules}
        ends = sorted(row.prompt for row in joined.rows)
        routing = None
        if runs.engine is not None:
            from ckptkit.verification.rollouts.replay import free_routing

            routing = free_routing(runs.engine, runs.free)
        return RolloutsReport(
            file=self.rollouts.path,
            shapes=self.rollouts.shapes,
            turns=joined.turns,
            joined=joined.joined,
            apart=joined.apart,
            rows=len(joined.rows),
            tokens=sum(len(row.tokens) for row in joined.rows),
            sampled=len(self.places),
            unrecorded=self.rollouts.unrecorded,
            device=self.options.device,
            dtype=self.options.dtype,
            engine_dtype=runs.engine_dtype,
            temperature=self.asked.temperature,
            fitted_temperature=explanation.temperature,
            fitted_mean=explanation.residual,
            scaled=explanation.scaled,
            renormalised=explanation.renormalised,
            kept=explanation.kept,
            floor=floor,
            mean_limit=MEAN_LIMIT,
            p99_limit=P99_LIMIT,
            max_kl=self.asked.max_kl,
            engine_perplexity=float(np.exp(-self.engine.mean())),
            columns=columns,
            judged=self.judged,
            prompt=self._prompt(),
            candidate_mean=between,
            routing=routing,
            curve=curve(error, [at for _, at in self.places]),
            window=runs.candidate.window,
            prompt_ends=[ends[0], ends[len(ends) // 2], ends[-1]],
            worst=self._worst(found, error),
            messages=self._messages(columns, floor, explanation, between, routing),
            megatron_modules={name: count for name, count in modules.items() if name.startswith("megatron.")},
            own_modules={name: count for name, count in modules.items() if not name.startswith("megatron.")},
            seconds={
                f"{name}.{phase}": seconds
                for name, run in (("candidate", runs.free), ("replayed", runs.replayed), ("exact", runs.exact))
                if run is not None
                for phase, seconds in run.seconds.items()
            },
        )

    def _scores(self, run: Run, places: Sequence[tuple[int, int]] | None = None) -> Array:
        """Scores of the positions before some tokens, float64 [tokens, ...]."""
        import numpy as np

        by_row: dict[int, list[int]] = {}
        for n, at in self.places if places is None else places:
            by_row.setdefault(n, []).append(at - 1)
        parts = []
        with row_logits(run) as rows:
            for n, positions in by_row.items():
                whole = rows[n][0 : len(run.rows[n])]
                parts.append(whole[positions].numpy())
        found: Array = np.concatenate(parts)
        return found

    def _at(self, scores: Array, beta: float) -> Array:
        return logprobs_at(scores, self.runs.inverse, beta)

    def _floor(self, exact: Array) -> Floor:
        import numpy as np

        errors = {
            dtype: np.abs(self._at(self._scores(run), self.runs.beta) - exact) for dtype, run in self.runs.low.items()
        }
        source = "candidate" if self.runs.reference is None else "reference"
        return floor_of(errors, self.runs.noisy, source)

    def _explain(self, scores: Array, values: Array, floor: Floor) -> Explanation:
        import numpy as np

        finite = np.isfinite(values)
        if not finite.any():
            return Explanation()
        fitted, at_fit = None, None
        if not self.asked.given:
            fitted = fit_temperature(scores[finite], self.runs.inverse, self.engine[finite])
            at_fit = self._at(scores[finite], min(max(1 / fitted, self.runs.inverse[0]), self.runs.inverse[-1]))
        return explain(self.engine[finite], values[finite], floor, fitted, at_fit)

    def _prompt(self) -> float | None:
        """Mean |difference| over tokens of prompts; engines give their log-probabilities unscaled."""
        import numpy as np

        rows = self.rollouts.joined.rows
        places = [
            (n, at) for n, row in enumerate(rows) for at, value in enumerate(row.prompt_logprobs) if value is not None
        ]
        if not places:
            return None
        given = np.array([rows[n].prompt_logprobs[at] for n, at in places], np.float64)
        run = self.runs.replayed or self.runs.free
        return float(np.abs(self._at(self._scores(run, places), 1.0) - given).mean())

    def _worst(self, found: dict[str, Array], error: Array) -> list[Worst]:
        import numpy as np

        rows, reference, listed = self.rollouts.joined.rows, found.get("reference"), []
        for index in np.argsort(-error, kind="stable")[:WORST]:
            n, at = self.places[index]
            tokens = rows[n].tokens
            context = tokens[max(0, at - CONTEXT) : at]
            listed.append(
                Worst(
                    row=n,
                    position=at,
                    line=rows[n].lines[-1],
                    token=tokens[at],
                    engine=float(self.engine[index]),
                    candidate=float(found[self.judged][index]),
                    reference=None if reference is None else float(reference[index]),
                    context=context,
                    text=None if self.decode is None else self.decode([*context, tokens[at]]),
                )
            )
        return listed

    def _messages(
        self,
        columns: dict[str, Column],
        floor: Floor,
        explanation: Explanation,
        between: float | None,
        routing: FreeRouting | None,
    ) -> list[str]:
        joined, judged = self.rollouts.joined, columns[self.judged]
        shapes = ", ".join(f"{count} by {name}" for name, count in self.rollouts.shapes.items())
        lines = [
            f"{joined.turns} turns ({shapes}) in {len(joined.rows)} rows: {joined.joined} continue another one,"
            f" {joined.apart} continue a prompt but not its answer and stay apart",
            f"KL {judged.k1:.2e} (k1), {judged.k2:.2e} (k2), {judged.k3:.2e} (k3) nats a token; ratios"
            f" {judged.ratio_min:.3g} to {judged.ratio_max:.3g}; effective sample size {100 * judged.effective:.1f} %",
            f"the floor is {floor.mean:.2e}, rounding in {' and '.join(dict.fromkeys(floor.dtypes))} as measured in the"
            f" {floor.source}{'; less was measured than the least floor' if floor.least else ''}",
        ]
        if explanation.temperature is not None and not (explanation.scaled or explanation.renormalised):
            lines.append(
                f"no --temperature: 1 was taken, {explanation.temperature:.4g} fits best (mean difference there"
                f" {explanation.residual:.2e})"
            )
        if routing is not None:
            free = columns["candidate"]
            lines.append(
                f"left to itself the candidate sends {100 * routing.tokens:.2f} % of the tokens to other experts in"
                f" some layer ({100 * routing.choices:.3f} % of the choices); then log-probabilities differ by"
                f" {free.mean:.2e} in the mean, {free.mean / floor.mean:.2f} times the floor"
            )
        if between is not None:
            lines.append(self._who(columns, floor, between))
        return lines

    def _who(self, columns: dict[str, Column], floor: Floor, between: float) -> str:
        """Which of engine, reference and candidate is the odd one out."""
        theirs, ours = (columns[name].mean / floor.mean for name in ("reference", self.judged))
        apart = between / floor.mean
        figures = f"engine and reference {theirs:.2f} floors, engine and candidate {ours:.2f}, the last two {apart:.2f}"
        if max(theirs, ours, apart) <= MEAN_LIMIT:
            return f"engine, reference and candidate agree: {figures}"
        if apart <= EXPLAINED * min(theirs, ours) or apart <= MEAN_LIMIT:
            return f"reference and candidate agree: the engine computed something else ({figures})"
        if theirs <= EXPLAINED * min(ours, apart) or theirs <= MEAN_LIMIT:
            return (
                f"engine and reference agree: the conversion, or how Megatron runs it, differs ({figures});"
                " --level logits names the layer"
            )
        if ours <= EXPLAINED * min(theirs, apart) or ours <= MEAN_LIMIT:
            return f"engine and candidate agree: the reference is another model ({figures})"
        return f"no two agree: {figures}"
