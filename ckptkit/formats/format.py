"""The description of a format on disk. It knows files and bytes, and no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Archive:
    """A zip archive as torch.save writes it.

    Attributes:
        file: The file that it is in.
        start: Where in it, in bytes.
        length: Its length in bytes, if it is one of many small ones in the file; None for the rest of the file.
    """

    file: Path
    start: int = 0
    length: int | None = None


@dataclass(frozen=True)
class Format:
    """A format that can be read.

    Attributes:
        name: Its name in results and options.
        recognise: Whether a folder holds it, by the names of its files.
        checks: One check for each part of a folder that can be damaged by itself (a file, or a stored tensor): it
            reads headers, and raises an InputError. They are run as they come: which are next may follow from one.
        archives: The archives in a folder, whose records carry checksums.
        bare: Whether it holds the weights of a module and nothing that says which model that is.
    """

    name: str
    recognise: Callable[[Path], bool]
    checks: Callable[[Path], Iterator[Callable[[], object]]]
    archives: Callable[[Path], Iterator[Archive]]
    bare: bool = False
