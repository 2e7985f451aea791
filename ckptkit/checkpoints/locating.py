"""Finds the checkpoint in a folder: in a root with iterations, one iteration, or the folders of a trainer."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.formats.dcp.reading import METADATA
from ckptkit.formats.foreign import refuse_foreign_names
from ckptkit.formats.hf import HF, has_shards, is_weights
from ckptkit.formats.links import check_link, check_links
from ckptkit.formats.peft import is_peft
from ckptkit.formats.registry import format_of, formats_of, is_huggingface
from ckptkit.formats.sidecar import FOLDER
from ckptkit.formats.torch_dist import CONFIG, TORCH_DIST, holds_model
from ckptkit.formats.torch_legacy import TRACKER, has_iterations, iteration_folder, iterations
from ckptkit.io.stores.opening import must_be_on_disk


@dataclass(frozen=True)
class Place:
    """The folders of a checkpoint.

    Attributes:
        folder: The folder with the weights.
        root: The folder with the sidecar and the tracker file: `folder` itself, or its parent.
        reference: A Hugging Face directory that its writer put beside the weights, or None.
        notes: What there is beside it and is not read.
    """

    folder: Path
    root: Path
    reference: Path | None = None
    notes: tuple[str, ...] = ()


def find_place(path: Path, iteration: int | None = None, *, referenced: bool = False) -> Place:
    """Finds the checkpoint in a directory.

    Args:
        path: A Hugging Face or packed directory; the root of a Megatron checkpoint, or one iteration of it; the root of
            a verl run, a `global_step_N` of it, or its `actor` folder; likewise of NeMo-RL (`step_N`, `policy`) and
            NeMo 2 (`weights` beside `context`).
        iteration: Number of the iteration, if `path` is a root.
        referenced: Whether the user names a Hugging Face directory that describes the model: then the weights are those
            beside it.

    Raises:
        InputError: There is no such directory, the tracker file names an iteration that is not there, or a link leads
            out of the checkpoint.
        UnsupportedError: The save of the iteration never finished.
        UsageError: There is no such iteration, or there are several iterations or sets of weights and nothing says
            which.
    """
    if not path.is_dir():
        raise _no_directory(path)
    if is_peft(path):
        if iteration is not None:
            raise UsageError("--iteration is about the root of a Megatron checkpoint", where=path, hint="drop it")
        check_links(path, path)
        described = (path / "config.json").is_file()
        return _alone(Place(path, path, path if described and not referenced else None))
    if is_huggingface(path):
        if iteration is not None:
            raise UsageError("--iteration is about the root of a Megatron checkpoint", where=path, hint="drop it")
        check_links(path, path)
        _refuse_iterations_beside(path)
        return _alone(Place(path, path))
    check_link(path / TRACKER, path)
    folder = iteration_folder(path, iteration)
    roots = _readable_roots(path)
    check_link(folder, *roots)
    check_links(folder, *roots)
    refuse_unfinished(folder)
    notes = _later_iterations(path, folder) if iteration is None else []
    folder, more = _inner(folder)
    place = _place_in(folder, path, referenced)
    if place.reference is not None:
        check_link(place.reference, *roots, place.root)
    sidecar = place.root / FOLDER
    check_link(sidecar, *roots)
    if sidecar.is_dir():
        check_links(sidecar, *roots)
    return _alone(replace(place, notes=(*notes, *more)))


def _no_directory(path: Path) -> InputError:
    if not path.exists():
        must_be_on_disk(path)
        return InputError("no such directory", where=path)
    refuse_foreign_names([path.name], path)
    hint = "give the folder that it is in" if is_weights(path.name) else None
    return InputError("not a directory", where=path, hint=hint)


def _place_in(folder: Path, path: Path, referenced: bool) -> Place:
    """Where the checkpoint is in the folder of one iteration, which was found in `path` or is `path` itself."""
    if (found := _of_verl(folder, referenced)) is not None:
        return found
    format = format_of(folder)
    if format is not None and format.bare:
        return _of_state(folder)
    if folder != path:
        root = path if folder.parent == path else folder
    else:
        root = path if (path / FOLDER).is_dir() else _around(path, FOLDER)
    return _with_reference(Place(folder, root))


def _with_reference(place: Place) -> Place:
    """A place with the config.json that a trainer put into the root, or into a `huggingface` beside the weights."""
    if (place.root / FOLDER).is_dir() or is_huggingface(place.folder):
        return place
    around = _around(place.folder, "huggingface")
    references = [(around / "huggingface", around)]
    if has_iterations(place.root):
        references.append((place.root, place.root))
    found = next(((path, root) for path, root in references if (path / "config.json").is_file()), None)
    return place if found is None else Place(place.folder, found[1], found[0])


def _inner(folder: Path) -> tuple[Path, list[str]]:
    """The model in the folder of one iteration, where trainers keep several or put more around it; and notes."""
    notes = []
    for name, other in (("actor", "critic"), ("policy", "value")):
        if (folder / name).is_dir():
            if (folder / other).is_dir():
                notes.append(f"{other}/ is another model beside {name}/, and is not read (give its path for that)")
            folder = folder / name
    weights = folder / "weights"
    if weights.is_dir() and format_of(folder) is None and (folder.name == "policy" or (folder / "context").is_dir()):
        folder = iteration_folder(weights)
        refuse_unfinished(folder)
        if format_of(folder) is None and format_of(folder / "model") is not None:
            folder = folder / "model"
    return folder, notes


def _alone(place: Place) -> Place:
    """A place whose folder has weights of one format.

    Raises:
        UsageError: It has those of several.
    """
    found = formats_of(place.folder)
    if len(found) > 1:
        names = " and ".join(format.name for format in found)
        raise UsageError(
            f"two sets of weights in one folder, of the formats {names}",
            where=place.folder,
            hint="move the one that is not wanted out of it",
        )
    return place


def _refuse_iterations_beside(path: Path) -> None:
    """Refuses a Hugging Face directory that is the root of a Megatron checkpoint, too.

    Raises:
        UsageError: It is.
    """
    inside = [folder for folder in iterations(path) if format_of(folder) is not None]
    inside += [path / name for name in ("dist_ckpt", "huggingface") if _holds_weights(path / name)]
    if inside and has_shards(path):
        raise _two_sets(path, path, inside[-1], f"give {inside[-1]} to take that, else move it out of the folder")


def _two_sets(where: Path, one: Path, other: Path, hint: str) -> UsageError:
    names = ["the folder itself" if folder == where else f"{folder.relative_to(where)}/" for folder in (one, other)]
    return UsageError(f"two sets of weights, in {' and in '.join(names)}", where=where, hint=hint)


def _later_iterations(path: Path, chosen: Path) -> list[str]:
    """A note about iterations behind the one that the tracker file names."""
    if chosen == path or not (path / TRACKER).is_file():
        return []
    there = iterations(path)
    later = [folder.name for folder in there[there.index(chosen) + 1 :]] if chosen in there else []
    return [f"{TRACKER} names {chosen.name}; {', '.join(later[-3:])} is later, and is not read"] if later else []


def refuse_unfinished(folder: Path) -> None:
    """Refuses an iteration whose distributed save began and never ended: `.metadata` comes last, then the tracker.

    Raises:
        UnsupportedError: It is such a one.
    """
    parts = any(item.name.endswith(".distcp") for item in folder.iterdir())
    if not parts or (folder / METADATA).exists() or folder not in iterations(folder.parent):
        return
    root = folder.parent
    tracked = iteration_folder(root) == folder if (root / TRACKER).is_file() else (folder / CONFIG).exists()
    if tracked:
        return  # damaged: its reader says how
    done = [other for other in iterations(root) if other != folder and format_of(other) is not None]
    last = f"{done[-1].name} is the last that did" if done else "no other did"
    hint = f"give {done[-1]}" if done else "let the run save once more"
    raise UnsupportedError(f"this save never finished; {last}", where=folder, hint=hint)


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


def _of_verl(actor: Path, referenced: bool) -> Place | None:
    """The folder of a model that verl trained: config and tokenizer in `huggingface/`, weights there or beside it.

    Since its layout 2 both are inside `model/`, apart from the optimizer. A run with mbridge keeps the weights in
    `huggingface/` and only the optimizer in `dist_ckpt/`; FSDP keeps shards beside `huggingface/`.
    Source: `megatron_checkpoint_manager.py` and `fsdp_checkpoint_manager.py` of verl.

    Raises:
        UsageError: There are weights in several places, and nothing says which count.
    """
    around = (actor / "model", actor)
    references = [folder / "huggingface" for folder in around if (folder / "huggingface" / "config.json").is_file()]
    if not references:
        return None
    reference = references[0]
    whole = [folder for folder in references if has_shards(folder)]
    shards = [inner for folder in around for inner in (folder / "dist_ckpt", folder) if _holds_weights(inner)]
    found = [*shards, *whole]
    if len(found) > 1 and not (referenced and len(shards) == 1):
        hint = f"give {' or '.join(str(folder) for folder in found if folder != actor)} to take that"
        if len(shards) == 1:
            hint += f", or --hf-reference {reference} to take {shards[0]}"
        raise _two_sets(actor, found[0], found[1], hint)
    if not shards and whole:
        return Place(whole[0], whole[0])
    return Place(shards[0] if shards else reference.parent, reference.parent, reference)


def _holds_weights(folder: Path) -> bool:
    """Whether weights of a model are in a folder, and not those of an optimizer alone."""
    format = format_of(folder) if folder.is_dir() else None
    if format is None or format is HF:
        return format is not None and has_shards(folder)
    return format is not TORCH_DIST or holds_model(folder)
