"""What a sidecar keeps of a quantised archive, so that the way back needs no other copy of it.

- `record.json` says how the archive was read, and the SHA-256 of the scales and codes here.
- `config.json` and the index are those of the archive; `headers/` holds the headers of its shards.
- `scales.safetensors` holds its scales: all that is stored of quantised tensors beside their codes.
- `codes.safetensors` holds the codes of tensors where scales and numbers do not give them back, as where a scale is 0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from ckptkit.dtypes import DTYPES, DType
from ckptkit.errors import InputError
from ckptkit.formats import safetensors
from ckptkit.formats.header_copies import describes, lay_out_headers, read_headers
from ckptkit.formats.hf import INDEX
from ckptkit.formats.json_files import read_json
from ckptkit.formats.links import check_links
from ckptkit.formats.quantised.archive import Quantised
from ckptkit.formats.quantised.scheme import scheme_of
from ckptkit.formats.quantised.stored import find_stored, scales_of_activations
from ckptkit.formats.safetensors import Header
from ckptkit.io.castable import CASTABLE
from ckptkit.io.plan import OutputFile
from ckptkit.tensors import Tensor

KEPT = "quantised"
RECORD, CONFIG, HEADERS = "record.json", "config.json", "headers"
SCALES, CODES = "scales.safetensors", "codes.safetensors"
_WITHOUT = "remove the folder to go without it, or name the archive with --quantise like:ARCHIVE"


def can_be_kept(archive: Quantised, headers: Mapping[str, Header]) -> bool:
    """Whether a sidecar with these headers keeps the scales of an archive: it must still describe the same tensors.

    Args:
        archive: The archive; what is not known of its scales yet is found by `ckptkit.io.scales`.
        headers: Shard file -> header, as of an archive without codes.
    """
    config = archive.small.get(CONFIG)
    known = archive.digest is not None and bool(archive.stored) and config is not None
    return known and _shapes(archive.plain_headers) == _shapes(headers)


def lay_out_kept(folder: str, archive: Quantised) -> list[OutputFile]:
    """The files that a sidecar keeps of an archive.

    Args:
        folder: Where they go.
        archive: The archive.
    """
    record = {"read_as": archive.dtype.name, "scales_sha256": archive.digest}
    files = [OutputFile.small(f"{folder}/{RECORD}", json.dumps(record, indent=2).encode() + b"\n")]
    small = {name: archive.small[name] for name in (CONFIG, INDEX) if name in archive.small}
    files += [OutputFile.copy(f"{folder}/{name}", str(path), path.stat().st_size) for name, path in small.items()]
    files += lay_out_headers(f"{folder}/{HEADERS}", archive.headers)
    files.append(safetensors.lay_out(f"{folder}/{SCALES}", archive.scales))
    codes = {item.codes: item.parts[item.codes] for item in archive.stored.values() if item.codes in archive.apart}
    if codes:
        files.append(safetensors.lay_out(f"{folder}/{CODES}", codes))
    return files


def read_kept(folder: Path, headers: Mapping[str, Header]) -> Quantised:
    """What a sidecar keeps of an archive.

    Args:
        folder: Where it is.
        headers: The sidecar's headers, as of an archive without codes.

    Raises:
        InputError: Something is missing, damaged, or does not belong to the model of these headers.
        UnsupportedError: It is quantised in another way than is read here.
    """
    if not folder.is_dir():
        raise InputError(
            "it is no folder", where=folder, hint="remove it, or name the archive with --quantise like:ARCHIVE"
        )
    check_links(folder, folder)
    dtype, digest = _read_record(folder / RECORD)
    config, shards = read_json(folder / CONFIG), read_headers(folder / HEADERS)
    scheme = scheme_of(config, folder / CONFIG)
    if scheme is None:
        raise InputError("config.json says nothing of quantised weights", where=folder / CONFIG, hint=_WITHOUT)
    described = {
        name: Tensor.full(entry.dtype, entry.shape)
        for header in shards.values()
        for name, entry in header.entries.items()
    }
    scales, codes = (_read_parts(folder / name, described) for name in (SCALES, CODES))
    stored = find_stored(described | scales | codes, scheme, folder)
    activations = scales_of_activations(stored, described | scales)
    absent = {item.codes for item in stored.values()} - codes.keys()
    small = {name: folder / name for name in (CONFIG, INDEX) if (folder / name).is_file()}
    archive = Quantised(
        folder, scheme, dtype, config, small, shards, stored, activations, frozenset(absent), frozenset(codes), digest
    )
    if INDEX in small and not describes(read_json(small[INDEX]), shards):
        raise InputError(f"an index of other files than those in {HEADERS}/", where=small[INDEX], hint=_WITHOUT)
    _check_names(folder / SCALES, archive.scales.keys(), scales.keys())
    if strange := sorted(codes.keys() - {item.codes for item in stored.values()}):
        raise InputError(f"holds {strange[0]}, which is no codes", where=folder / CODES, hint=_WITHOUT)
    if not stored or _shapes(archive.plain_headers) != _shapes(headers):
        raise InputError("describes another model than the rest of the sidecar", where=folder, hint=_WITHOUT)
    return archive


def _read_record(file: Path) -> tuple[DType, str]:
    record: dict[str, Any] = read_json(file)
    name, digest = record.get("read_as"), record.get("scales_sha256")
    if name not in CASTABLE or not isinstance(digest, str) or len(digest) != 64:
        raise InputError("it lacks a type that is known, or a SHA-256", where=file, hint=_WITHOUT)
    return DTYPES[name], digest


def _read_parts(file: Path, described: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, each as the headers of the archive describe it."""
    if not file.is_file():
        return {}
    found = safetensors.tensors_of(file, safetensors.read_header(file))
    for name, tensor in found.items():
        expected = described.get(name)
        if expected is None:
            raise InputError(f"holds {name}, which the archive did not have", where=file, hint=_WITHOUT)
        if (tensor.dtype, tensor.shape) != (expected.dtype, expected.shape):
            what = (
                f"{name} is {tensor.dtype}{list(tensor.shape)}, in the archive {expected.dtype}{list(expected.shape)}"
            )
            raise InputError(what, where=file, hint=_WITHOUT)
    return found


def _check_names(file: Path, expected: Set[str], held: Set[str]) -> None:
    if missing := sorted(expected - held):
        raise InputError(f"lacks {missing[0]} ({len(missing):,} missing)", where=file, hint=_WITHOUT)
    if strange := sorted(held - expected):
        raise InputError(f"holds {strange[0]}, which belongs to no codes", where=file, hint=_WITHOUT)


def _shapes(headers: Mapping[str, Header]) -> dict[str, dict[str, tuple[int, ...]]]:
    return {file: {name: entry.shape for name, entry in header.entries.items()} for file, header in headers.items()}
