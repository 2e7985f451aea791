"""Carries a plan out and sums it up."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.conversion.options import ConversionResult, Execution
from ckptkit.errors import StorageError
from ckptkit.io.plan import Plan

if TYPE_CHECKING:
    from ckptkit.io.commit import Destination


def carry_out(
    plan: Plan,
    read: Sequence[Checkpoint],
    source: dict[str, Any],
    target: dict[str, Any],
    how: Execution,
    started: float,
) -> ConversionResult:
    """Writes what a plan says and sums it up; a dry run only sums it up.

    Args:
        plan: What to write.
        read: What the plan was made from; the destination must not overlap it.
        source: Facts about what is read, for the result.
        target: The same about what is written; `path` is the destination.
        how: How to do it.
        started: When the whole command started, as `time.monotonic` gives it.

    Raises:
        UsageError: The destination is in use, or overlaps a source.
        InputError: A source is gone, damaged or changed, or two tensors that must be equal differ.
        StorageError: The destination cannot be written.
    """
    # With NumPy, which commands that look at headers do not wait for.
    from ckptkit.io.drift import summarise
    from ckptkit.io.engine import MEMORY_LIMIT

    dropped = summarise(plan.dropped, measure=not how.dry_run)
    hashes: dict[str, str] = {}
    try:
        destination = _destination(plan, read, Path(target["path"]), how)
        free = destination.free
        if not how.dry_run:
            hashes = destination.write(threads=how.threads, hash=how.hash, progress=how.progress)
    except StorageError as error:
        if not how.dry_run:
            raise
        plan, free = replace(plan, notes=(*plan.notes, f"it could not be written here: {error}")), 0
    through, rearranged = plan.traffic()
    return ConversionResult(
        source=source,
        target=target,
        files=[{"path": file.path, "bytes": file.size, "tensors": file.tensors} for file in plan.files],
        bytes_total=plan.nbytes,
        bytes_through=through,
        bytes_rearranged=rearranged,
        memory_needed=MEMORY_LIMIT,
        disk_needed=plan.nbytes,
        disk_free=free,
        coverage=dict(plan.coverage),
        lossy=list(plan.lossy),
        notes=list(plan.notes),
        dropped=dropped,
        dry_run=how.dry_run,
        seconds=time.monotonic() - started,
        hashes=hashes,
    )


def _destination(plan: Plan, read: Sequence[Checkpoint], out: Path, how: Execution) -> Destination:
    from ckptkit.io.commit import Destination

    return Destination(
        out,
        plan,
        sources=[folder for checkpoint in read for folder in (checkpoint.path, *checkpoint.seen.folders)],
        seen=[checkpoint.seen for checkpoint in read],
        overwrite=how.overwrite,
        resume=how.resume,
    )


def check_destination(plan: Plan, read: Sequence[Checkpoint], out: str | Path, how: Execution) -> None:
    """Whether a plan could be carried out, asked before work that only changes which bytes it has; as `carry_out`.

    A dry run asks nothing here, and what goes on from an earlier run has a place already.

    Raises:
        UsageError: The destination is in use, or overlaps a source.
        StorageError: The destination cannot be written, or has no room.
    """
    if not (how.dry_run or how.resume):
        _destination(plan, read, Path(out), how)  # which looks at the place and the room
