"""The architectures of all families, and the formats that each can be written in."""

from __future__ import annotations

from dataclasses import dataclass

from ckptkit.conversion.targets import NAMES
from ckptkit.families import families


@dataclass(frozen=True)
class Architecture:
    """A Hugging Face architecture that ckptkit converts.

    Attributes:
        architecture: Hugging Face class name.
        family: Name of the family table.
        formats: Container formats it can be read from and written to.
    """

    architecture: str
    family: str
    formats: tuple[str, ...]


def supported_architectures() -> list[Architecture]:
    """Every architecture that can be converted, by Hugging Face class name."""
    return [Architecture(name, family.name, NAMES) for family in families() for name in family.architectures]
