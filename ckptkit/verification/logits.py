"""The logits level: both sides run over the same tokens, and must say the same."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from ckptkit.errors import CkptkitError, InputError, UsageError, VerificationError
from ckptkit.sharding.grid import Parallelism
from ckptkit.verification.jobs import OPENER, LogitsJob, find
from ckptkit.verification.pool import RankPool, Ranks, TorchrunRanks, inside_torchrun
from ckptkit.verification.report import Agreement, Greedy, Location, LogitsReport, NoiseFloor
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


def verify_logits(
    reference: Side | tuple[str | Path, str],
    candidate: Side | tuple[str | Path, str],
    *,
    device: str = "cpu",
    dtype: str = "float32",
    tokens: Sequence[Sequence[int]] | str | Path | None = None,
    tolerance: float = TOLERANCE,
    greedy: int = GREEDY_STEPS,
    pool: Ranks | None = None,
    save_logits: str | Path | None = None,
    timeout: float = 600.0,
    opener: str = OPENER,
) -> LogitsReport:
    """Run two checkpoints over the same tokens and compare their logits at every position.

    The reference also continues every row greedily, and the candidate must pick the same tokens. fp32 passes if the
    largest error is at most `tolerance` times the largest |logit| and the greedy texts are equal. Below fp32 the
    candidate's error is measured in units of the reference's own error in that dtype (see `NoiseFloor`). After a
    failure both run again in fp32, on the tokens up to the first bad position, to find the layer where they part.

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
    if dtype not in DTYPES:
        raise UsageError(f"no logits in {dtype}", hint=f"choose {', '.join(DTYPES)}")
    if device not in ("cpu", "cuda"):
        raise UsageError(f"no device {device!r}", hint="choose cpu or cuda")
    if device == "cuda":
        _check_cuda()
    models = [_open(Side(*side), opener) for side in (reference, candidate)]
    if models[0].vocab_size != models[1].vocab_size:
        summary = f"the vocabularies differ: {models[0].vocab_size} and {models[1].vocab_size} tokens"
        return LogitsReport(False, summary, device, dtype, tolerance, [])
    rows = _rows(tokens, models[0].vocab_size)
    with ExitStack() as stack:
        ranks = pool or stack.enter_context(_own_ranks(models))
        folder = Path(ranks.once(lambda: tempfile.mkdtemp(prefix="ckptkit-verify-")))
        stack.callback(_remove, ranks, folder)
        check = _Check(models[0], models[1], device, dtype, tolerance, greedy, ranks, folder, timeout, opener)
        report = check.run(rows)
        if save_logits is not None:
            ranks.once(lambda: check.keep(Path(save_logits), [len(row) for row in rows]))
    return report


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
        return _Model(side, checkpoint.config.vocab_size, checkpoint.grid)
    if side.kind != "hf":
        raise UsageError(f"a side is 'hf' or 'megatron', not {side.kind!r}", where=side.path)
    try:
        raw = json.loads((Path(side.path) / "config.json").read_text())
        vocab_size = int((raw.get("text_config") or raw)["vocab_size"])
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"cannot read vocab_size from config.json ({error!r})", where=side.path) from None
    return _Model(side, vocab_size, Parallelism())


def _rows(tokens: Sequence[Sequence[int]] | str | Path | None, vocab_size: int) -> list[list[int]]:
    if tokens is None:
        return default_rows(vocab_size)
    rows = read_rows(tokens) if isinstance(tokens, str | Path) else [list(row) for row in tokens]
    check_rows(rows, vocab_size)
    return rows


def _own_ranks(models: list[_Model]) -> AbstractContextManager[Ranks]:
    """The processes that are there, or a pool for the larger grid, which starts when it is first used."""
    if inside_torchrun():
        return nullcontext(TorchrunRanks())
    return RankPool(max(model.grid.world_size for model in models))


