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
from typing import Any, TypeVar, Unpack, cast

from ckptkit.checkpoints.checkpoint import Checkpoint, check_grid
from ckptkit.checkpoints.opening import open_checkpoint
from ckptkit.checkpoints.source_options import SourceOptions, options_called
from ckptkit.errors import CkptkitError, UnsupportedError, UsageError
from ckptkit.formats.hf import is_weights
from ckptkit.formats.hub import locate
from ckptkit.inspection.hashing import hash_checkpoint
from ckptkit.io.stores.mirror import fetch_folder, shown
from ckptkit.io.threads import Progress
from ckptkit.sharding.grid import Parallelism
from ckptkit.sharding.stages import split_layers
from ckptkit.steps import Step
from ckptkit.tables.model_config import ModelConfig
from ckptkit.verification.logits import verify_logits
from ckptkit.verification.quantised import refuse_to_run
from ckptkit.verification.question import Question, VerifyKeywords
from ckptkit.verification.ranks.pool import TorchrunRanks, inside_torchrun
from ckptkit.verification.reports.placement import describe
from ckptkit.verification.reports.report import LevelResult, VerificationReport, installed_versions
from ckptkit.verification.reports.results import Check
from ckptkit.verification.rounding import rounding_of
from ckptkit.verification.run_options import RunKeywords, RunOptions
from ckptkit.verification.sides import HF, MEGATRON, Side, check_backwards, check_candidate, widest_window
from ckptkit.verification.training.level import verify_gradients, verify_training
from ckptkit.verification.weights import check_structure, check_weights

T = TypeVar("T")

PREDICTION = "prediction"
"""The level at which layers of multi-token prediction run, beside the level logits where both sides have such.

Where they run they are trained, too, at the levels gradients and training."""
OWN_GRID = ("torch", "torch_dist")
"""Formats that say which grid they are for."""


def verify(reference: str | Path, candidate: str | Path, **asked: Unpack[VerifyKeywords]) -> VerificationReport:
    """Verifies a checkpoint against another one; any formats, any grids.

    A Hugging Face side is run by transformers, a Megatron side by megatron-core on its own grid, built from what that
    checkpoint stores. Where the candidate stores weights in a narrower type, the reference's are rounded to it.

    Args:
        reference: The checkpoint that is trusted.
        candidate: The checkpoint in question.
        asked: The fields of `Question`: level, prompts, tokens, keep_going, reference_source, candidate_source,
            progress, tell, pool, command and hash; and those of `RunOptions`, how the models run: device, dtype,
            tolerance, replay, packed, sequence_parallel, cp, dp, dp_kind, ...

    Raises:
        UsageError: The request makes no sense.
        InputError: A side is damaged or incomplete.
        UnsupportedError: No family converts a side.
        VerificationError: A run could not be made; this says nothing about the checkpoints.
    """
    question = Question.of(**asked)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    sources = (question.reference_source, question.candidate_source)
    with ExitStack() as stack:
        opened = (open_at(stack, reference, sources[0], "ref"), open_at(stack, candidate, sources[1], "cand"))
        checkpoints = opened[0][0], opened[1][0]
        if question.runs:
            for checkpoint, which in zip(checkpoints, ("the reference", "the candidate"), strict=True):
                refuse_to_run(checkpoint, which)
        sides = sides_of(checkpoints, (opened[0][1], opened[1][1]), question.options)
        check_run(question, sides[1], sides[1].grid or checkpoints[1].grid, checkpoints[1].config)
        predicted = prediction_of(checkpoints, question)
        answers = Asked(with_prediction(question.levels) if predicted else question.levels, question.keep_going)
        answers.ask("structure", lambda: check_structure(*checkpoints))
        diff = _diff_command(reference, candidate, *sources)
        weights = partial(check_weights, *checkpoints, question.progress, diff, sides[1].grid)
        answers.ask("weights", lambda: in_one_process(weights))
        hashes = _once(lambda: [_hash(*side, question.progress) for side in opened]) if question.hash else [None, None]
        ask_runs(answers, checkpoints, sides, question)
        return VerificationReport(
            reference=str(reference),
            candidate=str(candidate),
            levels=answers.answers,
            messages=[
                *(_messages(sides) if question.runs else []),
                *_prediction(checkpoints, question, predicted),
                *answers.messages,
            ],
            sides={
                name: describe(checkpoint, side.grid, sha256)
                for name, checkpoint, side, sha256 in zip(
                    ("reference", "candidate"), checkpoints, sides, hashes, strict=True
                )
            },
            not_run=answers.not_run,
            command=question.command,
            started=started,
            versions=installed_versions(),
        )


def check_run(question: Question, candidate: Side, grid: Parallelism, config: ModelConfig) -> None:
    """Whether what is asked can run; it is said before every byte is compared.

    Args:
        question: What is asked.
        candidate: The candidate.
        grid: The grid that it runs on.
        config: Its model.

    Raises:
        CkptkitError: It cannot.
    """
    options = question.options
    if question.runs:
        options.check()
    question.refuse_unused()
    if not question.runs:
        return
    how = options.config(grid, widest_window(config))
    check_candidate(candidate, how)
    if question.backwards:
        check_backwards(candidate, how, experts=bool(config.num_experts))
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
            self.messages.append(f"the level {name} has no answer: {shown(str(error))}")
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


