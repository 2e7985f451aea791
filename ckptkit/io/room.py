"""Free space of a file system: bytes, which files use in whole blocks, and entries (inodes)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ckptkit.io.plan import OutputFile

_LARGEST_BLOCK = 1 << 16  # network file systems call the size of their messages a block


@dataclass(frozen=True)
class Room:
    """The free space of a file system.

    Attributes:
        nbytes: Free bytes.
        entries: Free entries for files and folders.
        block: Size of a block in bytes; a file uses whole blocks.
        counts_bytes: Whether `nbytes` is known; some network file systems do not report it.
        counts_entries: Whether `entries` is known; file systems that add entries on demand do not report it.
    """

    nbytes: int
    entries: int
    block: int
    counts_bytes: bool
    counts_entries: bool

    @classmethod
    def of(cls, folder: Path, reused: Path) -> Room:
        """The free space in the file system of a folder.

        Args:
            folder: A folder in it.
            reused: The partial directory of an earlier run. It counts as free: it is used again or removed.

        Raises:
            OSError: It cannot be looked at.
        """
        status = os.statvfs(folder)
        nbytes, entries = _taken(reused)
        return cls(
            status.f_bavail * status.f_frsize + nbytes,
            status.f_favail + entries,
            min(status.f_frsize or 1, _LARGEST_BLOCK),
            status.f_blocks > 0,
            status.f_files > 0,
        )

    def blocks_of(self, files: Iterable[OutputFile]) -> int:
        """Bytes that files use, in whole blocks."""
        return sum(-(-file.size // self.block) * self.block for file in files)


def entries_of(files: Iterable[OutputFile]) -> int:
    """Number of files and folders of an output."""
    paths = [PurePosixPath(file.path) for file in files]
    return len(paths) + len({folder for path in paths for folder in path.parents})


def _taken(top: Path) -> tuple[int, int]:
    """Bytes and entries that a directory uses."""
    nbytes = entries = 0
    for directory, folders, files in os.walk(top):
        entries += len(folders) + len(files)
        for name in files:
            with suppress(FileNotFoundError):
                nbytes += os.lstat(os.path.join(directory, name)).st_blocks * 512
    return nbytes, entries
