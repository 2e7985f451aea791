"""How fast a folder's disk is: a file without a name is written, synced, and read again."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from ckptkit.errors import StorageError, UsageError

SIZE = 256_000_000
"""Bytes that are written by default."""
_BLOCK = 1 << 22
_SPARE = 2  # the file takes at most one part in this many of the free space


@dataclass(frozen=True)
class Disk:
    """A folder's disk.

    Attributes:
        folder: The folder.
        filesystem: Type of its file system as the kernel names it; `unknown` where it does not say.
        free: Free bytes.
        bytes: Bytes that were written and read.
        write: Bytes per second, written and synced.
        read: Bytes per second. The kernel was asked to forget the file first; a file system may not do so.
    """

    folder: str
    filesystem: str
    free: int
    bytes: int
    write: float
    read: float


def measure(folder: str | Path, size: int = SIZE) -> Disk:
    """Measures a folder's disk. The file has no name, so nothing is left even after a kill.

    Args:
        folder: A folder that exists.
        size: Bytes to write; half of the free space at most.

    Raises:
        UsageError: There is no such folder.
        StorageError: The folder cannot be written to.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UsageError("no such folder", where=folder, hint="name one that exists, where checkpoints will lie")
    free = shutil.disk_usage(path).free
    count = max(1, min(size, free // _SPARE) // _BLOCK)
    block = memoryview(bytearray(os.urandom(_BLOCK)))  # a file system that compresses gains nothing
    try:
        with tempfile.TemporaryFile(dir=path, buffering=0) as file:
            writing = time.perf_counter()
            for _ in range(count):
                file.write(block)
            os.fsync(file.fileno())
            reading = time.perf_counter()
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            start = time.perf_counter()
            while file.readinto(block):
                pass
            end = time.perf_counter()
    except OSError as error:
        raise StorageError(f"cannot be written: {error.strerror or error}", where=folder) from error
    total = count * _BLOCK
    rates = [total / max(seconds, 1e-9) for seconds in (reading - writing, end - start)]
    return Disk(str(folder), _filesystem(path), free, total, *rates)


def _filesystem(path: Path) -> str:
    """The type of the file system that a folder lies on."""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "unknown"
    mounts = {parts[1].replace("\\040", " "): parts[2] for line in lines if len(parts := line.split()) > 2}
    place = path.resolve()
    return next((mounts[str(folder)] for folder in (place, *place.parents) if str(folder) in mounts), "unknown")
