"""`verify --adapter`: is the candidate the model with the adapter, as peft runs it?"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Unpack

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.errors import UsageError
from ckptkit.tables.lora import FUSED
from ckptkit.verification.adapters.opening import PEFT_FORMAT, Candidate, Opened, open_all
from ckptkit.verification.adapters.weights import check_adapters, check_deltas, check_merged
from ckptkit.verification.judging import Pair
from ckptkit.verification.levels import Asked, ask_runs, check_run, in_one_process, sides_of
from ckptkit.verification.question import Question, VerifyKeywords
from ckptkit.verification.ranks.jobs import OPENER, AdapterJob
from ckptkit.verification.reports.placement import describe
from ckptkit.verification.reports.report import LevelResult, VerificationReport, installed_versions
from ckptkit.verification.rounding import rounding_to
from ckptkit.verification.run_options import RunOptions
from ckptkit.verification.sides import HF, MEGATRON, Side, open_side
from ckptkit.verification.training.level import check_trainable
from ckptkit.verification.weights import check_structure, check_weights


def verify_adapter(
    reference: str | Path, candidate: str | Path, adapter: str | Path, **asked: Unpack[VerifyKeywords]
) -> VerificationReport:
    """Verifies that a candidate is a model with an adapter. The reference is peft on transformers.

    The candidate may be

    - an adapter of any format: megatron-core runs it on the reference's weights, as modules beside its linears;
    - a Megatron checkpoint that holds weights and adapter: megatron-core runs both;
    - a model: the adapter is merged into its weights. Where these are narrower than float32, peft merges the
      reference in float32, and the result is rounded as the candidate's weights are.

    Args:
        reference: The model, a Hugging Face directory.
        candidate: What should be the model with the adapter.
        adapter: The adapter, a PEFT directory.
        asked: As for `verify`, without `hash`.

    Raises:
        UsageError: The request makes no sense.
        InputError: A side is damaged or incomplete, or the adapter is for another model.
        UnsupportedError: Megatron or the runtime cannot express the adapter.
        VerificationError: A run could not be made; this says nothing about the checkpoints.
    """
    question = Question.of(**asked)
    if question.hash:
        raise UsageError("--hash and --adapter exclude each other", hint="`ckptkit hash` hashes each of the three")
    started = datetime.now(UTC).isoformat(timespec="seconds")
    sources = (question.reference_source, question.candidate_source)
    with ExitStack() as stack:
        opened = open_all(stack, reference, adapter, candidate, *sources)
        options = question.options
        sides = _sides(opened, options)
        check_run(question, sides[1], sides[1].grid or opened.candidate.checkpoint.grid, opened.base.config)
        if question.backwards:
            check_trainable(Pair(*(open_side(side, OPENER) for side in sides)), OPENER, options)
        answers = Asked(question.levels, question.keep_going)
        answers.ask("structure", lambda: _structure(opened))
        answers.ask("weights", lambda: in_one_process(lambda: _weights(opened, question.progress)))
        ask_runs(answers, (opened.base, opened.candidate.model or opened.base), sides, question)
        return VerificationReport(
            reference=str(reference),
            candidate=str(candidate),
            levels=answers.answers,
            messages=[*_messages(opened, sides), *answers.messages],
            sides={
                "reference": describe(opened.base),
                "candidate": describe(opened.candidate.checkpoint, sides[1].grid),
            },
            not_run=answers.not_run,
            command=question.command,
            started=started,
            versions=installed_versions(),
        )


def _sides(opened: Opened, options: RunOptions) -> tuple[Side, Side]:
    """What runs the two."""
    candidate, adapter = opened.candidate, AdapterJob(str(opened.adapter.path))
    pair = (opened.base, candidate.model or candidate.checkpoint)
    reference, found = sides_of(pair, (opened.base_source, candidate.model_source), options)
    if candidate.adapter is None:
        assert candidate.model is not None
        rounding = rounding_to(candidate.model)
        merged = replace(adapter, merged=bool(rounding.casts))
        return reference._replace(adapter=merged, rounding=rounding), found
    if candidate.model is None:
        alone = candidate.adapter.format == PEFT_FORMAT and found.grid is None
        found = found._replace(
            path=opened.base.path,
            kind=HF if alone else MEGATRON,
            opening=opened.base_source,
            grid=None if alone else found.grid or candidate.adapter.grid,
        )
    return reference._replace(adapter=adapter), found._replace(adapter=candidate.job)


def _structure(opened: Opened) -> LevelResult:
    candidate = opened.candidate
    answers = []
    if candidate.model is not None:
        answers.append(check_structure(opened.base, candidate.model))
    if candidate.adapter is not None:
        answers.append(check_adapters(opened.adapter, candidate.adapter))
    return _one(answers)


def _weights(opened: Opened, progress: Callable[[int, int], None] | None) -> LevelResult:
    candidate = opened.candidate
    if candidate.adapter is None:
        assert candidate.model is not None
        return check_merged(opened.base, opened.adapter, candidate.model)
    answers = [] if candidate.model is None else [check_weights(opened.base, candidate.model, progress)]
    return _one([*answers, check_deltas(opened.adapter, candidate.adapter)])


def _one(answers: list[LevelResult]) -> LevelResult:
    """The answers about weights and adapter as one."""
    wrong = [answer for answer in answers if not answer.passed]
    summary = "; ".join(answer.summary for answer in wrong or answers)
    checks = [check for answer in answers for check in answer.checks]
    details = {key: value for answer in answers for key, value in answer.details.items() if key != "problems"}
    problems = [problem for answer in answers for problem in answer.details.get("problems", [])]
    return LevelResult(answers[0].name, not wrong, summary, {**details, "problems": problems}, checks)


def _messages(opened: Opened, sides: tuple[Side, Side]) -> list[str]:
    candidate = opened.candidate
    how = "merged by peft, and rounded as the candidate's weights" if _is_merged(sides[0]) else "as modules of peft"
    found = [f"the reference has the adapter {opened.adapter.path} {how}"]
    if candidate.adapter is None:
        return [*found, "the candidate is a model: its weights should have the adapter in them"]
    if sides[1].kind == HF:
        return [*found, "both sides run in transformers: nothing is loaded into megatron-core"]
    return [*found, f"the candidate's adapter runs in the layout {_layout(candidate.adapter)}, {_whose(candidate)}"]


def _is_merged(side: Side) -> bool:
    return side.adapter is not None and side.adapter.merged


def _layout(adapter: Checkpoint) -> str:
    return adapter.lora.layout or FUSED if adapter.lora is not None else ""


def _whose(candidate: Candidate) -> str:
    weights = "the reference's weights" if candidate.model is None else "its own weights"
    return f"beside {weights}: modules of ckptkit that are made of megatron-core's linears"
