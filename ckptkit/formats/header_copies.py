"""Copies of safetensors headers without the tensors: `SHARD.header`, which `**/*.safetensors` does not find."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ckptkit.errors import InputError
from ckptkit.formats import safetensors
from ckptkit.formats.safetensors import Header
from ckptkit.io.plan import OutputFile
from ckptkit.io.regular import read_bounded
from ckptkit.io.stores.mirror import prepare_starts

_ENDING = ".header"
INSTEAD = "pass --hf-reference instead"


def lay_out_headers(folder: str, headers: Mapping[str, Header]) -> list[OutputFile]:
    """The copies.

    Args:
        folder: Where they go.
        headers: Shard file -> header.
    """
    return [OutputFile.small(f"{folder}/{name}{_ENDING}", header.raw) for name, header in sorted(headers.items())]


def read_headers(folder: Path, *, named_as_shards: bool = False) -> dict[str, Header]:
    """Shard file -> header, of all copies below a folder; links to folders are not followed.

    Args:
        folder: The folder.
        named_as_shards: Whether each has the name of its shard alone, as old ones have.

    Raises:
        InputError: One is damaged, is no copy, or describes what another one does.
    """
    headers: dict[str, Header] = {}
    known: set[str] = set()
    files = sorted(Path(here, name) for here, _, names in os.walk(folder) for name in names)
    prepare_starts(files)
    for file in files:
        raw = read_bounded(file, safetensors.MAX_HEADER + 8)
        if len(raw) < 8 or int.from_bytes(raw[:8], "little") != len(raw) - 8:
            raise InputError("damaged header copy", where=file, hint=INSTEAD)
        name = file.relative_to(folder).as_posix()
        if not named_as_shards and not name.endswith(_ENDING):
            raise InputError(f"a header copy whose name does not end in {_ENDING}", where=file, hint="remove it")
        header = headers[name if named_as_shards else name.removesuffix(_ENDING)] = safetensors.parse_header(raw, file)
        if twice := sorted(header.entries.keys() & known):
            raise InputError(f"another header copy describes {twice[0]}, too", where=file, hint=INSTEAD)
        known |= header.entries.keys()
    return headers


def describes(index: Mapping[str, Any], headers: Mapping[str, Header]) -> bool:
    """Whether an index is that of the files with these headers."""
    listed = index.get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        return False
    files = {key: PurePosixPath(name).as_posix() for key, name in listed.items()}
    return files == {key: name for name, header in headers.items() for key in header.entries}


def fingerprint(headers: Mapping[str, Header]) -> str:
    """SHA-256 over names and headers, in hexadecimal."""
    digest = hashlib.sha256()
    for name, header in sorted(headers.items()):
        digest.update(name.encode() + b"\0" + header.raw)
    return digest.hexdigest()
