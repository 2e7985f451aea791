"""`verify --rollouts`: did the engine that sampled say what the model that is trained says?"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Unpack

from ckptkit.checkpoints.checkpoint import Checkpoint, check_grid
from ckptkit.checkpoints.source_options import SourceOptions
from ckptkit.errors import UsageError
from ckptkit.sharding.stages import split_layers
from ckptkit.steps import Tell, nobody
from ckptkit.verification.levels import Asked, open_at, sides_of, tokenizer_of
from ckptkit.verification.question import refuse_unused_backwards
from ckptkit.verification.ranks.jobs import OPENER
from ckptkit.verification.ranks.pool import Ranks
from ckptkit.verification.reports.placement import describe
from ckptkit.verification.reports.report import VerificationReport, installed_versions
from ckptkit.verification.rollouts.level import verify_rollouts
from ckptkit.verification.rollouts.options import RolloutOptions
from ckptkit.verification.rollouts.reading import read_rollouts
from ckptkit.verification.run_options import RunKeywords, RunOptions
from ckptkit.verification.sides import HF, Side, check_candidate, open_side, widest_window

LEVEL = "rollouts"


def verify_engine(
    reference: str | Path | None,
    candidate: str | Path,
    rollouts: str | Path,
    *,
    temperature: float | None = None,
    engine_dtype: str | None = None,
    max_kl: float | None = None,
    reference_source: SourceOptions = SourceOptions(),  # noqa: B008  frozen
    candidate_source: SourceOptions = SourceOptions(),  # noqa: B008  frozen
    tell: Tell = nobody,
    pool: Ranks | None = None,
    command: str | None = None,
    **run: Unpack[RunKeywords],
) -> VerificationReport:
    """Verifies that an inference engine computed what a checkpoint computes as it is trained.

    The token ids that the engine recorded go through the candidate on its grid, and its log-probabilities are compared
    with the recorded ones, in units of what rounding does to them. Nothing is tokenised.

    Args:
        reference: The model as a Hugging Face directory: transformers measures the noise with it, and it tells a fault
            of the engine from one of the conversion. None measures the noise with the candidate.
        candidate: The checkpoint that is trained, of any format.
        rollouts: What the engine recorded, JSON lines (see `records.SHAPES`).
        temperature: Temperature of the recorded log-probabilities; None takes 1, and looks which one fits.
        engine_dtype: Type that the engine computed in; None for that of the candidate's config.
        max_kl: Largest KL per token (k3) that passes, in nats; None asks for none.
        reference_source: Facts about the reference that it does not record itself.
        candidate_source: Facts about the candidate that it does not record itself.
        tell: Told what runs.
        pool: Ranks to use instead of starting some.
        command: The command line, for the report.
        run: How the candidate runs, as for `verify`.

    Raises:
        UsageError: The request makes no sense.
        InputError: A checkpoint or the recording is damaged, or the recording is of another model.
        UnsupportedError: No family converts a side, or it has no log-probabilities.
        VerificationError: A run could not be made; this says nothing about the engine.
    """
    started = datetime.now(UTC).isoformat(timespec="seconds")
    asked = RolloutOptions(temperature, engine_dtype, max_kl)
    asked.check()
    options = RunOptions.of(**run)
    options.check()
    refuse_unused_backwards("logits", options)
    if options.save_logits is not None:
        raise UsageError("--save-logits and --rollouts exclude each other", hint="no logits are kept of rollouts")
    found = read_rollouts(rollouts)
    with ExitStack() as stack:
        theirs = None if reference is None else open_at(stack, reference, reference_source, "ref")
        ours = open_at(stack, candidate, candidate_source, "cand")
        trusted = theirs or ours
        sides = sides_of((trusted[0], ours[0]), (trusted[1], ours[1]), options)
        if theirs is not None and sides[0].kind != HF:
            raise UsageError(
                "with --rollouts, REFERENCE is a Hugging Face directory that transformers runs",
                where=reference,
                hint="leave it out: the noise is then measured with the candidate",
            )
        grid = sides[1].grid or ours[0].grid
        config = ours[0].config
        check_candidate(sides[1], options.config(grid, widest_window(config)))
        check_grid(config, grid)
        split_layers(config.num_layers, grid)
        opened = [None if theirs is None else open_side(sides[0], OPENER), open_side(sides[1], OPENER)]
        assert opened[1] is not None
        if opened[0] is not None and opened[0].vocab_size != opened[1].vocab_size:
            raise UsageError(f"the vocabularies differ: {opened[0].vocab_size} and {opened[1].vocab_size} tokens")
        ask = Asked((LEVEL,), keep_going=False)
        ask.ask(
            LEVEL,
            lambda: verify_rollouts(
                opened[0],
                opened[1],  # type: ignore[arg-type]  # it is there
                config,
                found,
                asked,
                options,
                opener=OPENER,
                pool=pool,
                tell=tell,
                decode=_decoder([ours[0], *([] if theirs is None else [theirs[0]])]),
            ),
        )
        described = {"candidate": describe(ours[0], sides[1].grid)}
        if theirs is not None:
            described = {"reference": describe(theirs[0]), **described}
        return VerificationReport(
            reference=str(rollouts if reference is None else reference),
            candidate=str(candidate),
            levels=ask.answers,
            messages=_messages(sides[1]),
            sides=described,
            command=command,
            started=started,
            versions=installed_versions(),
        )


def _decoder(sides: list[Checkpoint]) -> Callable[[list[int]], str] | None:
    """The function that makes text of token ids, if a side has a tokenizer."""
    tokenizer: Any = tokenizer_of(sides)
    return None if tokenizer is None else lambda ids: str(tokenizer.decode(ids))


def _messages(candidate: Side) -> list[str]:
    return ["the candidate ran in transformers: nothing was loaded into megatron-core"] if candidate.kind == HF else []
