"""The levels of `verify`, cheapest question first; the first no ends it."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, Unpack

from ckptkit.checkpoints.checkpoint import Checkpoint, check_grid
from ckptkit.checkpoints.opening import open_checkpoint
from ckptkit.checkpoints.source_options import SourceOptions, options_called
from ckptkit.errors import CkptkitError, UnsupportedError, UsageError
from ckptkit.formats.hub import locate
from ckptkit.inspection.hashing import hash_checkpoint
from ckptkit.io.threads import Progress
from ckptkit.sharding.grid import Parallelism
from ckptkit.sharding.stages import split_layers
from ckptkit.steps import Step, Tell, nobody
from ckptkit.tables.model_config import ModelConfig
from ckptkit.verification.logits import verify_logits
from ckptkit.verification.ranks.pool import Ranks, TorchrunRanks, inside_torchrun
from ckptkit.verification.reports.placement import describe
from ckptkit.verification.reports.report import LevelResult, VerificationReport, installed_versions
from ckptkit.verification.reports.results import Check
from ckptkit.verification.rounding import rounding_of
from ckptkit.verification.run_options import BACKWARD, LEVELS, STEPS, RunKeywords, RunOptions
from ckptkit.verification.sides import HF, MEGATRON, Side, check_backwards, check_candidate, widest_window
from ckptkit.verification.training.level import verify_gradients, verify_training
from ckptkit.verification.weights import check_structure, check_weights

T = TypeVar("T")

OWN_GRID = ("torch", "torch_dist")
"""Formats that say which grid they are for."""


def verify(
    reference: str | Path,
    candidate: str | Path,
    *,
    level: str = "logits",
    prompts: Sequence[str] | None = None,
    tokens: Sequence[Sequence[int]] | None = None,
    keep_going: bool = False,
    reference_source: SourceOptions = SourceOptions(),  # noqa: B008  frozen
    candidate_source: SourceOptions = SourceOptions(),  # noqa: B008  frozen
    progress: Callable[[int, int], None] | None = None,
    tell: Tell = nobody,
    pool: Ranks | None = None,
    command: str | None = None,
    hash: bool = False,
    **run: Unpack[RunKeywords],
) -> VerificationReport:
    """Verifies a checkpoint against another one; any formats, any grids.

    A Hugging Face side is run by transformers, a Megatron side by megatron-core on its own grid, built from what that
    checkpoint stores. Where the candidate stores weights in a narrower type, the reference's are rounded to it.

    Args:
        reference: The checkpoint that is trusted.
        candidate: The checkpoint in question.
        level: The last question to ask: `structure`, `weights`, `logits`, `gradients` or `training`; `train_steps` asks
            for the last one, too.
        prompts: Texts to compare on; a side must have a tokenizer.
        tokens: Token ids to compare on; pseudo-random ones where neither is given.
        keep_going: Run the remaining levels even after one has found a difference.
        reference_source: Facts about the reference that it does not record itself.
        candidate_source: Facts about the candidate that it does not record itself.
        progress: Called with (bytes compared, bytes in all) at the weights level.
        tell: Told what runs at the logits level, and how far it is.
        pool: Ranks to use instead of starting some.
        command: The command line, for the report.
        hash: Also give the SHA-256 of both sides' tensors, for which both are read once more.
        run: How the sides run at the level logits, the fields of `RunOptions`: device, dtype, tolerance, replay,
            packed, sequence_parallel, cp, dp, dp_kind, save_logits, timeout; tp, pp and ep for a candidate that has no
            grid of its own, which megatron-core then runs.

    Raises:
        UsageError: The request makes no sense.
        InputError: A side is damaged or incomplete.
        UnsupportedError: No family converts a side.
        VerificationError: A run could not be made; this says nothing about the checkpoints.
    """
    options, level, run = asked_for(level, run)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    with ExitStack() as stack:
        opened = (
            open_at(stack, reference, reference_source, "ref"),
            open_at(stack, candidate, candidate_source, "cand"),
        )
    checkpoints = opened[0][0], opened[1][0]
    sides = sides_of(checkpoints, (opened[0][1], opened[1][1]), options)
    if level in LEVELS[2:]:  # what cannot run is said before every byte is compared
        check_run(level, sides[1], sides[1].grid or checkpoints[1].grid, checkpoints[1].config, options)
    else:
        refuse_unused(level, options, prompts, tokens)
    asked = Asked(LEVELS[: LEVELS.index(level) + 1], keep_going)
    asked.ask("structure", lambda: check_structure(*checkpoints))
    diff = _diff_command(reference, candidate, reference_source, candidate_source)
    asked.ask("weights", lambda: in_one_process(lambda: check_weights(*checkpoints, progress, diff, sides[1].grid)))
    hashes = _once(lambda: [_hash(*side, progress) for side in opened]) if hash else [None, None]
    asked.ask("logits", lambda: logits_level(checkpoints, sides, prompts, tokens, pool, tell, run))
    ask_backwards(asked, checkpoints, sides, prompts, tokens, pool, tell, run)
    return VerificationReport(
        reference=str(reference),
        candidate=str(candidate),
        levels=asked.answers,
        messages=[
            *(_messages(sides) if level in LEVELS[2:] else []),
            *_prediction(checkpoints),
            *asked.messages,
        ],
        sides={
            name: describe(checkpoint, side.grid, sha256)
            for name, checkpoint, side, sha256 in zip(
                ("reference", "candidate"), checkpoints, sides, hashes, strict=True
            )
        },
        not_run=asked.not_run,
        command=command,
        started=started,
        versions=installed_versions(),
    )


def asked_for(level: str, run: RunKeywords) -> tuple[RunOptions, str, RunKeywords]:
    """How the sides run, the last level, and the keywords of the former. Steps of training ask for the last level.

    Raises:
        UsageError: There is no such level.
    """
    if level not in LEVELS:
        raise UsageError(f"no level {level!r}", hint=f"choose {', '.join(LEVELS)}")
    options = RunOptions.of(**run)
    if options.train_steps and level in ("logits", "gradients"):
        level = "training"
    if level == "training" and not options.train_steps:
        run = {**run, "train_steps": STEPS}
    return RunOptions.of(**run), level, run


def check_run(level: str, candidate: Side, grid: Parallelism, config: ModelConfig, options: RunOptions) -> None:
    """Whether a level can run.

    Args:
        level: The last level.
        candidate: The candidate.
        grid: The grid that it runs on.
        config: Its model.
        options: How it runs.

    Raises:
        CkptkitError: It cannot.
    """
    options.check()
    refuse_unused_backwards(level, options)
    how = options.config(grid, widest_window(config))
    check_candidate(candidate, how)
    if level in BACKWARD:
        check_backwards(candidate, how, experts=bool(config.num_experts), value=config.value_head)
    if candidate.grid is not None:
        check_grid(config, grid)
        split_layers(config.num_layers, grid)


class Asked:
    """Levels in order, until one shows a difference.

    Attributes:
        answers: The answers.
        messages: Why a level has none although it was asked for.
    """

    def __init__(self, names: Sequence[str], keep_going: bool) -> None:
        self._names, self._keep_going = names, keep_going
        self.answers: list[LevelResult] = []
        self.messages: list[str] = []

    @property
    def not_run(self) -> list[str]:
        """Levels without an answer."""
        return [name for name in self._names if name not in {answer.name for answer in self.answers}]

    def ask(self, name: str, question: Callable[[], LevelResult]) -> None:
        """Asks a level, if it is wanted.

        Raises:
            CkptkitError: It has no answer, and no earlier level has shown a difference that would be lost with it.
        """
        differs = not all(answer.passed for answer in self.answers)
        if name not in self._names or (differs and not self._keep_going):
            return
        start = time.monotonic()
        try:
            answer = question()
        except CkptkitError as error:
            if not differs:
                raise
            self.messages.append(f"the level {name} has no answer: {error}")
        else:
            self.answers.append(replace(answer, seconds=time.monotonic() - start))


def open_at(stack: ExitStack, path: str | Path, source: SourceOptions, prefix: str) -> tuple[Checkpoint, SourceOptions]:
    """A side, and the options that open it at its own path: that of the iteration, with a reference on this disk."""
    found = stack.enter_context(locate(path)).path
    if source.hf_reference is not None:
        source = replace(source, hf_reference=str(stack.enter_context(locate(source.hf_reference)).path))
    with options_called(prefix):
        checkpoint = open_checkpoint(found, **source.keywords())
    if checkpoint.lora is not None:
        hint = "`verify MODEL ADAPTER --adapter A` runs it in its model; `ckptkit diff` compares adapters"
        raise UnsupportedError("an adapter is no model that runs", where=path, hint=hint)
    return checkpoint, replace(source, iteration=None)


def sides_of(
    checkpoints: tuple[Checkpoint, Checkpoint], opening: tuple[SourceOptions, SourceOptions], options: RunOptions
) -> tuple[Side, Side]:
    """What runs the two.

    Raises:
        UsageError: A grid is given for a candidate that has one.
    """
    reference, candidate = checkpoints
    grid = options.grid
    if grid is not None and candidate.format in OWN_GRID:
        raise UsageError(
            f"--tp, --pp and --ep are for a candidate without a grid of its own; this one is on {candidate.grid}",
            where=candidate.path,
            hint="drop them, or convert it to another grid first",
        )
    kinds = [HF if checkpoint.format == HF else MEGATRON for checkpoint in checkpoints]
    rounding = rounding_of(reference, candidate, hf_names=kinds[0] == HF)
    return (
        Side(reference.path, kinds[0], opening[0], rounding=rounding),
        Side(candidate.path, MEGATRON if grid is not None else kinds[1], opening[1], grid),
    )


def _diff_command(
    reference: str | Path, candidate: str | Path, reference_source: SourceOptions, candidate_source: SourceOptions
) -> str:
    """The command that lists every difference between the two."""
    words = [*reference_source.words("a"), *candidate_source.words("b")]
    return shlex.join(["ckptkit", "diff", str(reference), str(candidate), *words])


def _hash(checkpoint: Checkpoint, source: SourceOptions, progress: Progress | None) -> str | None:
    """SHA-256 of a side's tensors, as `ckptkit hash --only tensors` prints it last."""
    return hash_checkpoint(checkpoint.path, only="tensors", progress=progress, **source.keywords()).model