@dataclass
class _Check:
    """One verification: the two models and how to run them."""

    reference: _Model
    candidate: _Model
    device: str
    dtype: str
    tolerance: float
    greedy: int
    ranks: Ranks
    folder: Path
    timeout: float
    opener: str
    runs: dict[str, Run] = field(default_factory=dict)

    def run(self, rows: list[list[int]]) -> LogitsReport:
        """Run both sides and judge."""
        exact = self._run(self.reference, rows, "reference", greedy=self.greedy)
        runs = {"reference": exact}
        if self.dtype != "float32":
            runs["low_reference"] = self._run(self.reference, exact.rows, "low_reference", dtype=self.dtype)
        found = runs["candidate"] = self._run(self.candidate, exact.rows, "candidate", dtype=self.dtype)
        self.runs.update(runs)
        return self._judge(exact, runs.get("low_reference"), found)

    def keep(self, target: Path, lengths: list[int]) -> None:
        """Write the logits of both sides over the tokens asked for to one file."""
        from ckptkit.verification.runs import keep_logits

        keep_logits(target, self.runs["reference"], self.runs["candidate"], lengths)

    def _judge(self, exact: Run, low: Run | None, found: Run) -> LogitsReport:
        from ckptkit.verification.comparison import compare, compare_greedy, noise_floor, noise_ratios

        agreement = compare(exact, found)
        greedy, parted = compare_greedy(exact, found, self.greedy, agreement.max_abs_logit)
        noise = None
        if low is None:
            passed = agreement.finite and agreement.relative_error <= self.tolerance and greedy.passed
            bad = _bad_positions(agreement.per_position, self.tolerance) + parted
        else:
            ratios = noise_ratios(exact, low, found)
            noise = noise_floor(ratios)
            passed = agreement.finite and noise.passed
            bad = _bad_positions(ratios, noise.p99_limit) or [agreement.worst]
        location, messages = (None, []) if passed else self._locate(exact, bad or [agreement.worst])
        modules = {**exact.modules, **found.modules}
        return LogitsReport(
            passed=passed,
            summary=_summary(passed, agreement, greedy, noise, self.tolerance, self.dtype),
            device=self.device,
            dtype=self.dtype,
            tolerance=self.tolerance,
            rows=exact.rows,
            agreement=agreement,
            greedy=greedy,
            noise=noise,
            location=location,
            messages=messages,
            megatron_modules={name: count for name, count in modules.items() if name.startswith("megatron.")},
            own_modules={name: count for name, count in modules.items() if not name.startswith("megatron.")},
            versions=found.versions,
            seconds={
                f"{side}.{phase}": seconds
                for side, run in (("reference", exact), ("candidate", found))
                for phase, seconds in run.seconds.items()
            },
        )

    def _locate(self, exact: Run, bad: list[tuple[int, int]]) -> tuple[Location | None, list[str]]:
        """Where the models part, seen from the earliest bad position, and what to tell about it."""
        from ckptkit.verification.location import locate

        row, position = min(bad, key=lambda place: (place[1], place[0]))
        messages = [f"first seen in row {row} at position {position}"]
        prefix = [exact.rows[row][: position + 1]]
        try:
            runs = [
                self._run(model, prefix, f"probe_{name}", probes=True)
                for name, model in (("reference", self.reference), ("candidate", self.candidate))
            ]
        except CkptkitError as error:
            return None, [*messages, f"the layer could not be found: {error}"]
        location = locate(*runs)
        if location is None:
            return None, [*messages, f"in float32 the models agree there: the difference arises only in {self.dtype}"]
        return location, [*messages, str(location)]

    def _run(
        self,
        model: _Model,
        rows: list[list[int]],
        name: str,
        *,
        dtype: str = "float32",
        greedy: int = 0,
        probes: bool = False,
    ) -> Run:
        """Run one side over rows; its files are called `name`."""
        output, states = self.folder / f"{name}.safetensors", self.folder / name if probes else None
        runner = self._run_hf if model.side.kind == "hf" else self._run_megatron
        return runner(model, rows, output, states, dtype, greedy)

    def _run_hf(
        self, model: _Model, rows: list[list[int]], output: Path, probes: Path | None, dtype: str, greedy: int
    ) -> Run:
        from ckptkit.verification.reference import run_reference

        def task() -> dict[str, Any]:
            run = run_reference(
                model.side.path, rows, dtype=dtype, device=self.device, output=output, greedy=greedy, probes=probes
            )
            return {key: value for key, value in asdict(run).items() if key not in ("logits", "probes")}

        return Run(logits=output, probes=probes, **self.ranks.once(task))

    def _run_megatron(
        self, model: _Model, rows: list[list[int]], output: Path, probes: Path | None, dtype: str, greedy: int
    ) -> Run:
        job = LogitsJob(
            checkpoint=str(model.side.path),
            grid=model.grid,
            device=self.device,
            dtype=dtype,
            rows=rows,
            output=str(output),
            greedy=greedy,
            probes=None if probes is None else str(probes),
            timeout=self.timeout,
            opener=self.opener,
        )
        answers = self.ranks.run(job)
        run = Run(logits=output, probes=probes, **answers[0])
        for answer in answers[1:]:
            run.feeds.update(answer["feeds"])
            for module, count in answer["modules"].items():
                run.modules[module] = run.modules.get(module, 0) + count
        return replace(run, rows=answers[-1]["rows"])


def _bad_positions(errors: list[list[float]], limit: float) -> list[tuple[int, int]]:
    return [(row, at) for row, line in enumerate(errors) for at, error in enumerate(line) if not error <= limit]


def _summary(
    passed: bool, agreement: Agreement, greedy: Greedy, noise: NoiseFloor | None, tolerance: float, dtype: str
) -> str:
    if not agreement.finite:
        sides = ", ".join(f"{count} of the {side}" for side, count in agreement.non_finite.items() if count)
        return f"logits are not finite: {sides}"
    parts = []
    if noise is None:
        parts.append(f"largest error {agreement.relative_error:.1e} of the largest |logit| (tolerance {tolerance:.0e})")
    else:
        parts.append(
            f"{dtype} error {noise.median:.2f} (median) and {noise.p99:.2f} (p99) times the reference's own"
            f" (limits {noise.median_limit:g} and {noise.p99_limit:g})"
        )
    parts.append(f"top-1 agreement {100 * agreement.top1_agreement:.1f} %")
    same = greedy.equal + greedy.ties
    parts.append(f"greedy tokens {same} of {greedy.steps} equal")
    return ", ".join(parts)
