"""Saving together what the ranks of a program hold: an iteration is there as a whole, or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ckptkit.errors import StorageError, UsageError
from ckptkit.formats.torch_legacy import TRACKER
from ckptkit.io.system import sync_directory, sync_file
from ckptkit.verification.ranks.jobs import decode_error, encode_error

Agree = Callable[[str | None], list[tuple[int, str]]]
"""Tells every rank the problems of all: `megatron.parallel.agree`."""
FILE = "model_optim_rng.pt"


def save_iteration(
    folder: Path, iteration: int, own: str | None, content: Mapping[str, Any], *, first: bool, agree: Agree
) -> Path:
    """Writes a rank's file of an iteration as Megatron-LM's `--ckpt-format torch` does; all ranks call this.

    The files are written beside the iteration's folder, which then appears at once; the tracker comes last. What a run
    that was killed has left beside it is removed.

    Args:
        folder: The checkpoint's root, which all ranks share.
        iteration: Number of the iteration, 1 or more.
        own: Name of this rank's folder; None where another rank writes the same.
        content: What `torch.save` is given.
        first: Whether this is the rank that makes and renames folders.
        agree: Tells every rank the problems of all.

    Returns:
        The folder of the iteration.

    Raises:
        UsageError: The iteration has no number, or is there already; on every rank.
        StorageError: A rank could not write; the same error on every rank, and nothing is left.
    """
    target = folder / f"iter_{iteration:07d}"
    partial = folder / f".{target.name}.partial"

    def begin() -> None:
        if iteration < 1:
            raise UsageError(f"an iteration has a number of 1 or more, not {iteration}")
        if os.path.lexists(target):
            raise UsageError("this iteration is there already", where=target, hint="remove it, or save another number")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def write() -> None:
        if own is not None:
            _write(partial / own, content)

    def finish() -> None:
        sync_directory(partial)
        partial.rename(target)
        tracker = folder / f".{TRACKER}.partial"
        tracker.write_text(str(iteration), encoding="utf-8")
        sync_file(tracker)
        tracker.replace(folder / TRACKER)
        sync_directory(folder)

    try:
        for task in (begin if first else _nothing, write, finish if first else _nothing):
            _together(task, folder, agree)
    except BaseException:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def _nothing() -> None:
    pass


def _write(place: Path, content: Mapping[str, Any]) -> None:
    import torch

    place.mkdir()
    torch.save(dict(content), place / FILE)
    sync_file(place / FILE)
    sync_directory(place)


def _together(task: Callable[[], None], folder: Path, agree: Agree) -> None:
    """Does this rank's part, and raises on every rank what any of them met: none waits for one that gave up."""
    problem = None
    try:
        task()
    except UsageError as error:
        problem = json.dumps(encode_error(error))
    except Exception as error:  # torch.save has a RuntimeError for a full disk
        what = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        lost = StorageError(f"the weights cannot be written ({what})", where=getattr(error, "filename", None) or folder)
        problem = json.dumps(encode_error(lost))
    if problems := agree(problem):
        raise decode_error(json.loads(problems[0][1]))
