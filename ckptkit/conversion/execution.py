"""Carries a plan out and sums it up."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.errors import StorageError
from ckptkit.formats.garbage import collection_paused
from ckptkit.io.plan import Plan
from ckptkit.io.stores.address import is_address, parse, refuse_address
from ckptkit.io.stores.mirror import shown
from ckptkit.io.world import ALONE, World
from ckptkit.steps import Tell, nobody

if TYPE_CHECKING:
    from ckptkit.io.commit import Destination
    from ckptkit.io.stores.destination import StoreDestination
    from ckptkit.io.team import Outcome
READ_BACK = "what is written is read back before it counts"
"""Why a command needs a directory."""
SCHEMA = 1
"""Version of the JSON; it rises when a field goes away or changes its meaning."""


@dataclass(frozen=True)
class Execution:
    """How a plan is carried out. Everything that writes a checkpoint takes these by name.

    Attributes:
        dry_run: Plan only; nothing is written.
        overwrite: Replace an existing destination, atomically.
        resume: Continue a killed run from its partial directory.
        threads: Threads that move bytes; None for one per core, at least 4 and at most 8.
        hash: Also compute the SHA-256 of every output file.
        progress: Called with (bytes done, bytes in all).
        tell: Told what is computed before bytes move, where that takes long.
        world: The processes that carry the plan out, each with the same arguments; this one alone by default.
    """

    dry_run: bool = False
    overwrite: bool = False
    resume: bool = False
    threads: int | None = None
    hash: bool = False
    progress: Callable[[int, int], None] | None = None
    tell: Tell = nobody
    world: World = ALONE


class How(TypedDict, total=False):
    """The names and types of an `Execution`, for functions that take them as `**how: Unpack[How]`."""

    dry_run: bool
    overwrite: bool
    resume: bool
    threads: int | None
    hash: bool
    progress: Callable[[int, int], None] | None
    tell: Tell
    world: World


@dataclass(frozen=True)
class ConversionResult:
    """The outcome of a conversion, or with `dry_run` its plan. Sizes in bytes, time in seconds.

    `lossy` holds sentences about the losses that the user asked for (casts, a head or towers left out). `dropped` lists
    parts of Megatron tensors that the model does not use and the output does not hold, one record for each kind:
    `what`, `parts`, `elements`, and the largest difference from the values that a conversion to Megatron puts there
    (`max_abs_difference`, with the tensor in `where`). A dry run reads no weights, so its difference is None.
    `disk_free` is None where the destination is in a store, which has no limit.
    `ranks` has a record for each process that moved bytes: `rank`, `host`, `bytes_written` as its engine counted them,
    and `seconds`. It is empty after a dry run, on ranks after the first, and where the output was complete already.
    `seconds` is the time of the whole command; `seconds_fitting` is the part of it in which an adapter was fitted.
    With `--quantise like:REFERENCE`, `likeness` counts the tensors that are what the reference holds (`same`), and
    lists those that its scales still represent without loss (`old_scales`) and those with new scales (`new_scales`):
    `tensor`, `max_abs_difference` from the reference's numbers, and `relative_rms`. With `--quantise original` the last
    two are None where the sidecar has no codes. A dry run has None in place of it all.
    """

    source: dict[str, Any]
    target: dict[str, Any]
    files: list[dict[str, Any]]
    bytes_total: int
    bytes_through: int
    bytes_rearranged: int
    memory_needed: int
    disk_needed: int
    disk_free: int | None
    coverage: dict[str, int]
    lossy: list[str]
    notes: list[str]
    dropped: list[dict[str, Any]]
    dry_run: bool
    seconds: float
    hashes: dict[str, str]
    seconds_fitting: float = 0.0
    ranks: list[dict[str, Any]] = field(default_factory=list)
    likeness: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {"schema": SCHEMA, **asdict(self)}


def carry_out(
    plan: Plan,
    sources: Sequence[Checkpoint],
    source_facts: dict[str, Any],
    target_facts: dict[str, Any],
    execution: Execution,
    started: float,
    fitting: float = 0.0,
    *,
    also: Sequence[Path] = (),
    check: Callable[[Path], None] | None = None,
) -> ConversionResult:
    """Carries a plan out and sums it up. A dry run only sums it up.

    Args:
        plan: The plan.
        sources: The checkpoints that the plan reads; the destination must not overlap them.
        source_facts: `source` of the result.
        target_facts: `target` of the result; its `path` is the destination.
        execution: How to do it.
        started: When the whole command started, as `time.monotonic` gives it.
        fitting: Seconds since then in which nothing but an adapter was computed.
        also: Further folders that the plan reads.
        check: Called with the directory of the finished files before they are committed; an error stops that. A store
            shows no file before all are committed, so there a command that checks is refused.

    Raises:
        UsageError: The destination is in use, or overlaps a source.
        InputError: A source is gone, damaged or changed, or two tensors that must be equal differ.
        StorageError: The destination cannot be written.
    """
    # Imported here because they import NumPy: header-only commands start faster without it.
    with collection_paused():
        from ckptkit.io.commit import take_part
        from ckptkit.io.computed import MEMORY, holds_computed
        from ckptkit.io.drift import summarise
        from ckptkit.io.engine import MEMORY_LIMIT
        from ckptkit.io.quantised import compared_with_reference
        from ckptkit.io.team import Outcome

    world = execution.world
    dropped: list[dict[str, object]] | None = None
    likeness: dict[str, Any] | None = None
    outcome = Outcome()
    free: int | None = 0
    memory = MEMORY_LIMIT + (MEMORY if holds_computed(plan) else 0)
    said: Sequence[str] = ()

    def before_commit(directory: Path | None) -> None:
        nonlocal dropped, likeness
        dropped = summarise(plan.dropped, measure=True)
        likeness = compared_with_reference(plan.likenesses, execution.threads) if plan.likenesses else None
        if check is not None and directory is not None:
            check(directory)

    try:
        if is_address(target_facts["path"]):
            if check is not None:
                refuse_address(target_facts["path"], READ_BACK)
            target_facts = {**target_facts, "path": str(parse(target_facts["path"]))}
            free = None
            written = _in_store(plan, sources, target_facts["path"], execution, also, partial(before_commit, None))
            outcome, memory, said = written.outcome, memory + written.memory, written.notes
        elif not world.first and not execution.dry_run:
            seen = [checkpoint.seen for checkpoint in sources]
            take_part(target_facts["path"], plan, world, seen=seen, threads=execution.threads, hash=execution.hash)
        else:
            destination = _destination(plan, sources, target_facts["path"], execution, also)
            free = destination.free
            if not execution.dry_run:
                outcome = destination.write(
                    threads=execution.threads,
                    hash=execution.hash,
                    progress=execution.progress,
                    check=before_commit,
                    world=world,
                )
    except StorageError as error:
        if not execution.dry_run:
            raise
        plan, free = replace(plan, notes=(*plan.notes, f"it could not be written here: {error}")), 0
    if dropped is None:
        dropped = summarise(plan.dropped, measure=world.first and not execution.dry_run)
    through, rearranged = plan.traffic()
    return ConversionResult(
        source=source_facts,
        target=target_facts,
        files=[{"path": file.path, "bytes": file.size, "tensors": file.tensors} for file in plan.files],
        bytes_total=plan.nbytes,
        bytes_through=through,
        bytes_rearranged=rearranged,
        memory_needed=memory,
        disk_needed=plan.nbytes,
        disk_free=free,
        coverage=dict(plan.coverage),
        lossy=list(plan.lossy),
        notes=[*(shown(note) for note in plan.notes), *said],
        dropped=dropped,
        dry_run=execution.dry_run,
        seconds=time.monotonic() - started,
        hashes=outcome.hashes,
        seconds_fitting=fitting,
        ranks=[asdict(rank) for rank in outcome.ranks],
        likeness=likeness,
    )


@collection_paused()
def _destination(
    plan: Plan, sources: Sequence[Checkpoint], out: str | Path, execution: Execution, also: Sequence[Path] = ()
) -> Destination:
    from ckptkit.io.commit import Destination

    return Destination(
        out,
        plan,
        sources=[*(folder for item in sources for folder in (item.path, *item.seen.folders)), *also],
        seen=[checkpoint.seen for checkpoint in sources],
        overwrite=execution.overwrite,
        resume=execution.resume or execution.world.restarted,
    )


@dataclass(frozen=True)
class _Written:
    """What was written to a store: by whom, the memory for its parts, and sentences for the user."""

    outcome: Outcome
    memory: int = 0
    notes: Sequence[str] = ()


def _in_store(
    plan: Plan,
    sources: Sequence[Checkpoint],
    out: str,
    execution: Execution,
    also: Sequence[str | Path],
    check: Callable[[], None],
) -> _Written:
    """Carries a plan out in a store; a dry run only checks the place."""
    from ckptkit.io.stores.team import take_part
    from ckptkit.io.team import Outcome

    world = execution.world
    if not world.first and not execution.dry_run:
        seen = [checkpoint.seen for checkpoint in sources]
        take_part(parse(out), plan, world, seen=seen, threads=execution.threads, hash=execution.hash)
        return _Written(Outcome())
    store = _store_destination(plan, sources, out, execution, also)
    if execution.dry_run:
        return _Written(Outcome(), store.memory)
    outcome = store.write(
        threads=execution.threads, hash=execution.hash, progress=execution.progress, check=check, world=world
    )
    return _Written(outcome, store.memory, store.notes)


@collection_paused()
def _store_destination(
    plan: Plan, sources: Sequence[Checkpoint], out: str, execution: Execution, also: Sequence[str | Path] = ()
) -> StoreDestination:
    """The destination in a store; `also` names further sources, some of them perhaps in a store, too."""
    from ckptkit.io.stores.destination import StoreDestination

    return StoreDestination(
        parse(out),
        plan,
        sources=[*(folder for item in sources for folder in (item.path, *item.seen.folders)), *also],
        seen=[checkpoint.seen for checkpoint in sources],
        overwrite=execution.overwrite,
        resume=execution.resume or execution.world.restarted,
    )


def check_destination(plan: Plan, sources: Sequence[Checkpoint], out: str | Path, execution: Execution) -> None:
    """Checks the destination early, before long work that only decides the values to write (the fit of an adapter).

    No-op for dry runs, for `resume`, which already owns its directory, and on ranks after the first. Arguments as for
    `carry_out`.

    Raises:
        UsageError: The destination is in use, or overlaps a source.
        StorageError: The destination cannot be written, or has no room.
    """
    if not (execution.dry_run or execution.resume or execution.world.restarted) and execution.world.first:
        if is_address(out):
            _store_destination(plan, sources, str(out), execution)
            return
        _destination(plan, sources, out, execution)  # its constructor checks the place and the free space