def _once(task: Callable[[], T]) -> T:
    """The result (JSON types) of one of the processes that torchrun started: they would all read the same."""
    return TorchrunRanks().once(task) if inside_torchrun() else task()


def in_one_process(question: Callable[[], LevelResult]) -> LevelResult:
    """The answer, found by one of the processes that torchrun started."""
    answer = _once(lambda: asdict(question()))
    return LevelResult(**{**answer, "checks": [Check(**check) for check in answer["checks"]]})


def refuse_unused(level: str, options: RunOptions, prompts: object, tokens: object) -> None:
    """Options of the logits level have no meaning below it."""
    unused = options.for_logits_only()
    unused += [name for name, given in (("--prompt", prompts), ("--tokens", tokens)) if given is not None]
    if unused:
        need = "needs" if len(unused) == 1 else "need"
        raise UsageError(
            f"{', '.join(unused)} {need} --level logits; this run stops at {level}", hint="drop one or the other"
        )


def refuse_unused_backwards(level: str, options: RunOptions) -> None:
    """Options that have a meaning only where the sides run backwards, or take steps."""
    unused = [] if level in BACKWARD else options.for_backward_only()
    if level == "gradients":
        unused = [name for name in options.for_backward_only() if name not in ("--recompute", "--train-only")]
    if unused:
        need = "needs" if len(unused) == 1 else "need"
        hint = "--train-steps N" if level == "gradients" else "--level gradients, or --train-steps N"
        raise UsageError(f"{', '.join(unused)} {need} a later level; this run stops at {level}", hint=hint)


