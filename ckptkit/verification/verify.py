"""`verify`: are two checkpoints the same model? Cheapest question first, and the first no ends it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.opening import open_checkpoint
from ckptkit.errors import UsageError
from ckptkit.formats.hub import locate
from ckptkit.megatron import DDP
from ckptkit.verification.logits import TOLERANCE, Side, check_device, check_how, verify_logits
from ckptkit.verification.ranks.jobs import TIMEOUT
from ckptkit.verification.ranks.pool import Ranks, TorchrunRanks, inside_torchrun
from ckptkit.verification.reports.placement import describe
from ckptkit.verification.reports.report import LevelResult, VerificationReport
from ckptkit.verification.reports.results import Check
from ckptkit.verification.weights import check_structure, check_weights

LEVELS = ("structure", "weights", "logits")


def verify(
    reference: str | Path,
    candidate: str | Path,
    *,
    level: str = "logits",
    device: str = "cpu",
    dtype: str = "float32",
    prompts: Sequence[str] | None = None,
    tokens: Sequence[Sequence[int]] | None = None,
    tolerance: float | None = None,
    replay: bool = True,
    packed: bool = False,
    sequence_parallel: bool = False,
    dp: int = 1,
    dp_kind: str = DDP,
    save_logits: str | Path | None = None,
    timeout: float = TIMEOUT,
    progress: Callable[[int, int], None] | None = None,
    pool: Ranks | None = None,
) -> VerificationReport:
    """Verifies a checkpoint against another one; any formats, any grids.

    A Hugging Face side is run by transformers, a Megatron side by megatron-core on its own grid, built from what that
    checkpoint stores.

    Args:
        reference: The checkpoint that is trusted.
        candidate: The checkpoint in question.
        level: The last question to ask: `structure`, `weights` or `logits`.
        device: `cpu` or `cuda`.
        dtype: What the candidate runs in: `float32` (judged absolutely) or `bfloat16` (judged by the noise floor).
        prompts: Texts to compare on; a side must have a tokenizer.
        tokens: Token ids to compare on; pseudo-random ones where neither is given.
        tolerance: Largest fp32 error that passes, relative to the largest |logit|.
        replay: Whether the candidate's tokens go to the experts that the reference chose, and routers are judged by
            themselves; without experts it changes nothing.
        packed: Take the candidate's logits from rows packed together, without padding between them.
        sequence_parallel: Split the candidate's sequence over its tensor parallel ranks outside of the linears.
        dp: Replicas of the candidate's grid; all must compute the same.
        dp_kind: What makes them replicas: `ddp`, megatron-core's DistributedDataParallel, or `fsdp2`.
        save_logits: A safetensors file for `reference` and `candidate`, [batch, seq, vocab] float32.
        timeout: Seconds that a run of a Megatron side may take, loading included.
        progress: Called with (bytes compared, bytes in all) at the weights level.
        pool: Ranks to use instead of starting some.

    Raises:
        UsageError: The request makes no sense.
        InputError: A side is damaged or incomplete.
        UnsupportedError: No family converts a side.
        VerificationError: A run could not be made; this says nothing about the checkpoints.
    """
    if level not in LEVELS:
        raise UsageError(f"no level {level!r}", hint=f"choose {', '.join(LEVELS)}")
    with ExitStack() as stack:
        paths = [stack.enter_context(locate(side)).path for side in (reference, candidate)]
        sides = open_checkpoint(paths[0]), open_checkpoint(paths[1])
    if level == "logits":  # what cannot run is said before every byte is compared
        check_device(device, dtype)
        check_how(_side(sides[1]), sides[1].grid, packed, sequence_parallel, dp, dp_kind)
    else:
        _refuse_unused(level, packed, sequence_parallel, dp, save_logits, prompts, tokens)
    asked = LEVELS[: LEVELS.index(level) + 1]
    how = {
        **{"packed": packed, "sequence_parallel": sequence_parallel, "dp": dp, "dp_kind": dp_kind},
        **{"timeout": timeout, "save_logits": save_logits, "pool": pool},
    }
    levels: list[LevelResult] = []
    messages = _messages(*sides) if level == "logits" else []

    def ask(name: str, question: Callable[[], LevelResult]) -> None:
        if name in asked and all(answer.passed for answer in levels):
            start = time.monotonic()
            levels.append(replace(question(), seconds=time.monotonic() - start))

    ask("structure", lambda: check_structure(*sides))
    ask("weights", lambda: _in_one_process(lambda: check_weights(*sides, progress)))
    ask("logits", lambda: _logits(sides, device, dtype, prompts, tokens, tolerance, replay, how))
    return VerificationReport(
        reference=str(reference),
        candidate=str(candidate),
        levels=levels,
        messages=messages,
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
    return Side(side.path, "hf" if side.format == "hf" else "megatron")


def _refuse_unused(level: str, packed: bool, sequence_parallel: bool, dp: int, *others: object) -> None:
    """Options of the logits level have no meaning below it."""
    names = ("--packed", "--sequence-parallel", "--dp", "--save-logits", "--prompt", "--tokens")
    given = (packed, sequence_parallel, dp != 1, *(other is not None for other in others))
    if unused := [name for name, there in zip(names, given, strict=True) if there]:
        raise UsageError(
            f"{', '.join(unused)}: of the level logits, asked for was {level}", hint="drop one or the other"
        )


def _logits(
    sides: tuple[Checkpoint, Checkpoint],
    device: str,
    dtype: str,
    prompts: Sequence[str] | None,
    tokens: Sequence[Sequence[int]] | None,
    tolerance: float | None,
    replay: bool,
    how: dict[str, Any],
) -> LevelResult:
    tokenizer = _tokenizer(sides) if prompts else None
    if tokenizer is not None:
        tokens = [tokenizer(prompt)["input_ids"] for prompt in prompts or ()]
    report = verify_logits(
        *map(_side, sides),
        device=device,
        dtype=dtype,
        tokens=tokens,
        tolerance=TOLERANCE if tolerance is None else tolerance,
        replay=replay,
        **how,
    )
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
