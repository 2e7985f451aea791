"""`inspect` of a delta: its manifest, its headers and the tables of its tiles, summed up."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ckptkit.formats.delta.manifest import CHANGED, counted
from ckptkit.formats.delta.reading import open_delta

SCHEMA = 1
"""Version of the JSON; it rises when a field goes away or changes its meaning."""


@dataclass(frozen=True)
class DeltaInspection:
    """A summary of a delta. Sizes in bytes.

    Attributes:
        path: Where it is.
        architecture: Hugging Face class name of the model.
        old: The hash of the checkpoint that it applies to, as `hash` gives it.
        new: The hash of the result.
        codings: `unchanged`, `changed`, `whole`, `added`, `removed` -> number of tensors.
        tiles: `same`, `changes`, `differences`, `whole` -> number of tiles of changed tensors.
        bytes: What the delta holds of tensors.
        bytes_new: The tensors of the result.
        tensors: A record for each tensor: name, coding, bytes (in the result) and stored (in the delta).
    """

    path: str
    architecture: str
    old: str
    new: str
    codings: dict[str, int]
    tiles: dict[str, int]
    bytes: int
    bytes_new: int
    tensors: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """The inspection as JSON values."""
        return {"schema": SCHEMA, **asdict(self)}


def inspect_delta(path: str | Path) -> DeltaInspection:
    """Reads the headers of a delta and sums them up.

    Raises:
        InputError: It is damaged or incomplete.
        UnsupportedError: A newer ckptkit wrote it.
    """
    delta = open_delta(Path(path))
    changes, tiles = delta.manifest.changes, Counter[str]()
    for change in changes:
        if change.coding == CHANGED:
            tiles += delta.tiles(change).counts()
    records: list[dict[str, Any]] = [
        {
            "name": change.name,
            "coding": change.coding,
            "bytes": change.nbytes if change.new is not None else 0,
            "stored": delta.stored[change.name].nbytes if change.stored else 0,
        }
        for change in changes
    ]
    return DeltaInspection(
        path=str(path),
        architecture=delta.manifest.architecture,
        old=delta.manifest.old,
        new=delta.manifest.new,
        codings=counted(changes),
        tiles=dict(sorted(tiles.items())),
        bytes=delta.nbytes,
        bytes_new=sum(record["bytes"] for record in records),
        tensors=records,
    )
