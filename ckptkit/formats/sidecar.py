"""The sidecar: everything that the way back to Hugging Face needs, in `ckptkit/` inside a Megatron output.

- `manifest.json` describes the output.
- `hf/` holds config.json, the tokenizer and all other small files, unchanged.
- `headers/` holds the raw safetensors headers, so that the way back gives the same files byte for byte. Their names are
  `SHARD.header`: they hold no tensors, so `**/*.safetensors` must not find them.
- `extras.safetensors` holds the tensors that have no place in Megatron.
- `originals.safetensors` holds the tensors that Megatron has with other numbers, from which these were made.
- `adapter/` is the sidecar of an adapter beside the weights of its model.

Its bytes do not depend on time, paths or the number of threads.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ckptkit.errors import InputError, UnsupportedError
from ckptkit.formats import safetensors
from ckptkit.formats.hf import BIN_INDEX, INDEX, HfFiles, small_files
from ckptkit.formats.json_files import read_json
from ckptkit.formats.links import is_linked_folder
from ckptkit.formats.safetensors import Header
from ckptkit.io.plan import OutputFile
from ckptkit.io.regular import read_bounded
from ckptkit.io.stores.mirror import prepare_starts
from ckptkit.tensors import Tensor

if TYPE_CHECKING:
    from ckptkit.formats.quantised.archive import Quantised

FOLDER = "ckptkit"
OF_ADAPTER = f"{FOLDER}/adapter"
"""The sidecar of an adapter beside the weights of its model."""
SCHEMA = 2
"""The schema that is written. Schema 1 gave a header the name of its shard; it can still be read."""

MANIFEST, SMALL, HEADERS, EXTRAS = "manifest.json", "hf", "headers", "extras.safetensors"
ORIGINALS = "originals.safetensors"

_HEADER = ".header"
_INSTEAD = "pass --hf-reference instead"


@dataclass(frozen=True)
class Sidecar:
    """The Hugging Face side of a model, apart from its weights.

    Attributes:
        config: config.json as parsed.
        small: Relative path -> absolute path of small files, config.json included.
        headers: Shard file -> raw header.
        extras: Hugging Face tensors without a Megatron slot.
        origin: Hub repository and commit that the model came from, or empty.
        made: Relative path -> bytes of further small files, which an operation made; they outrank `small`.
        operation: The operation that made the model, as JSON values for the manifest; or empty.
        quantised: The quantised weights that the model was read from, or None.
        originals: Hugging Face tensors that Megatron has with other numbers.
    """

    config: dict[str, Any]
    small: dict[str, Path]
    headers: dict[str, Header] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    made: dict[str, bytes] = field(default_factory=dict)
    operation: dict[str, Any] = field(default_factory=dict)
    quantised: Quantised | None = None
    originals: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of_hf(cls, files: HfFiles, extras: Mapping[str, Tensor]) -> Sidecar:
        """The sidecar of a Hugging Face directory."""
        return cls(files.config, files.small, files.headers, dict(extras), quantised=files.quantised)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the source's tensor names, types, shapes and places, in hexadecimal."""
        return _fingerprint(self.headers)

    def small_outputs(self, further: Mapping[str, Path] = MappingProxyType({})) -> list[OutputFile]:
        """Its small files, without config.json, sorted by name.

        Args:
            further: More of them, which those of the sidecar outrank.
        """
        paths = {name: path for name, path in {**further, **self.small}.items() if name not in self.made}
        files = [OutputFile.copy(name, str(path), path.stat().st_size) for name, path in paths.items()]
        files += [OutputFile.small(name, data) for name, data in self.made.items()]
        return sorted((file for file in files if file.path != "config.json"), key=lambda file: file.path)

    def lay_out(
        self, manifest: Mapping[str, Any], config: OutputFile | None = None, folder: str = FOLDER
    ) -> list[OutputFile]:
        """The files of the sidecar.

        Args:
            manifest: Facts about the checkpoint that it goes into.
            config: config.json as it is to be written. None: that of the sidecar, unchanged.
            folder: Where they go, below the checkpoint's root.
        """
        text = {"schema": SCHEMA, **manifest, "origin": self.origin, "source_fingerprint": self.fingerprint}
        if self.operation:
            text["operation"] = self.operation
        files = [OutputFile.small(f"{folder}/{MANIFEST}", json.dumps(text, indent=2, sort_keys=True).encode() + b"\n")]
        if config is None:
            config = OutputFile.copy("config.json", str(path := self.small["config.json"]), path.stat().st_size)
        for file in (*self.small_outputs(), config):
            files.append(replace(file, path=f"{folder}/{SMALL}/{file.path}"))
        for name, header in sorted(self.headers.items()):
            files.append(OutputFile.small(f"{folder}/{HEADERS}/{name}{_HEADER}", header.raw))
        if self.extras:
            files.append(safetensors.lay_out(f"{folder}/{EXTRAS}", self.extras))
        if self.originals:
            files.append(safetensors.lay_out(f"{folder}/{ORIGINALS}", self.originals))
        return files


def _fingerprint(headers: Mapping[str, Header]) -> str:
    digest = hashlib.sha256()
    for name, header in sorted(headers.items()):
        digest.update(name.encode() + b"\0" + header.raw)
    return digest.hexdigest()


