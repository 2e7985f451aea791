"""The partial directory of an earlier run: which of its files still count, and which must be removed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath

from ckptkit.io.journal import Finished
from ckptkit.io.plan import OutputFile, Plan, source_files
from ckptkit.io.present import holds_file


def still_finished(
    plan: Plan, directory: Path, recorded: Mapping[str, Finished], touched: Collection[str]
) -> list[Finished]:
    """Files that an earlier run of this plan finished and that have not changed since.

    Size, times, inode and sampled bytes show that. Where only times or inode differ, all bytes are compared with the
    sources: some file systems have older times after a crash of the machine, and a copied directory has new ones.

    Args:
        plan: The plan.
        directory: The folder of the files; it holds no links.
        recorded: Path -> entry in the journal.
        touched: Sources whose files are all written again.

    Raises:
        InputError: A source is gone or ends early.
        StorageError: A file cannot be read.
    """
    found: list[Finished] = []
    for file in plan.files:
        before = recorded.get(file.path)
        if before is None or before.size != file.size or not (directory / file.path).is_file():
            continue
        if touched and not source_files(segment.tensor for segment in file.segments).isdisjoint(touched):
            continue
        now = Finished.of(directory, file.path, before.sha256)
        if now == before or _is_whole(file, now, before, directory):
            found.append(now)
    return found


def _is_whole(file: OutputFile, now: Finished, before: Finished, directory: Path) -> bool:
    return (now.size, now.sample) == (before.size, before.sample) and holds_file(file, directory / file.path)


def strangers(directory: Path, expected: Collection[str]) -> Iterator[Path]:
    """Unexpected entries below a directory: other files, links, and folders without expected files.

    Args:
        directory: The directory.
        expected: Paths relative to it, with forward slashes.

    Raises:
        OSError: It cannot be looked at.
    """
    folders = {parent.as_posix() for name in expected for parent in PurePosixPath(name).parents}
    pending = [directory]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                name = Path(entry.path).relative_to(directory).as_posix()
                if entry.is_dir(follow_symlinks=False) and name in folders:
                    pending.append(Path(entry.path))
                elif not (entry.is_file(follow_symlinks=False) and name in expected):
                    yield Path(entry.path)


def remove_strangers(directory: Path, expected: Collection[str]) -> None:
    """Removes the entries that `strangers` finds. Of a link, only the link is removed.

    Raises:
        OSError: Something cannot be removed.
    """
    for path in list(strangers(directory, expected)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
