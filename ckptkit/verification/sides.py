"""The two sides of a comparison of logits, and the facts known about a side before it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ckptkit.checkpoints.source_options import SourceOptions
from ckptkit.errors import UsageError
from ckptkit.families import family_of
from ckptkit.formats.json_files import read_json
from ckptkit.megatron.run_config import RunConfig
from ckptkit.requirements import MEGATRON as MEGATRON_RANKS
from ckptkit.requirements import RUNNING
from ckptkit.sharding.grid import Parallelism
from ckptkit.tables.model_config import ModelConfig
from ckptkit.verification.environment.needs import require
from ckptkit.verification.ranks.jobs import AdapterJob, find, open_model
from ckptkit.verification.rounding import Rounding

HF, MEGATRON = KINDS = ("hf", "megatron")


class Side(NamedTuple):
    """One of the two models.

    Attributes:
        path: The checkpoint.
        kind: `hf` (transformers runs it) or `megatron` (megatron-core does).
        opening: Options that open it.
        grid: The grid that megatron-core runs it on; None for the checkpoint's own.
        rounding: How its weights are rounded before it runs in float32.
        adapter: The adapter that it runs with, or None.
        prediction: Its layers of multi-token prediction, if they run, or 0: the logits are then those of the last of
            them, and the loss has theirs in it.
    """

    path: str | Path
    kind: str
    opening: SourceOptions = SourceOptions()
    grid: Parallelism | None = None
    rounding: Rounding = Rounding()
    adapter: AdapterJob | None = None
    prediction: int = 0


@dataclass(frozen=True)
class OpenedSide:
    """A side, and the content of its headers.

    Attributes:
        side: The side.
        vocab_size: Number of tokens.
        grid: Where it runs: the checkpoint's own grid, or one rank for transformers.
        value_head: Whether it has one output per token in place of logits.
        window: The widest sliding window of a layer in tokens, 0 without one.
        experts: Whether it has any.
    """

    side: Side
    vocab_size: int
    grid: Parallelism
    value_head: bool
    window: int
    experts: bool


def open_side(side: Side, opener: str) -> OpenedSide:
    """Reads the headers of a side.

    Args:
        side: The side.
        opener: The function that opens a Megatron checkpoint, as `module:function`.

    Raises:
        UsageError: There is no such kind of side.
        CkptkitError: It cannot be opened.
    """
    if side.kind == MEGATRON:
        checkpoint = open_model(find(opener), str(side.path), side.opening, side.adapter, side.prediction)
        return _opened(side, checkpoint.config, side.grid or checkpoint.grid)
    if side.kind != HF:
        raise UsageError(f"a side is 'hf' or 'megatron', not {side.kind!r}", where=side.path)
    from ckptkit.verification.reference import architecture_of

    architecture_of(Path(side.path))
    raw = read_json(Path(side.path) / "config.json")
    config = family_of(raw, side.path).parse(raw)  # it knows what a config.json may leave out
    return _opened(side, config, Parallelism())


def _opened(side: Side, config: ModelConfig, grid: Parallelism) -> OpenedSide:
    return OpenedSide(side, config.vocab_size, grid, config.value_head, widest_window(config), bool(config.num_experts))


def widest_window(config: ModelConfig) -> int:
    """The widest sliding window of a layer in tokens, 0 without one."""
    return max((layer.window or 0 for layer in config.layers), default=0)


def check_candidate(candidate: Side, run: RunConfig) -> None:
    """Whether the candidate can run as asked.

    Raises:
        UsageError: It cannot.
        VerificationError: A package is missing that it takes.
    """
    require(RUNNING, *([MEGATRON_RANKS] if candidate.kind == MEGATRON else []))
    if candidate.kind == HF and run.changes_candidate:
        raise UsageError(
            "packed rows, sequence and context parallelism and replicas need a candidate that megatron-core runs",
            where=candidate.path,
            hint="give the grid to run it on (--tp, --pp, --ep; --tp 1 for one rank)",
        )
    if run.sequence_parallel and run.grid.tp == 1:
        raise UsageError("--sequence-parallel needs a candidate at TP 2 or more", where=candidate.path)


def check_backwards(candidate: Side, run: RunConfig, *, experts: bool) -> None:
    """Whether the candidate can run backwards as asked.

    Args:
        candidate: The candidate.
        run: How it runs.
        experts: Whether it has experts.

    Raises:
        UsageError: It cannot, but in another way it could.
    """
    check_candidate(candidate, run)
    if candidate.kind == HF:
        if run.recompute:
            raise UsageError(
                "--recompute needs a candidate that megatron-core runs",
                where=candidate.path,
                hint="give the grid to run it on (--tp, --pp, --ep; --tp 1 for one rank)",
            )
    elif experts and run.grid.tp > 1 and not run.sequence_parallel:
        raise UsageError(
            "megatron-core trains experts on several tensor parallel ranks under sequence parallelism only",
            where=candidate.path,
            hint="add --sequence-parallel, or stop at --level logits",
        )
