"""The logits level: both sides run over the same tokens, and must say the same."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from ckptkit.errors import CkptkitError, UsageError, VerificationError
from ckptkit.families import family_of
from ckptkit.formats.json_files import read_json
from ckptkit.megatron import DDP, DP_KINDS
from ckptkit.sharding.grid import Parallelism
from ckptkit.tables.model_config import ModelConfig
from ckptkit.verification.ranks.jobs import OPENER, TIMEOUT, LogitsJob, find
from ckptkit.verification.ranks.pool import RankPool, Ranks, TorchrunRanks, inside_torchrun
from ckptkit.verification.ranks.what_ran import check_ran
from ckptkit.verification.reports.report import LogitsReport
from ckptkit.verification.reports.results import (
    Agreement,
    CandidateRan,
    Check,
    Greedy,
    Location,
    NoiseFloor,
    RoutingReport,
    StateError,
)
from ckptkit.verification.runs import Run
from ckptkit.verification.tokens import check_rows, default_rows, read_rows

TOLERANCE = 1e-4
GREEDY_STEPS = 8
DTYPES = ("float32", "bfloat16", "float16")


class Side(NamedTuple):
    """One of the two models.

    Attributes:
        path: The checkpoint.
        kind: `hf` (transformers runs it) or `megatron` (megatron-core does, on the checkpoint's own grid).
    """

    path: str | Path
    kind: str


@dataclass(frozen=True)
class _Model:
    """A side, opened: what is needed to run it."""

    side: Side
    vocab_size: int
    grid: Parallelism
    value_head: bool
    window: int
    """The widest sliding window of a layer, 0 without one."""


def verify_logits(
    reference: Side | tuple[str | Path, str],
    candidate: Side | tuple[str | Path, str],
    *,
    device: str = "cpu",
    dtype: str = "float32",
    tokens: Sequence[Sequence[int]] | str | Path | None = None,
    tolerance: float = TOLERANCE,
    greedy: int = GREEDY_STEPS,
    replay: bool = True,
    packed: bool = False,
    sequence_parallel: bool = False,
    dp: int = 1,
    dp_kind: str = DDP,
    pool: Ranks | None = None,
    save_logits: str | Path | None = None,
    timeout: float = TIMEOUT,
    opener: str = OPENER,
) -> LogitsReport:
    """Run two checkpoints over the same tokens and compare their logits at every position.

    The reference also continues every row greedily, and the candidate must pick the same tokens. fp32 passes if the
    largest error is at most `tolerance` times the largest |logit| and the greedy texts are equal. Below fp32 the
    candidate's error is measured in units of the reference's own error in that dtype (see `NoiseFloor`). Routers are
    judged by themselves (see `routing.judge_routing`). After a failure both run again in fp32, on the tokens up to the
    first bad position, to find the layer where they part.

    The sides run one after the other. Inside torchrun every process calls this and is its own rank; all must share the
    directory for temporary files.

    Args:
        reference: The side that is trusted.
        candidate: The side in question.
        device: `cpu` or `cuda`.
        dtype: `float32`, `bfloat16` or `float16`.
        tokens: Token ids, or a JSON file with a list of lists; pseudo-random ones if None.
        tolerance: Largest relative error that passes in fp32.
        greedy: Tokens of the greedy continuation.
        replay: With experts: send the candidate's tokens where the reference's went, and judge the routers apart.
        packed: Take the candidate's logits from rows packed together, without padding between them.
        sequence_parallel: Split the candidate's sequence over its tensor parallel ranks outside of the linears.
        dp: Replicas of the candidate's grid; all must compute the same.
        dp_kind: What makes them replicas: `ddp`, megatron-core's DistributedDataParallel, or `fsdp2`.
        pool: Ranks to use; None starts as many as needed.
        save_logits: File to write both sides' logits to; see `runs.keep_logits`.
        timeout: Seconds that a run of a Megatron side may take.
        opener: What opens a Megatron checkpoint, as `module:function`; ranks import it.

    Raises:
        UsageError: The request makes no sense.
        InputError: A checkpoint or the tokens are damaged.
        UnsupportedError: A library has no such model.
        VerificationError: A run could not be made; that says nothing about the checkpoints.
    """
    check_device(device, dtype)
    models = [_open(Side(*side), opener) for side in (reference, candidate)]
    check_how(models[1].side, models[1].grid, packed, sequence_parallel, dp, dp_kind)
    if models[0].vocab_size != models[1].vocab_size:
        summary = f"the vocabularies differ: {models[0].vocab_size} and {models[1].vocab_size} tokens"
        checks = [Check("vocabulary", False, summary)]
        return LogitsReport(False, summary, device, dtype, tolerance, [], checks=checks)
    rows = _rows(tokens, models[0].vocab_size)
    with ExitStack() as stack:
        ranks = pool or stack.enter_context(_own_ranks(models, dp))
        folder = Path(ranks.once(lambda: tempfile.mkdtemp(prefix="ckptkit-verify-")))
        stack.callback(_remove, ranks, folder)
        how = {"packed": packed, "sequence_parallel": sequence_parallel, "replicas": dp, "replication": dp_kind}
        greedy = 0 if any(model.value_head for model in models) else greedy
        check = _Check(
            models[0], models[1], device, dtype, tolerance, greedy, replay, ranks, folder, timeout, opener, how
        )
        report = check.run(rows)
        if save_logits is not None:
            ranks.once(lambda: check.keep(Path(save_logits), [len(row) for row in rows]))
    return report


def check_device(device: str, dtype: str) -> None:
    """Whether there is something to run on.

    Raises:
        UsageError: There is no such device or dtype.
        VerificationError: There is no CUDA device here.
    """
    if dtype not in DTYPES:
        raise UsageError(f"no logits in {dtype}", hint=f"choose {', '.join(DTYPES)}")
    if device not in ("cpu", "cuda"):
        raise UsageError(f"no device {device!r}", hint="choose cpu or cuda")
    if device == "cuda":
        _check_cuda()


def check_how(candidate: Side, grid: Parallelism, packed: bool, sequence_parallel: bool, dp: int, dp_kind: str) -> None:
    """Whether the candidate can run as asked.

    Raises:
        UsageError: It cannot.
    """
    if dp < 1:
        raise UsageError(f"--dp must be at least 1, got {dp}")
    if dp_kind not in DP_KINDS:
        raise UsageError(f"no data parallelism by {dp_kind!r}", hint=f"choose {' or '.join(DP_KINDS)}")
    if candidate.kind == "hf" and (packed or sequence_parallel or dp > 1):
        raise UsageError(
            "packed rows, sequence parallelism and replicas are of a candidate that megatron-core runs",
            where=candidate.path,
            hint="convert it with --to torch or --to packed first",
        )
    if sequence_parallel and grid.tp == 1:
        raise UsageError("--sequence-parallel needs a candidate at TP 2 or more", where=candidate.path)


def _check_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise VerificationError("no CUDA device is available", hint="run on cpu")


def _remove(ranks: Ranks, folder: Path) -> None:
    """Remove the files once nobody reads them any more."""
    ranks.wait_for_all()
    ranks.once(lambda: shutil.rmtree(folder, ignore_errors=True))


def _open(side: Side, opener: str) -> _Model:
    if side.kind == "megatron":
        checkpoint = find(opener)(str(side.path))
        return _model(side, checkpoint.config, checkpoint.grid)
    if side.kind != "hf":
        raise UsageError(f"a side is 'hf' or 'megatron', not {side.kind!r}", where=side.path)
    from ckptkit.verification.reference import architecture_of

    architecture_of(Path(side.path))
    raw = read_json(Path(side.path) / "config.json")
    config = family_of(raw, side.path).parse(raw)  # it knows what a config.json may leave out
    return _model(side, config, Parallelism())


def _model(side: Side, config: ModelConfig, grid: Parallelism) -> _Model:
    return _Model(
        side, config.vocab_size, grid, config.value_head, max((layer.window or 0 for layer in config.layers), default=0)
    )


def _rows(tokens: Sequence[Sequence[int]] | str | Path | None, vocab_size: int) -> list[list[int]]:
    if tokens is None:
        return default_rows(vocab_size)
    rows = read_rows(tokens) if isinstance(tokens, str | Path) else [list(row) for row in tokens]
    check_rows(rows, vocab_size)
    return rows


def _own_ranks(models: list[_Model], replicas: int) -> AbstractContextManager[Ranks]:
    """The processes that are there, or a pool for the larger grid, which starts while transformers runs its side."""
    if inside_torchrun():
        return nullcontext(TorchrunRanks())
    pool = RankPool(max(model.grid.world_size for model in models) * replicas)
    if any(model.side.kind == "megatron" for model in models):
        pool.begin()
    return pool


@dataclass
class _Check:
    """One verification: the two models and how to run them."""

    reference: _Model
    candidate: _Model
    device: str
    dtype: str
    tolerance: float
    greedy: int
    replay: bool
    ranks: Ranks
    folder: Path
    timeout: float
    opener: str
    how: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)

    def run(self, rows: list[list[int]]) -> LogitsReport:
        """Run both sides and judge."""
        exact = self._run(self.reference, rows, "reference", greedy=self.greedy)
        runs = {"reference": exact}
        if self.dtype != "float32":
            low = self._run(self.reference, exact.rows, "low_reference", dtype=self.dtype, routed_as=exact, twice=True)
            runs["low_reference"] = low
        found = self._run(self.candidate, exact.rows, "candidate", dtype=self.dtype, routed_as=exact)
        runs["candidate"] = found
        self.runs.update(runs)
        return self._judge(exact, runs.get("low_reference"), found)

    def keep(self, target: Path, lengths: list[int]) -> None:
        """Write the logits of both sides over the tokens asked for to one file."""
        from ckptkit.verification.runs import keep_logits

        keep_logits(target, self.runs["reference"], self.runs["candidate"], lengths)

    def _judge(self, exact: Run, low: Run | None, found: Run) -> LogitsReport:
        from ckptkit.verification.comparison import compare, compare_greedy, noise_floor
        from ckptkit.verification.error_growth import error_curve
        from ckptkit.verification.routing import judge_routing

        agreement = compare(exact, found)
        greedy, parted = compare_greedy(exact, found, self.greedy, agreement.max_abs_logit)
        noise = None
        if low is None:
            bad = _bad_positions(agreement.per_position, self.tolerance) + parted
        else:
            noise, ratios = noise_floor(exact, low, found)
            bad = _bad_positions(ratios, noise.p99_limit)
        routing = judge_routing(exact, low, found, self.tolerance) if self.replay else None
        curve = error_curve(exact, low, found)
        checks = _checks(agreement, greedy, noise, routing, self.tolerance, self.dtype)
        if agreement.constant:
            checks.append(self._final_norm(curve))
        passed = all(check.passed for check in checks)
        ran, notes = self._ran(found), self._notes(exact)
        if ran is not None and (ran.packed or ran.sequence_parallel or ran.replicas > 1):
            notes.append(str(ran))
        location, messages = (None, []) if passed else self._locate(exact, bad or [agreement.worst], curve)
        modules = {**exact.modules, **found.modules}
        return LogitsReport(
            passed=passed,
            summary=_summary(checks, agreement, greedy),
            device=self.device,
            dtype=self.dtype,
            tolerance=self.tolerance,
            rows=exact.rows,
            agreement=agreement,
            greedy=greedy,
            noise=noise,
            routing=routing,
            hidden_states=curve,
            checks=checks,
            location=location,
            messages=[*notes, *messages],
            megatron_modules={name: count for name, count in modules.items() if name.startswith("megatron.")},
            own_modules={name: count for name, count in modules.items() if not name.startswith("megatron.")},
            versions=found.versions,
            candidate_ran=ran,
            seconds={
                f"{side}.{phase}": seconds
                for side, run in (("reference", exact), ("candidate", found))
                for phase, seconds in run.seconds.items()
            },
        )

    def _notes(self, exact: Run) -> list[str]:
        """What the tokens could not show."""
        window, longest = self.reference.window, max(map(len, exact.rows))
        if window < longest:
            return []
        text = f"no row is longer than the sliding window of {window} tokens, so nothing was hidden by it"
        return [f"{text} (--tokens FILE with longer rows)"]

    def _ran(self, found: Run) -> CandidateRan | None:
        """How the candidate ran, for the report; `check_ran` has seen to it that this is how."""
        if not found.seen:
            return None
        how, devices = self.how, sorted({facts["device"] for facts in found.seen})
        replication = how["replication"] if how["replicas"] > 1 else None
        return CandidateRan(how["packed"], how["sequence_parallel"], how["replicas"], replication, devices)

    def _final_norm(self, curve: list[StateError]) -> Check:
        """What the head is fed, for a head that makes the same of everything."""
        from ckptkit.verification.comparison import MEDIAN_LIMIT

        if self.how["packed"]:
            raise VerificationError(
                "all logits of the reference are one number, which cannot tell packed rows apart",
                where=self.reference.side.path,
                hint="verify without --packed, or with another head (convert --head-init normal)",
            )
        (state,) = (state for state in curve if state.place == "final norm")
        limit = self.tolerance if state.noise is None else MEDIAN_LIMIT * state.noise
        text = f"all logits of the reference are one number; what the head is fed is off by {state.rms_error:.1e}"
        return Check("final norm", state.rms_error <= limit, f"{text} (limit {limit:.1e})")

    def _locate(
        self, exact: Run, bad: list[tuple[int, int]], curve: list[StateError]
    ) -> tuple[Location | None, list[str]]:
        """Where the models part, seen from the earliest bad position, and what to tell about it."""
        from ckptkit.verification.error_growth import first_excess
        from ckptkit.verification.location import locate

        row, position = min(bad, key=lambda place: (place[1], place[0]))
        messages = [f"first seen in row {row} at position {position}"]
        prefix = [exact.rows[row][: position + 1]]
        try:
            theirs = self._run(self.reference, prefix, "probe_reference", whole_layers=False)
            ours = self._run(self.candidate, prefix, "probe_candidate", whole_layers=False, routed_as=theirs)
        except CkptkitError as error:
            return None, [*messages, f"the layer could not be found: {error}"]
        location = locate(theirs, ours)
        if location is not None:
            return location, [*messages, str(location)]
        if self.how["packed"]:
            return None, [*messages, "that row alone, the models agree: the difference arises only beside other rows"]
        if self.dtype == "float32":
            return None, [*messages, "no hidden state of that row differs by more than the noise"]
        messages.append(f"in float32 the models agree there: the difference arises only in {self.dtype}")
        excess = first_excess(curve)
        if excess is not None and excess.noise:
            times = excess.rms_error / excess.noise
            messages.append(f"it is first seen at {excess.place}: {times:.1f} times the reference's own error")
        return None, messages

    def _run(
        self,
        model: _Model,
        rows: list[list[int]],
        name: str,
        *,
        dtype: str = "float32",
        greedy: int = 0,
        whole_layers: bool = True,
        routed_as: Run | None = None,
        twice: bool = False,
    ) -> Run:
        """Run one side over rows; its files are called `name`.

        Args:
            model: The side.
            rows: Token ids.
            name: Of its files.
            dtype: What to run in.
            greedy: Tokens to append to every row.
            whole_layers: Keep hidden states between layers only, not within them.
            routed_as: A run whose experts the tokens are sent to, where routing is replayed.
            twice: Run again with another implementation of attention, where there is one.
        """
        job = LogitsJob(
            checkpoint=str(model.side.path),
            grid=model.grid,
            device=self.device,
            dtype=dtype,
            rows=rows,
            output=str(self.folder / f"{name}.safetensors"),
            greedy=greedy,
            again=str(self.folder / f"{name}.again.safetensors") if twice and model.side.kind == "hf" else None,
            probes=str(self.folder / name),
            whole_layers=whole_layers,
            routing=str(self.folder / f"{name}.routers") if self.replay else None,
            replay=str(routed_as.routing) if routed_as is not None and routed_as.routing is not None else None,
            timeout=self.timeout,
            opener=self.opener,
            **(self.how if model is self.candidate else {}),
        )
        return self._run_hf(job) if model.side.kind == "hf" else self._run_megatron(job)

    def _run_hf(self, job: LogitsJob) -> Run:
        from ckptkit.verification.reference import run_reference

        def task() -> dict[str, Any]:
            return {key: value for key, value in asdict(run_reference(job)).items() if key not in job.files}

        run = Run(**job.files, **self.ranks.once(task))
        # Not every model has a second implementation of attention.
        return run if run.again is None or run.again.is_file() else replace(run, again=None)

    def _run_megatron(self, job: LogitsJob) -> Run:
        answers = self.ranks.run(job)
        run = Run(**job.files, **answers[0])
        for answer in answers[1:]:
            run.seen.extend(answer["seen"])
            run.feeds.update(answer["feeds"])
            for module, count in answer["modules"].items():
                run.modules[module] = run.modules.get(module, 0) + count
        asked = {"packed": job.packed, "sequence_parallel": job.sequence_parallel}
        check_ran({**asked, "replication": job.replication if job.replicas > 1 else None}, run.seen)
        return replace(run, rows=answers[-1]["rows"])


def _bad_positions(errors: list[list[float]], limit: float) -> list[tuple[int, int]]:
    return [(row, at) for row, line in enumerate(errors) for at, error in enumerate(line) if not error <= limit]


def _checks(
    agreement: Agreement,
    greedy: Greedy,
    noise: NoiseFloor | None,
    routing: RoutingReport | None,
    tolerance: float,
    dtype: str,
) -> list[Check]:
    """Every question of the level with its answer, the same ones for one dtype and model whatever the answers are."""
    sides = ", ".join(f"{count} of the {side}" for side, count in agreement.non_finite.items() if count)
    checks = [
        Check("finite", agreement.finite, f"logits are not finite: {sides}" if sides else "all logits are finite")
    ]
    if noise is None:
        text = f"largest error {agreement.relative_error:.1e} of the largest |logit| (tolerance {tolerance:.0e})"
        checks.append(Check("error", agreement.relative_error <= tolerance, text))
        if greedy.steps:
            checks.append(Check("greedy", greedy.passed, _equal(greedy)))
    else:
        text = (
            f"{dtype} error {noise.median:.2f} (median) and {noise.p99:.2f} (p99) times the reference's own"
            f" (limits {noise.median_limit:g} and {noise.p99_limit:g})"
        )
        if noise.repeat_median is not None:
            text += f"; a second run of the reference {noise.repeat_median:.2f} and {noise.repeat_p99:.2f}"
            text += ", which is too far off to count" if noise.samples == 1 else ""
        checks.append(Check("noise floor", noise.passed, text))
    return checks + (routing.checks() if routing is not None else [])


def _summary(checks: list[Check], agreement: Agreement, greedy: Greedy) -> str:
    """One line: what is not finite, or all figures."""
    if not checks[0].passed:
        return checks[0].summary
    texts = {check.name: check.summary for check in checks[1:] if check.name != "greedy"}
    if "router logits" in texts:
        texts["router logits"] = f"router logits {texts['router logits']}"
    error, *others = texts.values()
    if not greedy.steps:
        return ", ".join((error, *others))
    return ", ".join((error, f"top-1 agreement {100 * agreement.top1_agreement:.1f} %", _equal(greedy), *others))


def _equal(greedy: Greedy) -> str:
    return f"greedy tokens {greedy.equal + greedy.ties} of {greedy.steps} equal"
