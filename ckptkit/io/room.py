"""Whether a file system has room: blocks, which files use whole, and entries, of which there may be none left."""

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
    """What a file system has for a run.

    Attributes:
        nbytes: Free bytes.
        entries: Free entries for files and folders.
        block: Bytes that a file uses at least, and in multiples of which it grows.
        counts_bytes: Whether it says how many bytes are free; some network file systems do not.
        counts_entries: Whether it says how many entries are free; where they grow on demand, it does not.
    """

    nbytes: int
    entries: int
    block: int
    counts_bytes: bool
    counts_entries: bool

    @classmethod
    def of(cls, folder: Path, reused: Path) -> Room:
        """The room in the file system of a folder.

        Args:
            folder: A folder of it.
            reused: What an earlier run left there, which is used again or removed.

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
    """How many files and folders there are to be made for an output."""
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
