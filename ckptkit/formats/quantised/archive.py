"""A directory with quantised weights, seen as one whose weights are not quantised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from ckptkit.dtypes import DTYPES, DType
from ckptkit.errors import InputError
from ckptkit.formats.hf import INDEX, HfFiles
from ckptkit.formats.quantised.scheme import Scheme, scheme_of, without_scheme
from ckptkit.formats.quantised.stored import Stored, find_stored, scales_of_activations
from ckptkit.formats.safetensors import Header, build_header
from ckptkit.io.plan import Comparison
from ckptkit.sizes import human_size
from ckptkit.tensors import Tensor

BF16 = DTYPES["BF16"]


@dataclass(frozen=True)
class Quantised:
    """The quantised weights of a directory.

    Attributes:
        path: The directory.
        scheme: How they are quantised.
        dtype: The type that they are read as.
        config: config.json as parsed.
        small: Its small files, as of `HfFiles`.
        headers: Shard file -> header.
        stored: Name of codes -> quantised tensor.
        activations: Scales of activations, which are not read.
        absent: Names of codes that are described but not there: a sidecar keeps scales.
        apart: Names of codes that do not follow from numbers and scales, so that a sidecar keeps them, too.
        digest: SHA-256 of the scales, and of codes that are apart, as of `ckptkit.io.scales`; None where it is not
            known.
    """

    path: Path
    scheme: Scheme
    dtype: DType
    config: dict[str, Any] = field(repr=False)
    small: Mapping[str, Path] = field(repr=False)
    headers: Mapping[str, Header] = field(repr=False)
    stored: Mapping[str, Stored] = field(repr=False)
    activations: Mapping[str, Tensor] = field(repr=False)
    absent: frozenset[str] = frozenset()
    apart: frozenset[str] = frozenset()
    digest: str | None = None

    @property
    def scales(self) -> dict[str, Tensor]:
        """Stored name -> tensor of all that belongs to codes: scales, shapes, and scales of activations."""
        parts = {name: part for item in self.stored.values() for name, part in item.parts.items() if name != item.codes}
        return parts | dict(self.activations)

    @property
    def plain_headers(self) -> dict[str, Header]:
        """Shard file -> header, of the archive as it would be without codes."""
        hidden = {name for item in self.stored.values() for name in item.parts} | self.activations.keys()

        def header(found: Header) -> Header:
            forms: dict[str, Tensor] = {}
            for name, entry in found.entries.items():
                if name in self.stored:
                    plain, shape = self.stored[name].plain
                    forms[plain] = Tensor.full(self.dtype, shape)
                elif name not in hidden:
                    forms[name] = Tensor.full(entry.dtype, entry.shape)
            return build_header(forms, found.metadata)

        return {name: header(found) for name, found in self.headers.items()}

    @property
    def names(self) -> set[str]:
        """Names of its tensors in the tables."""
        hidden = {name for item in self.stored.values() for name in item.parts} | self.activations.keys()
        held = {name for header in self.headers.values() for name in header.entries}
        return (held - hidden) | {item.name for item in self.stored.values()}

    def facts(self) -> dict[str, Any]:
        """What is quantised, how, and what dequantising adds; sizes in bytes."""
        stored = sum(item.nbytes for item in self.stored.values())
        numbers = sum(prod(item.shape) * self.dtype.itemsize for item in self.stored.values())
        return {
            "scheme": str(self.scheme),
            "tensors": len(self.stored),
            "bytes_stored": stored,
            "read_as": self.dtype.name,
            "bytes_read": numbers,
            "bytes_added": numbers - stored,
        }

    def notes(self) -> list[str]:
        """Sentences for the user."""
        facts = self.facts()
        if not self.stored:
            return [f"config.json says {self.scheme}, and no tensor is quantised"]
        stored, added = (human_size(facts[name]) for name in ("bytes_stored", "bytes_added"))
        found = [
            f"{facts['tensors']:,} tensors are quantised ({self.scheme}, {stored}) and are read as {self.dtype}, which"
            f" takes {added} more"
        ]
        if self.activations:
            found.append(f"{len(self.activations):,} scales of activations are left out")
        return found

    def comparisons(self) -> Iterator[Comparison]:
        """What the bytes of the archive must say for the shapes of its tensors to be right."""
        for item in self.stored.values():
            yield from item.comparisons()


def dequantised(files: HfFiles, dtype: DType | None = None) -> HfFiles:
    """A directory as if its weights were not quantised, with the facts about those that are in `quantised`.

    Quantised tensors become computed ones under the names that tables have for them, and the headers are those of an
    archive without codes. The rest stays, but for the index, which describes other tensors.

    Args:
        files: The directory.
        dtype: The type of the computed tensors; None for BF16.

    Raises:
        InputError: Codes lack scales, scales have no codes, or a shape or type is wrong.
        UnsupportedError: They are quantised in another way than is read here.
    """
    scheme = scheme_of(files.config, files.path / "config.json")
    if scheme is None:
        return files
    dtype = dtype or BF16
    stored = find_stored(files.tensors, scheme, files.path)
    activations = scales_of_activations(stored, files.tensors)
    archive = Quantised(files.path, scheme, dtype, files.config, files.small, files.headers, stored, activations)
    hidden = {name for item in stored.values() for name in item.parts} | activations.keys()
    kept = {name: tensor for name, tensor in files.tensors.items() if name not in hidden}
    if twice := [item.name for item in stored.values() if item.name in kept]:
        raise InputError(f"{twice[0]} is there twice: quantised, and as plain numbers", where=files.path)
    tensors = {
        stored[name].name if name in stored else name: stored[name].numbers(dtype) if name in stored else kept[name]
        for name in files.tensors
        if name in stored or name in kept
    }

    config = without_scheme(files.config)
    small = {name: file for name, file in files.small.items() if name != INDEX}
    return replace(files, config=config, tensors=tensors, headers=archive.plain_headers, small=small, quantised=archive)
