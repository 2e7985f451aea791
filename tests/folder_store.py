"""A store whose files are those of a folder of this disk: quick, and it notes what is asked of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from ckptkit.io.stores.address import Address
from ckptkit.io.stores.mirror import Mirror
from ckptkit.io.stores.objects import Object, Store, checked

Fetched = list[tuple[str, int, int]]


class FolderStore:
    """A store."""

    def __init__(self, address: Address, folder: Path) -> None:
        self.address = address
        self.folder = folder

    def list(self) -> list[Object]:
        files = [file for file in self.folder.rglob("*") if file.is_file()]
        return checked([self._object(file) for file in files], self.address)

    def read(self, file: Object, start: int, view: memoryview) -> int:
        with open(self.folder / file.name, "rb") as opened:
            opened.seek(start)
            assert opened.readinto(view) == len(view)
        return 1

    def _object(self, file: Path) -> Object:
        data = file.read_bytes()
        name = file.relative_to(self.folder).as_posix()
        return Object(name, len(data), f'"{hashlib.sha256(data).hexdigest()[:32]}"', 10**18)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], str]:
    """Has `s3://folder/...` be folders of this disk; gives a function from a folder to its address."""

    def store_at(address: Address) -> Store:
        return FolderStore(address, Path("/", address.prefix))

    monkeypatch.setattr("ckptkit.formats.stores.store_at", store_at)
    return lambda folder: f"s3://folder/{folder.as_posix().strip('/')}"


def note_fetched(monkeypatch: pytest.MonkeyPatch) -> Fetched:
    """Has every range that is fetched noted in the list that it gives: file, first byte, end."""
    found: Fetched = []
    read = Mirror.read

    def noted(self: Mirror, file: Object, start: int, view: memoryview) -> None:
        found.append((f"{self.root}/{file.name}", start, start + len(view)))
        read(self, file, start, view)

    monkeypatch.setattr(Mirror, "read", noted)
    return found


def none_twice(fetched: Fetched) -> bool:
    """Whether no byte of a file was fetched twice."""
    return all(one[0] != other[0] or one[2] <= other[1] for one, other in pairwise(sorted(fetched)))
