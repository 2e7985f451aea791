"""Symbolic links in a checkpoint: who made the folder must not choose what else of the machine is read.

The path that a user names may be a link, and so may everything above it. What lies below it may be a link to a place
below it, or to a blob in the cache of the Hugging Face hub, whose snapshots consist of such links.

Source of the cache's layout: "Understand caching" in the documentation of huggingface_hub.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from ckptkit.errors import InputError

CACHES = {".git", ".cache", "__pycache__"}
"""Folders that are no part of a checkpoint."""

_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def check_link(path: Path, *roots: Path) -> None:
    """Checks that a path leads, links followed, to a place below one of the roots or to a blob of the hub's cache.

    Args:
        path: The path; one that does not exist is left to whoever needs it.
        roots: Folders that may be read.

    Raises:
        InputError: It leads somewhere else, or nowhere.
    """
    if not os.path.lexists(path):
        return
    try:
        target = path.resolve(strict=True)
        places = [root.resolve(strict=True) for root in roots]
    except (OSError, RuntimeError):  # a link to nothing, or a loop
        raise InputError("a symbolic link that leads nowhere", where=path, hint="put the file itself there") from None
    if not any(target.is_relative_to(place) for place in (*places, *map(_blobs, places))) and not _is_blob(target):
        raise InputError(
            f"a symbolic link out of the folder (to {target})", where=path, hint="put the file itself there"
        )


def check_links(folder: Path, *roots: Path) -> None:
    """Checks every link below a folder as `check_link` does; folders behind links count as below it.

    Raises:
        InputError: One leads out of the roots, or nowhere.
    """
    pending, known = [folder], {os.path.realpath(folder)}
    while pending:
        for entry in _entries(pending.pop()):
            if entry.name in CACHES:
                continue
            if entry.is_symlink():
                check_link(Path(entry.path), *roots)
                if (real := os.path.realpath(entry.path)) not in known and os.path.isdir(real):
                    known.add(real)
                    pending.append(Path(real))
            elif entry.is_dir(follow_symlinks=False):
                pending.append(Path(entry.path))


def is_linked_folder(path: Path) -> bool:
    """Whether a path is a symbolic link to a folder."""
    return path.is_symlink() and path.is_dir()


def _entries(folder: Path) -> Iterable[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _blobs(root: Path) -> Path:
    """Where the links of a snapshot of the hub's cache lead; for any other folder the folder itself."""
    return root.parent.parent / "blobs" if root.parent.name == "snapshots" else root


def _is_blob(target: Path) -> bool:
    """Whether a file is a blob of the hub's cache: tools also link to those from folders elsewhere."""
    folder = target.parent
    return folder.name == "blobs" and folder.parent.name.startswith("models--") and bool(_BLOB.fullmatch(target.name))