def read_sidecar(path: Path, name: str = FOLDER) -> Sidecar | None:
    """The sidecar of a checkpoint, or None if it has none.

    What only the family knows is not checked here: `ckptkit.checkpoints.sidecar_contents` does that.

    Args:
        path: The checkpoint's root.
        name: The sidecar's folder in it.

    Raises:
        InputError: It is damaged, or holds what no writer puts there.
        UnsupportedError: A newer ckptkit wrote it.
    """
    folder = path / name
    if not _is_sidecar(folder):
        return None
    manifest = read_json(folder / MANIFEST)
    _check_schema(manifest, folder)
    origin, headers = _read_origin(manifest, folder), _read_headers(folder / HEADERS, manifest)
    if _fingerprint(headers) != manifest.get("source_fingerprint"):
        raise InputError(f"{HEADERS}/ is not what {MANIFEST} was written with", where=folder, hint=_INSTEAD)
    small, config = _read_small(folder / SMALL, headers, manifest), read_json(folder / SMALL / "config.json")
    extras, originals = (_read_tensors(folder / file) for file in (EXTRAS, ORIGINALS))
    return Sidecar(config, small, headers, extras, origin, originals=originals)


def read_extras(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The extras and originals in the sidecar of a checkpoint, all that is wanted of it beside a reference.

    Raises:
        InputError: They are damaged.
        UnsupportedError: A newer ckptkit wrote them.
    """
    folder = path / FOLDER
    files = [folder / name for name in (EXTRAS, ORIGINALS)]
    if not any(file.is_file() for file in files):
        return {}, {}
    _check_schema(read_json(folder / MANIFEST), folder)
    extras, originals = map(_read_tensors, files)
    return extras, originals


def _is_sidecar(folder: Path) -> bool:
    """Whether a folder is a sidecar, whole or not: one that lost its manifest must not pass for none."""
    return any((folder / name).exists() for name in (MANIFEST, SMALL, HEADERS, EXTRAS, ORIGINALS))


def _check_schema(manifest: Mapping[str, Any], folder: Path) -> None:
    if (schema := manifest.get("schema")) not in (1, SCHEMA):
        raise UnsupportedError(
            f"sidecar schema {str(schema)[:40]}, this version reads 1 and {SCHEMA}",
            where=folder / MANIFEST,
            hint="update ckptkit, or pass --hf-reference",
        )


def _read_headers(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Header]:
    headers: dict[str, Header] = {}
    known: set[str] = set()
    older = manifest["schema"] == 1
    files = list(_files(folder))
    prepare_starts(files)
    for file in files:
        raw = read_bounded(file, safetensors.MAX_HEADER + 8)
        if len(raw) < 8 or int.from_bytes(raw[:8], "little") != len(raw) - 8:
            raise InputError("damaged header copy", where=file, hint=_INSTEAD)
        name = file.relative_to(folder).as_posix()
        if not older and not name.endswith(_HEADER):
            raise InputError(f"a header copy whose name does not end in {_HEADER}", where=file, hint="remove it")
        header = headers[name if older else name.removesuffix(_HEADER)] = safetensors.parse_header(raw, file)
        if twice := sorted(header.entries.keys() & known):
            raise InputError(f"another header copy describes {twice[0]}, too", where=file, hint=_INSTEAD)
        known |= header.entries.keys()
    return headers


def _read_small(folder: Path, headers: Mapping[str, Header], manifest: Mapping[str, Any]) -> dict[str, Path]:
    """Small files by name. Weights have no place here, and no index but that of the headers."""
    small, others = small_files(folder) if folder.is_dir() else ({}, [])
    others += sorted(small.keys() & headers.keys())
    if others:
        what = "a link to a folder" if is_linked_folder(folder / others[0]) else "weights"
        raise InputError(f"{what} among the small files of a sidecar", where=folder / others[0], hint="remove it")
    for name in (INDEX, BIN_INDEX):
        if name not in small:
            continue
        if name == INDEX and headers and _describes(read_json(small[name]), headers):
            continue
        # Until schema 2, the index of weights in another format came along.
        if manifest["schema"] == 1 and (name == BIN_INDEX or not headers):
            del small[name]
            continue
        raise InputError(f"an index of other files than those in {HEADERS}/", where=small[name], hint="remove it")
    return small


def _describes(index: Mapping[str, Any], headers: Mapping[str, Header]) -> bool:
    """Whether an index is that of the files with these headers."""
    listed = index.get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        return False
    files = {key: PurePosixPath(name).as_posix() for key, name in listed.items()}
    return files == {key: name for name, header in headers.items() for key in header.entries}


def _read_tensors(file: Path) -> dict[str, Tensor]:
    return safetensors.tensors_of(file, safetensors.read_header(file)) if file.is_file() else {}


def _read_origin(manifest: Mapping[str, Any], folder: Path) -> dict[str, str]:
    origin = manifest.get("origin") or {}
    if not isinstance(origin, dict) or not all(isinstance(value, str) for value in origin.values()):
        raise InputError("its origin is no repository and revision", where=folder / MANIFEST, hint=_INSTEAD)
    return dict(origin)


def _files(folder: Path) -> list[Path]:
    """The files below a folder; links to folders are not followed."""
    return sorted(Path(here, name) for here, _, names in os.walk(folder) for name in names)
