"""Finds the checkpoint in a folder: in a root with iterations, one iteration, or the folders of a trainer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ckptkit.errors import InputError, UsageError
from ckptkit.formats.hf import has_shards
from ckptkit.formats.links import check_link, check_links
from ckptkit.formats.registry import format_of, is_huggingface
from ckptkit.formats.sidecar import FOLDER
from ckptkit.formats.torch_dist import TORCH_DIST, holds_model
from ckptkit.formats.torch_legacy import TORCH, TRACKER, iteration_folder
from ckptkit.formats.trainer_states.dcp import DCP


@dataclass(frozen=True)
class Place:
    """The folders of a checkpoint.

    Attributes:
        folder: The folder with the weights.
        root: The folder with the sidecar and the tracker file: `folder` itself, or its parent.
        reference: A Hugging Face directory that its writer put beside the weights, or None.
    """

    folder: Path
    root: Path
    reference: Path | None = None


def find_place(path: Path, iteration: int | None = None) -> Place:
    """Finds the checkpoint in a directory.

    Args:
        path: A Hugging Face or packed directory; the root of a Megatron checkpoint, or one iteration of it; the root of
            a verl run, a `global_step_N` of it, or its `actor` folder.
        iteration: Number of the iteration, if `path` is a root.

    Raises:
        InputError: There is no such directory, the tracker file names an iteration that is not there, or a link leads
            out of the checkpoint.
        UsageError: There is no such iteration, or there are several and nothing says which.
    """
    if not path.is_dir():
        raise InputError("no such directory" if not path.exists() else "not a directory", where=path)
    if is_huggingface(path):
        if iteration is not None:
            raise UsageError("--iteration is about the root of a Megatron checkpoint", where=path, hint="drop it")
        check_links(path, path)
        return Place(path, path)
    check_link(path / TRACKER, path)
    folder = iteration_folder(path, iteration)
    if (folder / "actor").is_dir():
        folder = folder / "actor"
    roots = _readable_roots(path)
    check_link(folder, *roots)
    check_links(folder, *roots)
    place = _place_in(folder, path)
    if place.reference is not None:
        check_link(place.reference, *roots, place.root)
    sidecar = place.root / FOLDER
    check_link(sidecar, *roots)
    if sidecar.is_dir():
        check_links(sidecar, *roots)
    return place


def _place_in(folder: Path, path: Path) -> Place:
    """Where the checkpoint is in the folder of one iteration, which was found in `path` or is `path` itself."""
    if (found := _of_verl(folder)) is not None:
        return found
    format = format_of(folder)
    if format is not None and format.bare:
        return _of_state(folder)
    if folder != path:
        return Place(folder, path)
    return Place(path, path if (path / FOLDER).is_dir() else _around(path, FOLDER))


def _readable_roots(path: Path) -> tuple[Path, ...]:
    """Where links below the folder that the user names may lead: below it, or below the root of its checkpoint."""
    around = _around(path, FOLDER)
    is_root = (around / FOLDER).is_dir() or (around / TRACKER).is_file()
    return (path, around) if is_root else (path,)


def _around(folder: Path, wanted: str) -> Path:
    """The parent directory of a folder, also if the folder is called `.` or `..`, or is a link from somewhere else.

    Args:
        folder: The folder.
        wanted: An entry that the parent should have. The parent of the link comes first, then that of its target.
    """
    named = Path(os.path.abspath(folder)) if folder.name in ("", "..") else folder
    real = folder.resolve().parent
    return real if not (named.parent / wanted).exists() and (real / wanted).exists() else named.parent


def _of_state(folder: Path) -> Place:
    """A module's state, whose config.json is in its folder or in a `huggingface` beside it, if anywhere."""
    around = _around(folder, "huggingface")
    references = [(folder, folder), (around / "huggingface", around)]
    found = next(((path, root) for path, root in references if (path / "config.json").is_file()), None)
    return Place(folder, folder) if found is None else Place(folder, found[1], found[0])


def _of_verl(actor: Path) -> Place | None:
    """The folder of a model that verl trained: config and tokenizer in `huggingface/`, weights there or beside it.

    Since its layout 2 both are inside `model/`, apart from the optimizer. A run with mbridge keeps the weights in
    `huggingface/` and only the optimizer in `dist_ckpt/`; FSDP keeps shards beside `huggingface/`.
    Source: `megatron_checkpoint_manager.py` and `fsdp_checkpoint_manager.py` of verl.
    """
    for folder in (actor / "model", actor):
        reference, weights = folder / "huggingface", _weights_of_verl(folder)
        if not (reference / "config.json").is_file():
            continue
        if has_shards(reference) and not holds_model(weights):
            return Place(reference, reference)
        return Place(weights, folder, reference)
    return None


def _weights_of_verl(folder: Path) -> Path:
    """Where Megatron's weights are (`model/mp_rank_*` until verl 0.4), or the folder itself."""
    distributed, ranks = folder / "dist_ckpt", folder / "model"
    if format_of(distributed) in (TORCH_DIST, DCP):
        return distributed
    return ranks if format_of(ranks) is TORCH else folder
