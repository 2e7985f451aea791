"""`watch.json`: what was made of each iteration. It is written in one step, after each change."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ckptkit.errors import InputError, StorageError, UsageError
from ckptkit.formats.json_files import read_json
from ckptkit.io.system import sync_file, write_text

NAME, LOCK = "watch.json", ".watch.lock"
SCHEMA = 1
CONVERTED, SAME, DIFFERS, FAILED, REMOVED, SKIPPED = STATES = (
    *("converted", "same", "differs", "failed", "removed", "skipped"),
)
"""What an iteration is: converted and not verified (yet); verified; could not be converted or verified; removed again
because newer ones are there; left out for the same reason, or because the trainer removed it first."""


@dataclass(frozen=True)
class Entry:
    """What was made of an iteration.

    Attributes:
        state: One of `STATES`.
        folder: Its folder in OUT.
        said: What there is to say: the size, the verdict, or the error.
        when: When that was, ISO 8601 in UTC.
        code: The exit code that it stands for.
    """

    state: str
    folder: str
    said: str
    when: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    code: int = 0


class Record:
    """The iterations of a run that were dealt with.

    Args:
        out: The folder with the outputs.
        settings: What the outputs are made of, and how: a record of other settings is another one.

    Raises:
        UsageError: OUT is that of other settings.
        InputError: The record is damaged.
    """

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self._path, self._settings = out / NAME, json.loads(json.dumps(settings, default=str))
        self.entries: dict[int, Entry] = {}
        if self._path.exists():
            self._read()

    def _read(self) -> None:
        found = read_json(self._path)
        if found.get("schema") != SCHEMA:
            raise InputError(f"schema {str(found.get('schema'))[:20]}, expected {SCHEMA}", where=self._path)
        if (theirs := found.get("settings")) != self._settings:
            changed = [name for name, value in self._settings.items() if (theirs or {}).get(name) != value]
            what = f"it was begun with other settings ({', '.join(changed) or 'more of them'})"
            raise UsageError(what, where=self._path, hint="choose another OUT, or the settings of the first time")
        try:
            for number, raw in found["iterations"].items():
                entry = Entry(**{one.name: raw[one.name] for one in fields(Entry)})
                if entry.state not in STATES or Path(entry.folder).name != entry.folder or entry.folder in (".", ".."):
                    raise ValueError(entry.state)
                self.entries[int(number)] = entry
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError("damaged", where=self._path, hint="remove it: what is in OUT is then looked at") from error

    def put(self, number: int, entry: Entry) -> None:
        """Records an iteration.

        Raises:
            StorageError: It cannot be written.
        """
        self.entries[number] = entry
        ordered = {str(one): asdict(self.entries[one]) for one in sorted(self.entries)}
        content = {"schema": SCHEMA, "settings": self._settings, "iterations": ordered}
        partial = self._path.with_name(f".{NAME}.partial")
        write_text(str(partial), json.dumps(content, indent=2) + "\n")
        sync_file(partial)
        partial.replace(self._path)


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Holds a folder, so that no two commands fill it.

    Raises:
        UsageError: Another command holds it.
        StorageError: It cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        fd = os.open(out / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise StorageError(f"cannot be written: {error.strerror}", where=out) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise UsageError("another ckptkit watch fills this folder", where=out, hint="choose another OUT") from None
    except OSError as error:
        os.close(fd)
        raise StorageError(f"the file system has no locks: {error.strerror}", where=out) from error
    try:
        yield
    finally:
        os.close(fd)
