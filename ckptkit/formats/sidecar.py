"""What the way back needs, kept in `ckptkit/` inside a Megatron output.

`manifest.json` says what was written and how; `hf/` holds config.json, tokenizer and all other small files verbatim;
`headers/` the raw safetensors headers, so that the same files come out byte for byte, each named `SHARD.header`: they
hold no tensors, and `**/*.safetensors` must not find them; `extras.safetensors` the tensors that Megatron has no slot
for. Nothing in it depends on time, paths or the number of threads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptkit.errors import InputError, UnsupportedError
from ckptkit.formats import safetensors
from ckptkit.formats.hf import HfFiles
from ckptkit.formats.json_files import read_json
from ckptkit.formats.safetensors import Header
from ckptkit.io.plan import OutputFile
from ckptkit.io.regular import read_bounded
from ckptkit.tensors import Tensor

FOLDER = "ckptkit"
SCHEMA = 2
"""What is written. Schema 1, which is still read, named each header as its shard."""

_HEADER = ".header"


@dataclass(frozen=True)
class Sidecar:
    """The Hugging Face side of a model, apart from its weights.

    Attributes:
        config: config.json as parsed.
        small: Relative path -> absolute path of small files, config.json included.
        headers: Shard file -> raw header.
        extras: Hugging Face tensors without a Megatron slot.
        origin: Hub repository and commit that the model came from, or empty.
    """

    config: dict[str, Any]
    small: dict[str, Path]
    headers: dict[str, Header] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_hf(cls, files: HfFiles, extras: Mapping[str, Tensor]) -> Sidecar:
        """The sidecar of a Hugging Face directory."""
        return cls(files.config, files.small, files.headers, dict(extras))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the source's tensor names, types, shapes and places, in hexadecimal."""
        digest = hashlib.sha256()
        for name, header in sorted(self.headers.items()):
            digest.update(name.encode() + b"\0" + header.raw)
        return digest.hexdigest()

    def lay_out(self, manifest: Mapping[str, Any]) -> list[OutputFile]:
        """The files of the sidecar.

        Args:
            manifest: Facts about the checkpoint that it goes into.
        """
        text = {"schema": SCHEMA, **manifest, "origin": self.origin, "source_fingerprint": self.fingerprint}
        files = [
            OutputFile.small(f"{FOLDER}/manifest.json", json.dumps(text, indent=2, sort_keys=True).encode() + b"\n")
        ]
        for name, path in sorted(self.small.items()):
            files.append(OutputFile.copy(f"{FOLDER}/hf/{name}", str(path), path.stat().st_size))
        for name, header in sorted(self.headers.items()):
            files.append(OutputFile.small(f"{FOLDER}/headers/{name}{_HEADER}", header.raw))
        if self.extras:
            files.append(safetensors.lay_out(f"{FOLDER}/extras.safetensors", self.extras))
        return files


def read_sidecar(path: Path) -> Sidecar | None:
    """The sidecar of a checkpoint, or None if it has none.

    Raises:
        InputError: It is damaged.
        UnsupportedError: A newer ckptkit wrote it.
    """
    folder = path / FOLDER
    if not (folder / "manifest.json").is_file():
        return None
    manifest = read_json(folder / "manifest.json")
    if (schema := manifest.get("schema")) not in (1, SCHEMA):
        raise UnsupportedError(
            f"sidecar schema {schema!r}, this version reads 1 and {SCHEMA}",
            where=folder / "manifest.json",
            hint="update ckptkit, or pass --hf-reference",
        )
    small = {f.relative_to(folder / "hf").as_posix(): f for f in sorted((folder / "hf").rglob("*")) if f.is_file()}
    headers = {}
    for file in sorted((folder / "headers").rglob("*")):
        if file.is_file():
            raw = read_bounded(file, safetensors.MAX_HEADER + 8)
            if len(raw) < 8 or int.from_bytes(raw[:8], "little") != len(raw) - 8:
                raise InputError("damaged header copy", where=file, hint="pass --hf-reference instead")
            name = file.relative_to(folder / "headers").as_posix()
            if schema != 1 and not name.endswith(_HEADER):
                raise InputError(f"a header copy whose name does not end in {_HEADER}", where=file, hint="remove it")
            headers[name.removesuffix("" if schema == 1 else _HEADER)] = safetensors.parse_header(raw, file)
    extras_file = folder / "extras.safetensors"
    extras = safetensors.tensors_of(extras_file, safetensors.read_header(extras_file)) if extras_file.is_file() else {}
    config = read_json(folder / "hf" / "config.json")
    return Sidecar(config, small, headers, extras, _origin(manifest, folder / "manifest.json"))


def _origin(manifest: Mapping[str, Any], where: Path) -> dict[str, str]:
    origin = manifest.get("origin") or {}
    if not isinstance(origin, dict) or not all(isinstance(value, str) for value in origin.values()):
        raise InputError("its origin is no repository and revision", where=where, hint="pass --hf-reference instead")
    return origin
