"""The levels of `verify`, cheapest question first; the first no ends it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Unpack

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.opening import open_checkpoint
from ckptkit.errors import UsageError
from ckptkit.formats.hub import locate
from ckptkit.verification.logits import verify_logits
from ckptkit.verification.ranks.pool import Ranks, TorchrunRanks, inside_torchrun
from ckptkit.verification.reports.placement import describe
from ckptkit.verification.reports.report import LevelResult, VerificationReport
from ckptkit.verification.reports.results import Check
from ckptkit.verification.run_options import LEVELS, RunKeywords, RunOptions
from ckptkit.verification.sides import HF, MEGATRON, Side, check_candidate
from ckptkit.verification.weights import check_structure, check_weights


def verify(
    reference: str | Path,
    candidate: str | Path,
    *,
    level: str = "logits",
    prompts: Sequence[str] | None = None,
    tokens: Sequence[Sequence[int]] | None = None,
    progress: Callable[[int, int], None] | None = None,
    pool: Ranks | None = None,
    **run: Unpack[RunKeywords],
) -> VerificationReport:
    """Verifies a checkpoint against another one; any formats, any grids.

    A Hugging Face side is run by transformers, a Megatron side by megatron-core on its own grid, built from what that
    checkpoint stores.

    Args:
        reference: The checkpoint that is trusted.
        candidate: The checkpoint in question.
        level: The last question to ask: `structure`, `weights` or `logits`.
        prompts: Texts to compare on; a side must have a tokenizer.
        tokens: Token ids to compare on; pseudo-random ones where neither is given.
        progress: Called with (bytes compared, bytes in all) at the weights level.
        pool: Ranks to use instead of starting some.
        run: How the sides run at the level logits, the fields of `RunOptions`: device, dtype, tolerance, replay,
            packed, sequence_parallel, dp, dp_kind, save_logits, timeout.

    Raises:
        UsageError: The request makes no sense.
        InputError: A side is damaged or incomplete.
        UnsupportedError: No family converts a side.
        VerificationError: A run could not be made; this says nothing about the checkpoints.
    """
    if level not in LEVELS:
        raise UsageError(f"no level {level!r}", hint=f"choose {', '.join(LEVELS)}")
    options = RunOptions.of(**run)
    with ExitStack() as stack:
        paths = [stack.enter_context(locate(side)).path for side in (reference, candidate)]
        sides = open_checkpoint(paths[0]), open_checkpoint(paths[1])
    if level == "logits":  # what cannot run is said before every byte is compared
        options.check()
        check_candidate(_side(sides[1]), sides[1].grid, options)
    else:
        _refuse_unused(level, options, prompts, tokens)
    asked = LEVELS[: LEVELS.index(level) + 1]
    levels: list[LevelResult] = []

    def ask(name: str, question: Callable[[], LevelResult]) -> None:
        if name in asked and all(answer.passed for answer in levels):
            start = time.monotonic()
            levels.append(replace(question(), seconds=time.monotonic() - start))

    ask("structure", lambda: check_structure(*sides))
    ask("weights", lambda: _in_one_process(lambda: check_weights(*sides, progress)))
    ask("logits", lambda: _logits(sides, prompts, tokens, pool, run))
    return VerificationReport(
        reference=str(reference),
        candidate=str(candidate),
        levels=levels,
        messages=_messages(*sides) if level == "logits" else [],
        sides={name: describe(side) for name, side in zip(("reference", "candidate"), sides, strict=True)},
        not_run=list(asked[len(levels) :]),
    )


def _in_one_process(question: Callable[[], LevelResult]) -> LevelResult:
    """The answer, found by one of the processes that torchrun started: they would all read the same."""
    if not inside_torchrun():
        return question()
    answer = TorchrunRanks().once(lambda: asdict(question()))
    return LevelResult(**{**answer, "checks": [Check(**check) for check in answer["checks"]]})


def _side(side: Checkpoint) -> Side:
    return Side(side.path, HF if side.format == "hf" else MEGATRON)


def _refuse_unused(level: str, options: RunOptions, prompts: object, tokens: object) -> None:
    """Options of the logits level have no meaning below it."""
    unused = options.for_logits_only()
    unused += [name for name, given in (("--prompt", prompts), ("--tokens", tokens)) if given is not None]
    if unused:
        need = "needs" if len(unused) == 1 else "need"
        raise UsageError(
            f"{', '.join(unused)} {need} --level logits; this run stops at {level}", hint="drop one or the other"
        )


def _logits(
    sides: tuple[Checkpoint, Checkpoint],
    prompts: Sequence[str] | None,
    tokens: Sequence[Sequence[int]] | None,
    pool: Ranks | None,
    run: RunKeywords,
) -> LevelResult:
    tokenizer = _tokenizer(sides) if prompts else None
    if tokenizer is not None:
        tokens = [tokenizer(prompt)["input_ids"] for prompt in prompts or ()]
    report = verify_logits(*map(_side, sides), tokens=tokens, pool=pool, **run)
    answer = report.level()
    if tokenizer is not None and report.greedy is not None:
        texts = [tokenizer.decode(ids) for ids in report.greedy.continuation]
        same = "both continue" if report.greedy.passed else "the reference continues"
        lines = [f"{same} {prompt!r} with {text!r}" for prompt, text in zip(prompts or (), texts, strict=True)]
        answer.details["messages"] = [*answer.details.get("messages", []), *lines]
    return answer


def _tokenizer(sides: tuple[Checkpoint, Checkpoint]) -> Any:
    """The tokenizer of the first side that has one, in its directory or in its sidecar."""
    from transformers import AutoTokenizer

    for side in sides:
        if any(name in side.sidecar.small for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
            return AutoTokenizer.from_pretrained(side.sidecar.small["config.json"].parent, local_files_only=True)
    raise UsageError("--prompt needs a tokenizer, and neither side has one", hint="pass --tokens with token ids")


def _messages(reference: Checkpoint, candidate: Checkpoint) -> list[str]:
    kinds = {side.format == "hf" for side in (reference, candidate)}
    if kinds == {False}:
        return ["both sides ran in megatron-core: a mistake in the family's table would show in neither"]
    return [] if len(kinds) == 2 else ["both sides ran in transformers: nothing was loaded into megatron-core"]
