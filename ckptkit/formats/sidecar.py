"""The sidecar: everything that the way back to Hugging Face needs, in `ckptkit/` inside a Megatron output.

- `manifest.json` describes the output.
- `hf/` holds config.json, the tokenizer and all other small files, unchanged.
- `headers/` holds the raw safetensors headers, so that the way back gives the same files byte for byte. Their names are
  `SHARD.header`: they hold no tensors, so `**/*.safetensors` must not find them.
- `extras.safetensors` holds the tensors that have no place in Megatron.
- `originals.safetensors` holds the tensors that Megatron has with other numbers, from which these were made.
- `quantised/` keeps the scales of a quantised source (`formats/quantised/kept.py`).
- `adapter/` is the sidecar of an adapter beside the weights of its model.

Its bytes do not depend on time, paths or the number of threads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ckptkit.errors import InputError, UnsupportedError
from ckptkit.formats import safetensors
from ckptkit.formats.header_copies import INSTEAD, describes, fingerprint, lay_out_headers, read_headers
from ckptkit.formats.hf import BIN_INDEX, INDEX, HfFiles, small_files
from ckptkit.formats.json_files import read_json
from ckptkit.formats.links import is_linked_folder
from ckptkit.formats.quantised.kept import CODES, KEPT, SCALES, can_be_kept, lay_out_kept, read_kept
from ckptkit.formats.safetensors import Header
from ckptkit.io.plan import OutputFile
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
TENSORS = (EXTRAS, ORIGINALS, f"{KEPT}/{SCALES}", f"{KEPT}/{CODES}")
"""Its files of tensors."""


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
        return fingerprint(self.headers)

    @property
    def kept(self) -> Quantised | None:
        """The quantised archive whose scales it keeps, or None: there is none, or the model is another one by now."""
        archive = self.quantised
        return archive if archive is not None and can_be_kept(archive, self.headers) else None

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
        files += lay_out_headers(f"{folder}/{HEADERS}", self.headers)
        if self.extras:
            files.append(safetensors.lay_out(f"{folder}/{EXTRAS}", self.extras))
        if (kept := self.kept) is not None:
            files += lay_out_kept(f"{folder}/{KEPT}", kept)
        if self.originals:
            files.append(safetensors.lay_out(f"{folder}/{ORIGINALS}", self.originals))
        return files


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
    origin = _read_origin(manifest, folder)
    headers = read_headers(folder / HEADERS, named_as_shards=manifest["schema"] == 1)
    if fingerprint(headers) != manifest.get("source_fingerprint"):
        raise InputError(f"{HEADERS}/ is not what {MANIFEST} was written with", where=folder, hint=INSTEAD)
    small, config = _read_small(folder / SMALL, headers, manifest), read_json(folder / SMALL / "config.json")
    extras, originals = (_read_tensors(folder / file) for file in (EXTRAS, ORIGINALS))
    quantised = read_kept(folder / KEPT, headers) if (folder / KEPT).exists() else None
    return Sidecar(config, small, headers, extras, origin, quantised=quantised, originals=originals)


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
    return any((folder / name).exists() for name in (MANIFEST, SMALL, HEADERS, EXTRAS, ORIGINALS, KEPT))


def _check_schema(manifest: Mapping[str, Any], folder: Path) -> None:
    if (schema := manifest.get("schema")) not in (1, SCHEMA):
        raise UnsupportedError(
            f"sidecar schema {str(schema)[:40]}, this version reads 1 and {SCHEMA}",
            where=folder / MANIFEST,
            hint="update ckptkit, or pass --hf-reference",
        )


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
        if name == INDEX and headers and describes(read_json(small[name]), headers):
            continue
        # Until schema 2, the index of weights in another format came along.
        if manifest["schema"] == 1 and (name == BIN_INDEX or not headers):
            del small[name]
            continue
        raise InputError(f"an index of other files than those in {HEADERS}/", where=small[name], hint="remove it")
    return small


def _read_tensors(file: Path) -> dict[str, Tensor]:
    return safetensors.tensors_of(file, safetensors.read_header(file)) if file.is_file() else {}


def _read_origin(manifest: Mapping[str, Any], folder: Path) -> dict[str, str]:
    origin = manifest.get("origin") or {}
    if not isinstance(origin, dict) or not all(isinstance(value, str) for value in origin.values()):
        raise InputError("its origin is no repository and revision", where=folder / MANIFEST, hint=INSTEAD)
    return dict(origin)