def logits_level(
    checkpoints: tuple[Checkpoint, Checkpoint],
    sides: tuple[Side, Side],
    prompts: Sequence[str] | None,
    tokens: Sequence[Sequence[int]] | None,
    pool: Ranks | None,
    tell: Tell,
    run: RunKeywords,
) -> LevelResult:
    """The level logits, on token ids or on prompts."""
    tokenizer = _tokenizer(checkpoints) if prompts else None
    if tokenizer is not None:
        tokens = [tokenizer(prompt)["input_ids"] for prompt in prompts or ()]
    report = verify_logits(*sides, tokens=tokens, pool=pool, tell=tell, **run)
    answer = report.level()
    if tokenizer is not None and report.greedy is not None:
        texts = [tokenizer.decode(ids) for ids in report.greedy.continuation]
        same = "both continue" if report.greedy.passed else "the reference continues"
        lines = [f"{same} {prompt!r} with {text!r}" for prompt, text in zip(prompts or (), texts, strict=True)]
        answer.details["messages"] = [*answer.details.get("messages", []), *lines]
    return answer


def ask_backwards(
    asked: Asked,
    checkpoints: tuple[Checkpoint, Checkpoint],
    sides: tuple[Side, Side],
    prompts: Sequence[str] | None,
    tokens: Sequence[Sequence[int]] | None,
    pool: Ranks | None,
    tell: Tell,
    run: RunKeywords,
) -> None:
    """Asks the levels that run backwards, if they are wanted."""
    for name, question in (("gradients", verify_gradients), ("training", verify_training)):
        asked.ask(name, partial(_backwards, name, question, checkpoints, sides, prompts, tokens, pool, tell, run))


