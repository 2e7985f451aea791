"""The journal of a run: one line per finished file, so that a killed run can be resumed.

The first line holds the digest of the plan and the fingerprints of its sources. Each further line is written and synced
only after its file is durable, and holds the facts by which a change of the file is noticed. A line that a crash cut
short does not count.
"""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptkit.errors import InputError
from ckptkit.io.regular import read_bounded
from ckptkit.io.source import MOST_SAMPLES, Fingerprint, sample_of
from ckptkit.io.system import storage_error, sync_directory, write_all

_VERSION = 2
_LARGEST, _LONGEST_LINE = 200_000_000, 1 << 16
_FIELDS = 5  # of a source: size, time and sample; inode and ctime
_START_OVER = "run without --resume to start over"


@dataclass(frozen=True)
class Finished:
    """A durable file, with facts by which later changes are noticed.

    Attributes:
        path: Relative to the output, with forward slashes.
        size: Bytes.
        sha256: SHA-256 of the whole file in hexadecimal, if requested.
        sample: SHA-256 of some of its bytes in hexadecimal.
        version: mtime, ctime (nanoseconds) and inode. A write to the file or a replacement changes them.
    """

    path: str
    size: int
    sha256: str | None
    sample: str
    version: tuple[int, int, int]

    @classmethod
    def of(cls, directory: Path, path: str, sha256: str | None) -> Finished:
        """The facts about a file below `directory`.

        Raises:
            StorageError: It cannot be read.
        """
        place = directory / path
        try:
            status = os.lstat(place)
            sample = sample_of(place, status.st_size, MOST_SAMPLES) if stat.S_ISREG(status.st_mode) else ""
        except OSError as error:
            raise storage_error(error, place) from error
        return cls(path, status.st_size, sha256, sample, (status.st_mtime_ns, status.st_ctime_ns, status.st_ino))

    def line(self) -> dict[str, object]:
        """Its line in the journal."""
        return {
            "path": self.path,
            "size": self.size,
            "sha256": self.sha256,
            "sample": self.sample,
            "version": self.version,
        }


@dataclass(frozen=True)
class Recorded:
    """The content of an earlier run's journal.

    Attributes:
        plan: The digest of its plan.
        sources: Absolute path of a source -> its `identity` and `version` (see `Fingerprint`) in one list.
        files: Path -> durable file.
    """

    plan: str
    sources: Mapping[str, list[object]]
    files: Mapping[str, Finished]

    def touched(self, digest: str, sources: Iterable[Fingerprint], where: Path) -> set[str]:
        """Sources that differ from those of the earlier run in inode or ctime only.

        Args:
            digest: Digest of the plan that is carried out.
            sources: Present fingerprints of its sources.
            where: For messages.

        Raises:
            InputError: The earlier run had another plan or other sources.
        """
        touched: set[str] = set()
        for now in sources:
            before = self.sources.get(now.path)
            if before is None or len(before) != _FIELDS:
                touched.add(now.path)  # the journal does not say
                continue
            changed = [
                what
                for what, old, new in zip(("size", "time", "content"), before, now.identity[1:], strict=False)
                if old != new
            ]
            if changed:
                what = f"its {' and '.join(changed)} changed since the run that is to be resumed"
                raise InputError(what, where=now.path, hint=_START_OVER)
            if tuple(before[3:]) != now.version:
                touched.add(now.path)
        if digest != self.plan:
            raise InputError(
                "the files of an earlier run belong to another conversion (the sources or options changed)",
                where=where,
                hint=_START_OVER,
            )
        return touched


def read_journal(path: Path) -> Recorded | None:
    """Reads a journal. None if it is empty, or cut short in its first line.

    Raises:
        InputError: Another version of ckptkit wrote it, or the file is no journal.
        StorageError: It cannot be read.
    """
    try:
        lines = read_bounded(path, _LARGEST, follow=False).splitlines(keepends=True)
    except InputError as error:
        raise InputError(f"not a journal ({error.what})", where=path, hint=_START_OVER) from None
    first = _parse(lines[0]) if lines else None
    if first is None:
        return None
    if first.get("ckptkit_journal") != _VERSION:
        raise InputError("another version of ckptkit wrote this journal", where=path, hint=_START_OVER)
    files: dict[str, Finished] = {}
    for line in lines[1:]:
        entry = _finished(_parse(line)) if len(line) <= _LONGEST_LINE else None
        if entry is None:
            break
        files[entry.path] = entry
    sources = first.get("sources")
    known = {key: value for key, value in sources.items() if isinstance(value, list)} if type(sources) is dict else {}
    return Recorded(str(first.get("plan")), known, files)


class FileJournal:
    """A journal in a file, for `ckptkit.io.engine.run`."""

    def __init__(
        self,
        path: Path,
        directory: Path,
        digest: str,
        sources: Iterable[Fingerprint] = (),
        finished: Iterable[Finished] = (),
    ) -> None:
        """Starts a journal. An existing one is replaced in one step.

        Args:
            path: The file; its directory exists.
            directory: The paths of finished files are relative to this folder.
            digest: Digest of the plan that is carried out.
            sources: Fingerprints of its sources.
            finished: Files that an earlier run of the plan finished.

        Raises:
            StorageError: The file cannot be written.
        """
        self.path = path
        self._directory = directory
        self._lock = threading.Lock()
        self._finished: dict[str, str | None] = {}
        about = {item.path: [*item.identity[1:], *item.version] for item in sources}
        new = path.with_name(f"{path.name}.new")
        try:
            self._fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise storage_error(error, new) from error
        try:
            kept = list(finished)
            self._append({"ckptkit_journal": _VERSION, "plan": digest, "sources": about}, *(f.line() for f in kept))
            os.rename(new, path)
            sync_directory(path.parent)
        except OSError as error:
            self.close()
            raise storage_error(error, path) from error
        except BaseException:
            self.close()
            raise
        self._finished.update((file.path, file.sha256) for file in kept)

    def finished(self) -> Mapping[str, str | None]:
        """Paths of finished files, with their SHA-256 if it was recorded."""
        return dict(self._finished)

    def record(self, path: str, size: int, sha256: str | None) -> None:
        """Records that a file is durable.

        Raises:
            StorageError: The file cannot be read, or the line cannot be written.
        """
        entry = Finished.of(self._directory, path, sha256)
        with self._lock:
            self._append(entry.line())
            self._finished[path] = sha256

    def close(self) -> None:
        """Closes the file; the lines stay."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _append(self, *entries: Mapping[str, object]) -> None:
        data = b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)
        try:
            write_all(self._fd, data, self.path)
            os.fdatasync(self._fd)
        except OSError as error:
            raise storage_error(error, self.path) from error


def _parse(line: bytes) -> dict[str, Any] | None:
    """The content of a line, or None if it is cut short or damaged."""
    try:
        entry = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def _finished(entry: Mapping[str, Any] | None) -> Finished | None:
    """The finished file in a line, or None if the line has another content."""
    match entry:
        case {
            "path": str() as path,
            "size": int() as size,
            "sha256": None | str() as sha256,
            "sample": str() as sample,
            "version": [int() as mtime, int() as ctime, int() as inode],
        }:
            return Finished(path, size, sha256, sample, (mtime, ctime, inode))
    return None
