"""`delta.json`: which tensors a delta is about, how each is written down, and the hashes of both sides.

It holds no path, time or number of threads: the same two models give the same bytes, in whatever formats they lie.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ckptkit.dtypes import DTYPES
from ckptkit.errors import InputError, UnsupportedError
from ckptkit.formats.json_files import read_json
from ckptkit.io.hashes import TensorHash, hash_of_model
from ckptkit.tensors import MAX_AXES
from ckptkit.version import __version__

MANIFEST = "delta.json"
SCHEMA = 1

UNCHANGED, CHANGED, WHOLE, ADDED, REMOVED = CODINGS = ("unchanged", "changed", "whole", "added", "removed")
"""What a delta says of a tensor: nothing is stored; its tiles are; all of it is; only NEW has it; only OLD does."""

_SIDES = {UNCHANGED: (True, False), CHANGED: (True, True), WHOLE: (True, True), ADDED: (False, True)}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LARGEST = 1 << 63


@dataclass(frozen=True)
class Change:
    """What a delta says of one tensor.

    Attributes:
        name: Hugging Face name.
        coding: One of `CODINGS`.
        old: Type, shape and hash in OLD; None if it is added.
        new: The same in NEW; None if it is removed.
    """

    name: str
    coding: str
    old: TensorHash | None
    new: TensorHash | None

    @property
    def stored(self) -> bool:
        """Whether the delta holds bytes of it."""
        return self.coding in (CHANGED, WHOLE, ADDED)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in NEW; of a removed one in OLD."""
        side = self.new or self.old
        return 0 if side is None else prod(side.shape) * DTYPES[side.dtype].itemsize


@dataclass(frozen=True)
class Manifest:
    """A delta without its bytes.

    Attributes:
        architecture: Hugging Face class name of the model.
        changes: One for each tensor, in order of their names.
        files: Names of the files with the bytes.
    """

    architecture: str
    changes: tuple[Change, ...]
    files: tuple[str, ...] = ()

    @property
    def old(self) -> str:
        """The hash of OLD, as `ckptkit hash` gives it."""
        return hash_of_model(change.old for change in self.changes if change.old is not None)

    @property
    def new(self) -> str:
        """The hash of NEW."""
        return hash_of_model(change.new for change in self.changes if change.new is not None)

    def to_json(self) -> bytes:
        """The content of `delta.json`."""
        head = {
            "schema": SCHEMA,
            "tool": f"ckptkit {__version__}",
            "architecture": self.architecture,
            "old": self.old,
            "new": self.new,
            "files": list(self.files),
        }
        lines = ",\n  ".join(json.dumps(_record(change), ensure_ascii=False) for change in self.changes)
        start = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
        return f'{start},\n "tensors": [\n  {lines}\n ]\n}}\n'.encode()


def _record(change: Change) -> dict[str, Any]:
    record: dict[str, Any] = {"name": change.name, "coding": change.coding}
    for name, side in (("old", change.old), ("new", None if change.coding == UNCHANGED else change.new)):
        if side is not None:
            record[name] = [side.dtype, list(side.shape), side.sha256]
    return record


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks `delta.json`.

    Raises:
        InputError: It is damaged, or contradicts itself.
        UnsupportedError: A newer ckptkit wrote it.
    """
    path = folder / MANIFEST
    raw = read_json(path)
    if raw.get("schema") != SCHEMA:
        what = f"schema {str(raw.get('schema'))[:40]} of deltas, this version reads {SCHEMA}"
        raise UnsupportedError(what, where=path, hint="update ckptkit")
    tensors, files, architecture = raw.get("tensors"), raw.get("files"), raw.get("architecture")
    if not isinstance(tensors, list) or not isinstance(architecture, str) or not _are_names(files):
        raise _damaged(path, "architecture, files or tensors are missing")
    changes = tuple(_change(record, path) for record in tensors)
    if [change.name for change in changes] != sorted({change.name for change in changes}):
        raise _damaged(path, "its tensors are not in order, or one is there twice")
    manifest = Manifest(architecture, changes, tuple(files or ()))
    for side in ("old", "new"):
        if raw.get(side) != getattr(manifest, side):
            raise _damaged(path, f"the hash of {side.upper()} is not that of its tensors")
    return manifest


def _change(record: Any, path: Path) -> Change:
    fields: Mapping[str, Any] = record if isinstance(record, dict) else {}
    name, coding = fields.get("name"), fields.get("coding")
    if not isinstance(name, str) or coding not in CODINGS:
        raise _damaged(path, "a tensor without a name, or of a coding that does not exist")
    old, new = (_side(name, fields.get(side), path) for side in ("old", "new"))
    if (old is not None, new is not None) != _SIDES.get(coding, (True, False)):
        raise _damaged(path, f"{name} is {coding}, and what it was or is does not fit that")
    if coding == CHANGED and old is not None and new is not None and (old.dtype, old.shape) != (new.dtype, new.shape):
        raise _damaged(path, f"{name} changes its type or shape element by element")
    return Change(name, coding, old, old if coding == UNCHANGED else new)


def _side(name: str, value: Any, path: Path) -> TensorHash | None:
    if value is None:
        return None
    match value:
        case [str() as dtype, list() as shape, str() as sha256] if (
            dtype in DTYPES
            and len(shape) <= MAX_AXES
            and all(type(size) is int and 0 <= size < _LARGEST for size in shape)
            and prod(shape) * DTYPES[dtype].itemsize < _LARGEST
            and _SHA256.fullmatch(sha256)
        ):
            return TensorHash(name, dtype, tuple(shape), sha256)
    raise _damaged(path, f"{name} is no type, shape and hash")


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _damaged(path: Path, why: str) -> InputError:
    return InputError(f"damaged: {why}", where=path, hint="fetch or make the delta again")


def file_names(count: int) -> list[str]:
    """The names of the files with the bytes of a delta."""
    if count == 1:
        return ["delta.safetensors"]
    return [f"delta-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def counted(changes: Iterable[Change]) -> dict[str, int]:
    """Coding -> number of tensors; codings that do not occur are left out."""
    found = [change.coding for change in changes]
    return {coding: found.count(coding) for coding in CODINGS if coding in found}