def _backwards(
    level: str,
    question: Callable[..., LevelResult],
    checkpoints: tuple[Checkpoint, Checkpoint],
    sides: tuple[Side, Side],
    prompts: Sequence[str] | None,
    tokens: Sequence[Sequence[int]] | None,
    pool: Ranks | None,
    tell: Tell,
    run: RunKeywords,
) -> LevelResult:
    if prompts:
        tokenizer = _tokenizer(checkpoints)
        tokens = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    tell(Step(f"the level {level}"))
    return question(*sides, tokens=tokens, pool=pool, **run)


def tokenizer_of(sides: Sequence[Checkpoint]) -> Any:
    """The tokenizer of the first side that has one, in its directory or in its sidecar; or None."""
    from transformers import AutoTokenizer

    for side in sides:
        if any(name in side.sidecar.small for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
            return AutoTokenizer.from_pretrained(side.sidecar.small["config.json"].parent, local_files_only=True)
    return None


def _tokenizer(sides: tuple[Checkpoint, Checkpoint]) -> Any:
    if (found := tokenizer_of(sides)) is not None:
        return found
    raise UsageError("--prompt needs a tokenizer, and neither side has one", hint="pass --tokens with token ids")


def _prediction(checkpoints: tuple[Checkpoint, Checkpoint]) -> list[str]:
    """A sentence about layers that the level weights compares, and no other level."""
    if not any(checkpoint.config.mtp_layers for checkpoint in checkpoints):
        return []
    return ["multi-token prediction is compared by its weights alone: neither side ran it"]


def _messages(sides: tuple[Side, Side]) -> list[str]:
    """Sentences about differences that a verification of these two cannot show."""
    kinds = {side.kind for side in sides}
    if kinds == {MEGATRON}:
        return ["both sides ran in megatron-core: a mistake in the family's table would show in neither"]
    return [] if len(kinds) == 2 else ["both sides ran in transformers: nothing was loaded into megatron-core"]
