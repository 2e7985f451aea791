"""What a store says of its files, checked: names become names on this disk, and sizes become sizes of files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath
from typing import Protocol

from ckptkit.errors import InputError
from ckptkit.io.stores.address import Address
from ckptkit.printable import printable

MOST_OBJECTS = 100_000
LARGEST_OBJECT = 1 << 44
"""Bytes: more than any store or file system has in one file."""
_LONGEST_PART = 255
"""Bytes of a name without slashes, on the usual file systems."""


@dataclass(frozen=True, slots=True)
class Object:
    """A file in a store.

    Attributes:
        name: Its name inside the folder, with `/` between the parts.
        size: Bytes.
        etag: What the store calls this version of its content; empty where it does not say.
        modified: Time of the last change, nanoseconds; 0 where the store does not say.
    """

    name: str
    size: int
    etag: str
    modified: int

    @property
    def version(self) -> tuple[int, int, int]:
        """What tells it from other contents of the same name: size, time, and the ETag as a number."""
        return self.size, self.modified, int.from_bytes(hashlib.sha256(self.etag.encode()).digest()[:6])


class Store(Protocol):
    """One folder of a store, for reading. Its methods may be called from any thread."""

    address: Address

    def list(self) -> list[Object]:
        """All files of the folder as they are now.

        Raises:
            InputError: There is no such folder, or it holds what cannot be a checkpoint.
            StorageError: The store does not answer, or not with this.
        """

    def read(self, file: Object, start: int, view: memoryview) -> int:
        """Fills `view` with the bytes of this version of a file from `start` on.

        Returns:
            The requests that it took.

        Raises:
            InputError: The file is gone, or has changed.
            StorageError: The store does not answer, or not with this.
        """


def nanoseconds(when: datetime | None) -> int:
    """A time as nanoseconds; 0 for none."""
    return 0 if when is None else int(when.timestamp()) * 10**9


def checked(found: Iterable[Object], where: Address) -> list[Object]:
    """The files of a listing, by name. Markers of folders, which hold no bytes, are left out.

    Raises:
        InputError: A name could lead out of the folder or cannot be one on a disk, two are the same, one is a file and
            a folder, a size cannot be one, or there are too many.
    """
    files: dict[str, Object] = {}
    for item in found:
        if item.name.endswith("/") or not item.name:
            if item.size:
                raise _odd(item.name, "a folder with bytes of its own", where)
            continue
        if (reason := _reason_against(item.name)) is not None:
            raise _odd(item.name, reason, where)
        if item.name in files:
            raise _odd(item.name, "listed twice", where)
        if not 0 <= item.size <= LARGEST_OBJECT:
            raise _odd(item.name, f"of {item.size} bytes, which no file has", where)
        files[item.name] = item
        if len(files) > MOST_OBJECTS:
            hint = "name the folder of one checkpoint"
            raise InputError(f"more than {MOST_OBJECTS:,} files are below it", where=where, hint=hint)
    folders = {parent.as_posix() for name in files for parent in PurePosixPath(name).parents}
    for name in sorted(folders & files.keys()):
        if files[name].size:
            raise _odd(name, "a file and a folder", where)
        del files[name]
    return [files[name] for name in sorted(files)]


def _reason_against(name: str) -> str | None:
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "no name of a file in the folder"
    if "\\" in name or not name.isprintable():
        return "a name with characters that are refused"
    try:
        too_long = any(len(part.encode()) > _LONGEST_PART for part in parts)
    except UnicodeEncodeError:
        return "a name that is no text"
    return "too long for a file's name" if too_long else None


def _odd(name: str, what: str, where: Address) -> InputError:
    hint = "rename or remove it in the store"
    return InputError(f"the store lists {printable(repr(name[:80]))}, {what}", where=where, hint=hint)
