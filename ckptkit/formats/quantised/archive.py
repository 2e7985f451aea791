"""A directory with quantised weights, seen as one whose weights are not quantised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from ckptkit.dtypes import DTYPES, DType
from ckptkit.formats.hf import INDEX, HfFiles, index_of
from ckptkit.formats.quantised.scheme import MXFP4, Scheme, scheme_of, without_scheme
from ckptkit.formats.quantised.stored import Stored, find_stored, scales_of_activations
from ckptkit.formats.safetensors import Header, build_header
from ckptkit.io.computed import permuted
from ckptkit.io.plan import Comparison
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
    """

    path: Path
    scheme: Scheme
    dtype: DType
    config: dict[str, Any] = field(repr=False)
    small: Mapping[str, Path] = field(repr=False)
    headers: Mapping[str, Header] = field(repr=False)
    stored: Mapping[str, Stored] = field(repr=False)
    activations: Mapping[str, Tensor] = field(repr=False)

    @property
    def names(self) -> set[str]:
        """Names of its tensors where they are not quantised."""
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
        found = [
            f"{facts['tensors']:,} tensors are quantised ({self.scheme}) and are read as {self.dtype}, which takes"
            f" {facts['bytes_added']:,} bytes more"
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

    Quantised tensors become computed ones under the names that they have in an archive without codes. The rest stays.

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
    numbers = {item.name: numbers_of(item, dtype) for item in stored.values()}
    hidden = {name for item in stored.values() for name in item.parts} | activations.keys()

    def read(names: Mapping[str, object]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name in names:
            if name in stored:
                found[stored[name].name] = numbers[stored[name].name]
            elif name not in hidden:
                found[name] = files.tensors[name]
        return found

    headers = {name: build_header(read(header.entries), header.metadata) for name, header in files.headers.items()}
    made = {INDEX: index_of(headers)} if INDEX in files.small else {}
    config, tensors = without_scheme(files.config), read(files.tensors)
    return replace(files, config=config, tensors=tensors, headers=headers, made=made, quantised=archive)


def numbers_of(item: Stored, dtype: DType) -> Tensor:
    """A quantised tensor as archives without codes have it: MXFP4 experts are transposed there."""
    numbers = item.numbers(dtype)
    return permuted(numbers, (0, 2, 1)) if item.kind == MXFP4 and len(item.shape) == 3 else numbers
