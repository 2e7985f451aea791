"""Gradients and updates of either library under Hugging Face's names.

A gradient has the shape of its parameter, a shard's that of the shard. So they go the way of the weights: shards are
joined by the rules that the tables have for weights, and the rows of the tables take them apart. Only where the numbers
of weights differ between the libraries, by a constant, gradients and updates do not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

from ckptkit.checkpoints.checkpoint import Checkpoint, most_common_dtype
from ckptkit.checkpoints.huggingface import open_hf_files
from ckptkit.checkpoints.joining import Joined, Shards, join_shards
from ckptkit.dtypes import DTYPES
from ckptkit.errors import UsageError
from ckptkit.formats.hf import HfFiles
from ckptkit.formats.json_files import read_json
from ckptkit.io.plan import Comparison
from ckptkit.sharding.grid import Parallelism
from ckptkit.tables.items import Item
from ckptkit.tensors import Region, Tensor
from ckptkit.verification.training import files


@dataclass(frozen=True)
class Named:
    """Tensors by the names that they have on the hub.

    Attributes:
        tensors: Hugging Face name -> tensor.
        copies: Copies that must be equal, as each rank has one.
        unused: Parts of Megatron tensors that the model does not use, by a description.
        further: Parts that are trained in Megatron alone, by a description: zeros in B of an adapter, which hold the
            place of other modules' ranks.
    """

    tensors: dict[str, Tensor]
    copies: tuple[Comparison, ...] = ()
    unused: dict[str, Tensor] = field(default_factory=dict)
    further: dict[str, Tensor] = field(default_factory=dict)


def of_ranks(checkpoint: Checkpoint, grid: Parallelism, folder: str | Path, kind: str) -> Named:
    """What the ranks of a grid wrote.

    Args:
        checkpoint: The model that they ran.
        grid: Their grid.
        folder: Where they wrote it.
        kind: `files.GRADIENTS` or `files.UPDATES`.

    Raises:
        InputError: Shards are missing or do not fit.
    """
    whole = joined(checkpoint, grid, folder, kind)
    found, unused = _unpacked({key: _alike(item) for key, item in checkpoint.items.items()}, whole.tensors)
    return Named(found, whole.comparisons, unused)


def joined(checkpoint: Checkpoint, grid: Parallelism, folder: str | Path, kind: str) -> Joined:
    """The same under Megatron's canonical names.

    Args:
        checkpoint: As for `of_ranks`; or the adapter that they ran.
        grid: As for `of_ranks`.
        folder: As for `of_ranks`.
        kind: As for `of_ranks`.

    Raises:
        InputError: Shards are missing or do not fit.
    """
    ranks = {
        (rank.pp, rank.tp, rank.ep): {
            str(vp_stage): files.read(folder, kind, files.chunk_file(rank, vp_stage)) for vp_stage in range(grid.vpp)
        }
        for rank in grid.ranks()
    }
    shards = Shards(
        path=Path(folder),
        family=checkpoint.family,
        config=checkpoint.config,
        items=checkpoint.items,
        spelling=checkpoint.family.spelling("local", text=True),
        grid=grid,
        ranks=ranks,
        most_rows=None,
        padding_to=0,
    )
    return join_shards(shards)


def of_transformers(path: str | Path, folder: str | Path, kind: str, shapes: Mapping[str, Sequence[int]]) -> Named:
    """What transformers wrote; zeros where it wrote nothing.

    Args:
        path: The directory of the model.
        folder: Where it is.
        kind: `files.GRADIENTS` or `files.UPDATES`.
        shapes: Shape of every tensor of the model, by its name in memory.
    """
    found = files.read(folder, kind, files.WHOLE)
    dtype = most_common_dtype(found.values()) if found else DTYPES["F32"]
    tensors = {name: found.get(name, Tensor.full(dtype, tuple(shape))) for name, shape in shapes.items()}
    opened = _opened(path, tensors)
    found, _ = _unpacked(opened.items, opened.tensors)
    return Named(found)


def _unpacked(items: Mapping[str, Item], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Whole Megatron tensors under Hugging Face's names, and what no name has."""
    found: dict[str, Tensor] = {}
    unused: dict[str, Tensor] = {}
    for key, item in items.items():
        found.update(item.unpack(tensors[key]))
        unused.update({f"{slot.slot.name} in {key}": part for slot, part, _ in item.dropped(tensors[key])})
    return found, unused


