"""What a run leaves in a store, so that a killed one can be resumed: a journal, and sums of the parts that are there.

    .NAME.ckptkit-partial/
        journal.json            the plan, its sources, and the id of every multipart upload
        sums/FILE/PART-RUN.json CRC-32 sums of some parts, where a file holds checksums of its own bytes

Which parts are there is asked of the store, which knows it after any kill. Parts without sums, where these are needed,
are uploaded again.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptkit.errors import InputError
from ckptkit.io.checksums import Sum
from ckptkit.io.journal import Recorded
from ckptkit.io.plan import OutputFile
from ckptkit.io.source import Fingerprint
from ckptkit.io.stores.client import Bucket

_VERSION = 1
_LARGEST, _LARGEST_SUMS, _MOST = 128 << 20, 32 << 20, 200_000
_BATCH = 8
"""Parts whose sums go into one object: after a kill, at most so many of a file are uploaded again."""
_START_OVER = "run without --resume to start over"


@dataclass(frozen=True, slots=True)
class Begun:
    """A multipart upload of a file.

    Attributes:
        upload: Its id.
        part: Bytes of each part but the last.
    """

    upload: str
    part: int


@dataclass(frozen=True)
class StoreJournal:
    """The journal of a run.

    Attributes:
        plan: The digest of its plan.
        sources: As of `ckptkit.io.journal.Recorded`.
        uploads: Path of a file -> its upload.
        files: Paths of all files that may have an upload: one may have begun without being noted.
    """

    plan: str
    sources: Mapping[str, list[object]]
    uploads: Mapping[str, Begun] = field(default_factory=dict)
    files: Sequence[str] = ()

    @classmethod
    def of(
        cls, digest: str, sources: Iterable[Fingerprint], uploads: Mapping[str, Begun], files: Iterable[str]
    ) -> StoreJournal:
        """The journal of this run."""
        known = {item.path: [*item.identity[1:], *item.version] for item in sources}
        return cls(digest, known, uploads, tuple(files))

    def touched(self, digest: str, sources: Iterable[Fingerprint], where: str) -> set[str]:
        """As `ckptkit.io.journal.Recorded.touched`."""
        return Recorded(self.plan, self.sources, {}).touched(digest, sources, Path(where))

    def data(self) -> bytes:
        """The journal as bytes."""
        uploads = {path: [begun.upload, begun.part] for path, begun in self.uploads.items()}
        content = {"ckptkit_store_journal": _VERSION, "plan": self.plan, "sources": self.sources, "uploads": uploads}
        return json.dumps({**content, "files": list(self.files)}).encode()

    @classmethod
    def read(cls, bucket: Bucket, key: str) -> StoreJournal | None:
        """The journal of an earlier run, or None if there is none.

        Raises:
            InputError: Another version of ckptkit wrote it, or it is no journal.
            StorageError: The store does not answer.
        """
        data, where = bucket.get(key, _LARGEST), bucket.url(key)
        if data is None:
            return None
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict) and found.get("ckptkit_store_journal") not in (None, _VERSION):
            raise InputError("another version of ckptkit wrote this journal", where=where, hint=_START_OVER)
        match found:
            case {"ckptkit_store_journal": 1, "plan": str() as plan, "sources": dict() as sources, "uploads": dict()}:
                uploads = {path: _begun(item) for path, item in found["uploads"].items()}
                files = _paths(found.get("files"))
                if all(isinstance(item, list) for item in sources.values()) and None not in uploads.values():
                    return cls(plan, sources, {path: item for path, item in uploads.items() if item is not None}, files)
        raise InputError("not a journal", where=where, hint=_START_OVER)


def _paths(items: object) -> tuple[str, ...]:
    return tuple(item for item in items if isinstance(item, str)) if isinstance(items, list) else ()


def _begun(item: object) -> Begun | None:
    match item:
        case [str() as upload, int() as part] if part > 0 and type(part) is int:
            return Begun(upload, part)
    return None


class Sums:
    """The sums of uploaded parts of one file, in objects of some parts each. Any thread may add."""

    def __init__(self, bucket: Bucket, folder: str, index: int) -> None:
        """Sums below the key `folder`, of the file with this index in the plan."""
        self._bucket = bucket
        self._prefix = f"{folder}/sums/{index}/"
        self._run = os.urandom(4).hex()
        self._waiting: dict[int, Sequence[Sum]] = {}
        self._lock = threading.Lock()

    def add(self, number: int, sums: Sequence[Sum]) -> None:
        """Adds the sums of a part that is uploaded.

        Raises:
            StorageError: The store does not take them.
        """
        with self._lock:
            self._waiting[number] = sums
            if len(self._waiting) < _BATCH:
                return
            batch, self._waiting = self._waiting, {}
        data = json.dumps({str(part): [list(item) for item in found] for part, found in batch.items()}).encode()
        self._bucket.put(f"{self._prefix}{min(batch)}-{self._run}.json", data)

    def read(self, file: OutputFile, size: int) -> dict[int, list[Sum]]:
        """The sums that earlier runs left, by part; what cannot be is left out.

        Args:
            file: The file.
            size: Bytes of each part but the last.

        Raises:
            StorageError: The store does not answer.
        """
        found: dict[int, list[Sum]] = {}
        for stored in self._bucket.objects(self._prefix, _MOST):
            try:
                content: Any = json.loads(self._bucket.get(stored.key, _LARGEST_SUMS) or b"{}")
                items = {int(number): [Sum(*item) for item in sums] for number, sums in content.items()}
            except (ValueError, TypeError, AttributeError, RecursionError):
                continue
            found.update((number, sums) for number, sums in items.items() if _fit(file, number, size, sums))
        return found


def _fit(file: OutputFile, number: int, size: int, sums: Sequence[Sum]) -> bool:
    """Whether sums cover just what the checksums of a file cover of a part."""
    start, stop = (number - 1) * size, min(number * size, file.size)
    if number < 1 or start >= stop or any(type(value) is not int for item in sums for value in item):
        return False
    said = sorted((item.number, item.start, item.size) for item in sums)
    wanted = [
        (index, max(start, one.start), min(stop, one.stop) - max(start, one.start))
        for index, one in enumerate(file.checksums)
        if max(start, one.start) < min(stop, one.stop)
    ]
    return said == wanted and all(0 <= item.crc < 1 << 32 for item in sums)
