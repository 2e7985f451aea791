"""`verify --trainability`: a short real run that shows whether a checkpoint learns on its grid."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Unpack

from ckptkit.checkpoints.checkpoint import Checkpoint, check_grid
from ckptkit.checkpoints.source_options import SourceOptions
from ckptkit.errors import UnsupportedError, UsageError
from ckptkit.megatron import DDP
from ckptkit.megatron.run_config import RunConfig
from ckptkit.sharding.grid import Parallelism
from ckptkit.sharding.stages import split_layers
from ckptkit.steps import Step, Tell, nobody
from ckptkit.verification.levels import OWN_GRID, Asked, open_at
from ckptkit.verification.passes import check_how_it_ran
from ckptkit.verification.ranks.jobs import OPENER, LogitsJob, TrainabilityPart
from ckptkit.verification.ranks.pool import RankPool, Ranks, TorchrunRanks, inside_torchrun
from ckptkit.verification.reports.placement import describe
from ckptkit.verification.reports.report import (
    TRAINABILITY,
    LevelResult,
    VerificationReport,
    installed_versions,
    jsonable,
)
from ckptkit.verification.reports.results import CandidateRan
from ckptkit.verification.run_options import OPTIMIZERS, TOLERANCE, RunKeywords, RunOptions
from ckptkit.verification.sides import MEGATRON, Side, check_backwards, widest_window
from ckptkit.verification.trainability.goal import (
    ENDS,
    GROUP,
    KINDS,
    LONGEST,
    PROMPT,
    PROMPTS,
    RATE,
    SEEDS,
    SHARE,
    STEPS,
    TARGET,
)
from ckptkit.verification.trainability.judging import judge, union
from ckptkit.verification.training.names import matching


@dataclass(frozen=True)
class TrainabilityReport:
    """Details of the level trainability.

    Attributes:
        goal: What is learnt, `length`.
        seed: Of prompts and draws.
        target: Tokens that a completion is to have.
        longest: Tokens of a completion at most.
        ends: Of so many token ids one ends a completion.
        prompts: Prompts of a step.
        prompt_tokens: Tokens of a prompt.
        group: Completions of a prompt.
        steps_limit: Steps at most.
        rate: Learning rate of AdamW.
        train_only: Pattern of what is trained, or None for all.
        device: `cpu` or `cuda`.
        dtype: Type of weights and activations; of half ones float32 copies are stepped.
        recompute: Whether activations are computed again backwards.
        initial_error: Mean distance from the target before the first step, in tokens.
        target_error: The largest one that passes at the end.
        final_error: The one at the end, of the same prompts and draws; None if the run did not get there.
        errors: Mean distance of what each step sampled.
        lengths: Mean length of what each step sampled.
        varied: Share of the prompts of each step whose completions differ in their reward.
        losses: Loss of each step; it is no measure of what is learnt.
        sampled: Tokens that were sampled.
        silent: Tensors that never had a gradient, by Megatron's names.
        idle: Experts of that kind beside others of their layer that had one.
        still: Tensors that had a gradient and did not move.
        moved: Tensors that are not trained and moved.
        candidate_ran: How it ran.
        messages: What else to know, one line each.
        megatron_modules: As in `LogitsReport`.
        own_modules: As in `LogitsReport`.
        versions: Package -> version.
        seconds: Phase -> wall-clock seconds.
    """

    goal: str
    seed: int
    target: int
    longest: int
    ends: int
    prompts: int
    prompt_tokens: int
    group: int
    steps_limit: int
    rate: float
    train_only: str | None
    device: str
    dtype: str
    recompute: bool
    initial_error: float
    target_error: float
    final_error: float | None
    errors: list[float]
    lengths: list[float]
    varied: list[float]
    losses: list[float]
    sampled: int
    silent: list[str]
    idle: list[str]
    still: list[str]
    moved: list[str]
    candidate_ran: CandidateRan | None
    messages: list[str] = field(default_factory=list)
    megatron_modules: dict[str, int] = field(default_factory=dict)
    own_modules: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def verify_trainability(
    candidate: str | Path,
    kind: str = KINDS[0],
    *,
    seed: int = 0,
    prompts: int = PROMPTS,
    candidate_source: SourceOptions = SourceOptions(),  # noqa: B008  frozen
    tell: Tell = nobody,
    pool: Ranks | None = None,
    opener: str = OPENER,
    command: str | None = None,
    **run: Unpack[RunKeywords],
) -> VerificationReport:
    """Verifies that a checkpoint learns on its grid, by a short run of policy gradient.

    The model samples completions of pseudo-random prompts on its own ranks, is rewarded for those whose length is close
    to a target (see `goal`), and takes steps of AdamW along the gradient of megatron-core's own schedule, until what it
    samples has at most half of the initial error. Every tensor that is trained must have had a gradient and moved, and
    nothing else may move.

    Args:
        candidate: The checkpoint, of any format; one without a grid runs on one rank, or on `tp`, `pp` and `ep`.
        kind: What is learnt: `length`.
        seed: Of prompts and draws.
        prompts: Prompts of a step. Fewer take less time and are noisier.
        candidate_source: Facts about the checkpoint that it does not record itself.
        tell: Told which step runs.
        pool: Ranks to use instead of starting some.
        opener: The function that opens the checkpoint on its ranks, as `module:function`.
        command: The command line, for the report.
        run: How it runs, as for `verify`; `train_steps` is the limit of the steps.

    Raises:
        UsageError: The request makes no sense.
        InputError: The checkpoint is damaged.
        UnsupportedError: No family converts it, or it has no tokens to sample.
        VerificationError: The run could not be made; this says nothing about the checkpoint.
    """
    started = datetime.now(UTC).isoformat(timespec="seconds")
    options = RunOptions.of(**run)
    _check_request(kind, seed, prompts, options)
    with ExitStack() as stack:
        checkpoint, opening = open_at(stack, candidate, candidate_source, "cand")
        side = Side(checkpoint.path, MEGATRON, opening, _grid(checkpoint, options))
        grid, config = side.grid or checkpoint.grid, checkpoint.config
        how = options.config(grid, widest_window(config))
        if config.value_head:
            raise UnsupportedError(
                "a value model has no tokens to sample", where=side.path, hint="--level gradients looks at its training"
            )
        check_backwards(side, how, experts=bool(config.num_experts))
        check_grid(config, grid)
        split_layers(config.num_layers, grid)
        part = TrainabilityPart(
            steps=options.train_steps or STEPS,
            rate=RATE / config.hidden_size if options.lr is None else options.lr,
            seed=seed,
            prompts=prompts,
            trained=None if options.train_only is None else matching(checkpoint, options.train_only),
        )
        asked = Asked((TRAINABILITY,), keep_going=False)
        asked.ask(TRAINABILITY, lambda: _level(side, how, options, part, opener, pool, tell))
        return VerificationReport(
            reference=f"completions of {TARGET} tokens",
            candidate=str(candidate),
            levels=asked.answers,
            sides={"candidate": describe(checkpoint, side.grid)},
            command=command,
            started=started,
            versions=installed_versions(),
        )


def _check_request(kind: str, seed: int, prompts: int, options: RunOptions) -> None:
    if kind not in KINDS:
        raise UsageError(f"nothing is learnt called {kind!r}", hint=f"choose {', '.join(KINDS)}")
    if not 0 <= seed < SEEDS:
        raise UsageError(f"--seed must be 0 to {SEEDS - 1}, got {seed}")
    if prompts < 1:
        raise UsageError(f"prompts must be at least 1, got {prompts}")
    if options.optimizer != OPTIMIZERS[0]:
        raise UsageError(f"--trainability steps with {OPTIMIZERS[0]}, not with {options.optimizer}")
    if options.dp > 1 and options.dp_kind != DDP:
        raise UsageError(
            f"replicas that learn are megatron-core's DistributedDataParallel, not {options.dp_kind}",
            hint=f"--dp-kind {DDP}",
        )
    for option, given in (("--tolerance", options.tolerance != TOLERANCE), ("--no-replay", not options.replay)):
        if given:
            raise UsageError(f"{option} and --trainability exclude each other", hint="nothing is compared here")
    if options.save_logits is not None:
        raise UsageError("--save-logits and --trainability exclude each other", hint="no logits are kept of this run")
    options.check()


def _grid(checkpoint: Checkpoint, options: RunOptions) -> Parallelism | None:
    """The grid for a checkpoint without one; None for its own."""
    if checkpoint.format not in OWN_GRID:
        return options.grid or Parallelism()
    if options.grid is not None:
        raise UsageError(
            f"--tp, --pp and --ep are for a candidate without a grid of its own; this one is on {checkpoint.grid}",
            where=checkpoint.path,
            hint="drop them, or convert it to another grid first",
        )
    return None


def _level(
    side: Side, how: RunConfig, options: RunOptions, part: TrainabilityPart, opener: str, pool: Ranks | None, tell: Tell
) -> LevelResult:
    with ExitStack() as stack:
        ranks = pool or stack.enter_context(_own_ranks(how))
        folder = Path(ranks.once(lambda: tempfile.mkdtemp(prefix="ckptkit-verify-")))
        stack.callback(_remove, ranks, folder)
        job = LogitsJob(
            checkpoint=str(side.path),
            run=how,
            options=options,
            rows=[],
            output=str(folder / "none"),
            opener=opener,
            opening=side.opening,
            trainability=part,
        )

        def title(step: Step) -> None:
            tell(replace(step, what=f"candidate ({how.world_size} ranks, {how.dtype}): {step.what}"))

        answers = ranks.run(job, title)
    if answers[0]["losses"]:
        check_how_it_ran(job, [facts for answer in answers for facts in answer["seen"]])
    checks = judge(answers, options.train_only)
    failed = [check.summary for check in checks if not check.passed]
    summary = "; ".join(failed) if failed else checks[-1].summary
    details = jsonable(asdict(_report(answers, part, how, options)))
    return LevelResult(TRAINABILITY, not failed, summary, details, checks)


def _own_ranks(how: RunConfig) -> AbstractContextManager[Ranks]:
    return nullcontext(TorchrunRanks()) if inside_torchrun() else RankPool(how.world_size)


def _remove(ranks: Ranks, folder: Path) -> None:
    """Removes the files, after all ranks have finished."""
    ranks.wait_for_all()
    ranks.once(lambda: shutil.rmtree(folder, ignore_errors=True))


def _report(
    answers: Sequence[dict[str, Any]], part: TrainabilityPart, how: RunConfig, options: RunOptions
) -> TrainabilityReport:
    first = answers[0]
    modules: dict[str, int] = {}
    for answer in answers:
        for module, count in answer["modules"].items():
            modules[module] = modules.get(module, 0) + count
    devices = sorted({facts["device"] for answer in answers for facts in answer["seen"]})
    ran = CandidateRan(how.packed, how.sequence_parallel, how.cp, how.dp, how.dp_kind, devices)
    idle = union(answers, "idle")
    how_long = [
        f"{part.prompts} prompts and {GROUP} completions of each a step, seed {part.seed}, AdamW at {part.rate:.1e}",
        f"of {ENDS} token ids one ends a completion; without any it has {LONGEST} tokens",
    ]
    return TrainabilityReport(
        goal=KINDS[0],
        seed=part.seed,
        target=TARGET,
        longest=LONGEST,
        ends=ENDS,
        prompts=part.prompts,
        prompt_tokens=PROMPT,
        group=GROUP,
        steps_limit=part.steps,
        rate=part.rate,
        train_only=options.train_only,
        device=options.device,
        dtype=options.dtype,
        recompute=options.recompute,
        initial_error=first["initial_error"],
        target_error=SHARE * first["initial_error"],
        final_error=first["final_error"],
        errors=first["errors"],
        lengths=first["lengths"],
        varied=first["varied"],
        losses=first["losses"],
        sampled=first["sampled"],
        silent=union(answers, "silent"),
        idle=idle,
        still=union(answers, "still"),
        moved=union(answers, "moved"),
        candidate_ran=ran,
        messages=[
            str(ran),
            "; ".join(how_long),
            *([f"{len(idle)} experts' tensors had no gradient: no token that counts went there"] if idle else []),
        ],
        megatron_modules={name: count for name, count in modules.items() if name.startswith("megatron.")},
        own_modules={name: count for name, count in modules.items() if not name.startswith("megatron.")},
        versions=first["versions"],
        seconds=first["seconds"],
    )