@dataclass(frozen=True)
class Traced:
    """Where the tensors of a model in memory are.

    Attributes:
        sources: Canonical name -> names in memory of what it is made of.
        parts: Canonical name -> its names on the hub.
    """

    sources: dict[str, set[str]]
    parts: dict[str, list[str]]

    def made_of(self, keys: Collection[str]) -> set[str]:
        """Names in memory of what the tensors of canonical names are made of.

        Raises:
            UsageError: One of them is a part of other tensors, too.
        """
        wanted = {name for key in keys for name in self.sources.get(key, ())}
        for key, sources in self.sources.items():
            if key not in keys and (shared := sorted(sources & wanted)):
                raise UsageError(
                    f"the pattern takes a part of {shared[0]}, which transformers has as one tensor",
                    hint=f"let it match {self.parts[key][0]} as well",
                )
        return wanted

    def on_hub(self, name: str) -> list[str]:
        """Names on the hub of what a tensor in memory is a part of."""
        return [part for key, sources in self.sources.items() if name in sources for part in self.parts[key]]


def trace(path: str | Path, shapes: Mapping[str, Sequence[int]]) -> Traced:
    """Follows the tensors of a model in memory through its family's table.

    Args:
        path: The directory of the model.
        shapes: Shape of every tensor of the model, by its name in memory.
    """
    opened = _opened(path, {name: Tensor.from_file(name, 0, DTYPES["F32"], tuple(s)) for name, s in shapes.items()})
    sources = {
        key: {piece.file for band in tensor.bands for piece in band.pieces if isinstance(piece, Region)}
        for key, tensor in ((key, _original(opened.items[key], tensor)) for key, tensor in opened.tensors.items())
    }
    return Traced(sources, {key: list(item.parts) for key, item in opened.items.items()})


def _alike(item: Item) -> Item:
    """An item as if its numbers were the same in both libraries."""
    if item.row.numbers is None:
        return item
    return item._replace(kind=replace(item.kind, row=replace(item.row, numbers=None)))


def _original(item: Item, tensor: Tensor) -> Tensor:
    """A Megatron tensor made of a model in memory, or what it was made of with other numbers."""
    found = None if item.row.numbers is None else item.row.numbers.original(tensor)
    return tensor if found is None else found


def _opened(path: str | Path, tensors: dict[str, Tensor]) -> Checkpoint:
    """Tensors of a model in memory as if its directory held them."""
    return open_hf_files(HfFiles(Path(path), read_json(Path(path) / "config.json"), tensors, {}, {}))


def matching(checkpoint: Checkpoint, pattern: str) -> list[str]:
    """Canonical names of the tensors whose Hugging Face names match a pattern.

    Raises:
        UsageError: None does, or only some parts of a tensor do.
    """
    found = []
    for key, item in checkpoint.items.items():
        matches = [fnmatchcase(name, pattern) for name in item.parts]
        if any(matches) and not all(matches):
            names = list(item.parts)
            raise UsageError(
                f"--train-only {pattern!r} matches {names[matches.index(True)]} and not {names[matches.index(False)]},"
                f" which Megatron has in one tensor, {key}",
                hint="let it match all of them or none",
            )
        if any(matches):
            found.append(key)
    if not found:
        some = next((name for item in checkpoint.items.values() for name in item.parts), "")
        raise UsageError(f"--train-only {pattern!r} matches no parameter", hint=f"they are called like {some}")
    return found