def ask_runs(
    answers: Asked, checkpoints: tuple[Checkpoint, Checkpoint], sides: tuple[Side, Side], question: Question
) -> None:
    """Asks the levels at which models run, if they are wanted."""
    answers.ask("logits", lambda: _logits(checkpoints, sides, question))
    answers.ask(PREDICTION, lambda: _predicted(checkpoints, sides, question))
    for level, ask in (("gradients", verify_gradients), ("training", verify_training)):
        answers.ask(level, partial(_backwards, level, ask, checkpoints, sides, question))


def _logits(checkpoints: tuple[Checkpoint, Checkpoint], sides: tuple[Side, Side], question: Question) -> LevelResult:
    """The level logits, on token ids or on prompts."""
    prompts, tokens = question.prompts or (), question.tokens
    tokenizer = _tokenizer(checkpoints) if prompts else None
    if tokenizer is not None:
        tokens = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    report = verify_logits(*sides, tokens=tokens, pool=question.pool, tell=question.tell, **question.run)
    answer = report.level()
    if tokenizer is not None and report.greedy is not None:
        texts = [tokenizer.decode(ids) for ids in report.greedy.continuation]
        same = "both continue" if report.greedy.passed else "the reference continues"
        lines = [f"{same} {prompt!r} with {text!r}" for prompt, text in zip(prompts, texts, strict=True)]
        answer.details["messages"] = [*answer.details.get("messages", []), *lines]
    return answer


def prediction_of(checkpoints: tuple[Checkpoint, Checkpoint], question: Question) -> int:
    """Layers of multi-token prediction that both sides have and can run, or 0.

    Where archives have them apart, transformers makes them like the last layer of the model, which must have attention.
    """
    counts = {checkpoint.config.mtp_layers for checkpoint in checkpoints}
    run = all(one.family.prediction.layer is None or one.config.layers[-1].delta is None for one in checkpoints)
    return counts.pop() if question.runs and run and len(counts) == 1 else 0


def with_prediction(levels: Sequence[str]) -> list[str]:
    """The levels, with that of multi-token prediction behind the logits."""
    at = levels.index("logits") + 1
    return [*levels[:at], PREDICTION, *levels[at:]]


def _predicted(checkpoints: tuple[Checkpoint, Checkpoint], sides: tuple[Side, Side], question: Question) -> LevelResult:
    """The logits of the last layer of multi-token prediction, on token ids or on prompts."""
    tokens, count = question.tokens, checkpoints[0].config.mtp_layers
    if question.prompts:
        tokenizer = _tokenizer(checkpoints)
        tokens = [tokenizer(prompt)["input_ids"] for prompt in question.prompts]
    pair = [side._replace(prediction=count) for side in sides]
    run = cast(RunKeywords, {name: value for name, value in question.run.items() if name != "save_logits"})
    report = verify_logits(*pair, tokens=tokens, greedy=0, pool=question.pool, tell=question.tell, **run)
    return replace(report.level(), name=PREDICTION)


def _backwards(
    level: str,
    ask: Callable[..., LevelResult],
    checkpoints: tuple[Checkpoint, Checkpoint],
    sides: tuple[Side, Side],
    question: Question,
) -> LevelResult:
    tokens = question.tokens
    if question.prompts:
        tokenizer = _tokenizer(checkpoints)
        tokens = [tokenizer(prompt)["input_ids"] for prompt in question.prompts]
    question.tell(Step(f"the level {level}"))
    count = prediction_of(checkpoints, question)
    return ask(*(side._replace(prediction=count) for side in sides), tokens=tokens, pool=question.pool, **question.run)


def tokenizer_of(sides: Sequence[Checkpoint]) -> Any:
    """The tokenizer of the first side that has one, in its directory or in its sidecar; or None."""
    from transformers import AutoTokenizer

    for side in sides:
        if any(name in side.sidecar.small for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
            folder = side.sidecar.small["config.json"].parent
            fetch_folder(folder, lambda name: not is_weights(name))
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return None


def _tokenizer(sides: tuple[Checkpoint, Checkpoint]) -> Any:
    if (found := tokenizer_of(sides)) is not None:
        return found
    raise UsageError("--prompt needs a tokenizer, and neither side has one", hint="pass --tokens with token ids")


def _prediction(checkpoints: tuple[Checkpoint, Checkpoint], question: Question, ran: int) -> list[str]:
    """A sentence about layers that the level weights compares, and no other level."""
    if ran or not any(checkpoint.config.mtp_layers for checkpoint in checkpoints):
        return []
    return ["multi-token prediction is compared by its weights alone: neither side ran it"]


def _messages(sides: tuple[Side, Side]) -> list[str]:
    """Sentences about differences that a verification of these two cannot show."""
    kinds = {side.kind for side in sides}
    if kinds == {MEGATRON}:
        return ["both sides ran in megatron-core: a mistake in the family's table would show in neither"]
    return [] if len(kinds) == 2 else ["both sides ran in transformers: nothing was loaded into megatron-core"]
