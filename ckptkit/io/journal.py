"""The journal of a run: one line per finished file, so that a killed run can be taken up again.

The first line names the plan. Each line is written and synced only after the file it speaks of is
durable. A line that a crash cut short does not count.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from ckptkit.errors import InputError
from ckptkit.io.regular import read_bounded
from ckptkit.io.system import storage_error, sync_directory, write_all

_VERSION = 1
_LARGEST, _LONGEST_LINE = 200_000_000, 1 << 16


class FileJournal:
    """A journal in a file, for `ckptkit.io.engine.run`."""

    def __init__(self, path: Path, digest: str, *, resume: bool) -> None:
        """Opens the journal, and with `resume` reads what is there.

        Args:
            path: The file; its directory exists.
            digest: Of the plan that is to be carried out.
            resume: Go on with the lines that are there.

        Raises:
            InputError: They belong to another plan.
            StorageError: The file cannot be written.
        """
        self.path = path
        self._lock = threading.Lock()
        self._finished: dict[str, str | None] = {}
        kept = self._load(digest) if resume else 0
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            os.ftruncate(self._fd, kept)
            os.lseek(self._fd, kept, os.SEEK_SET)
        except OSError as error:
            raise storage_error(error, path) from error
        if not kept:
            self._append({"ckptkit_journal": _VERSION, "plan": digest})
            sync_directory(path.parent)

    def finished(self) -> Mapping[str, str | None]:
        """Paths of finished files, with their SHA-256 if it was recorded."""
        return dict(self._finished)

    def record(self, path: str, size: int, sha256: str | None) -> None:
        """Notes that a file is durable.

        Raises:
            StorageError: The line cannot be written.
        """
        with self._lock:
            self._append({"path": path, "size": size, "sha256": sha256})
            self._finished[path] = sha256

    def close(self) -> None:
        """Closes the file; the lines stay."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _load(self, digest: str) -> int:
        """Reads whole lines and returns where they end."""
        kept = 0
        for line in self._lines():
            entry = _parse(line, first=not kept)
            if entry is None:
                break
            if not kept and entry != {"ckptkit_journal": _VERSION, "plan": digest}:
                raise InputError(
                    "what an earlier run left belongs to another conversion (the sources or options changed)",
                    where=self.path.parent,
                    hint="run without --resume to start over",
                )
            if kept:
                self._finished[str(entry["path"])] = entry["sha256"]
            kept += len(line)
        return kept

    def _lines(self) -> list[bytes]:
        try:
            return read_bounded(self.path, _LARGEST, follow=False).splitlines(keepends=True)
        except InputError as error:
            if not os.path.lexists(self.path):
                return []
            hint = "run without --resume to start over"
            raise InputError(f"not a journal ({error.what})", where=self.path, hint=hint) from None

    def _append(self, entry: Mapping[str, object]) -> None:
        data = json.dumps(entry).encode() + b"\n"
        try:
            write_all(self._fd, data, self.path)
            os.fdatasync(self._fd)
        except OSError as error:
            raise storage_error(error, self.path) from error


def _parse(line: bytes, *, first: bool) -> dict[str, str | None] | None:
    """A line, or None if it was cut short or damaged: what it and those after it speak of is written again."""
    if not line.endswith(b"\n") or len(line) > _LONGEST_LINE:
        return None
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or first:
        return entry if isinstance(entry, dict) and "plan" in entry else None
    path, sha256 = entry.get("path"), entry.get("sha256")
    sound = isinstance(path, str) and (sha256 is None or isinstance(sha256, str)) and "sha256" in entry
    return {"path": path, "sha256": sha256} if sound else None
