"""Joins tensors that torch has split over the ranks of a device mesh.

The file of a rank describes its part. A `DTensor` records how each dimension of the mesh divides the tensor (its
placements) and the place of the rank on the mesh. A `ShardedTensor` of older FSDP records the box of the tensor for
each shard. A plain tensor is a replica: every rank holds all of it.

Source: torch/distributed/tensor/placement_types.py, device_mesh.py and _shard/sharded_tensor/api.py of torch 2.13.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from ckptkit.errors import UnsupportedError
from ckptkit.formats.dcp.chunks import Box, ChunkError, join_chunks
from ckptkit.formats.torch_file.pickles import Record, UnreadableTensor
from ckptkit.tensors import MAX_AXES, Tensor

_REPLICATE, _SHARD, _STRIDED = "Replicate", "Shard", "_StridedShard"


class NoTensor(ValueError):
    """An entry of a state dict is no tensor that torch saves; the message says how, as the end of a sentence."""


@dataclass(frozen=True, slots=True)
class Placement:
    """How a dimension of the mesh divides a tensor.

    Attributes:
        kind: `Replicate`, `Shard` or `_StridedShard`, as torch calls its classes.
        dim: The divided axis, or -1.
        split_factor: Into how many parts later dimensions of the mesh have divided that axis before (strided only).
    """

    kind: str
    dim: int = -1
    split_factor: int = 1


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's part of a tensor.

    Attributes:
        rank: The rank.
        local: Its elements.
        shape: Shape of the whole tensor.
        coordinate: Where the rank is on the device mesh.
        placements: How each dimension of the mesh divides the tensor.
    """

    rank: int
    local: Tensor
    shape: tuple[int, ...]
    coordinate: tuple[int, ...]
    placements: tuple[Placement, ...]


@dataclass(frozen=True, slots=True)
class Boxes:
    """One rank's part of a `ShardedTensor`: any number of boxes."""

    rank: int
    boxes: tuple[Box, ...]
    shape: tuple[int, ...]


Held = Part | Boxes


@dataclass(frozen=True, slots=True)
class Copy:
    """Two ranks' copies of the same elements, which must be equal."""

    first: Part
    second: Part


def held(value: object, rank: int) -> Held:
    """A rank's part of the tensor in an entry of its state dict.

    Args:
        value: The entry, as `read_torch_file` gives it.
        rank: The rank.

    Raises:
        NoTensor: It is no tensor, or says too little of itself.
        UnsupportedError: It is placed in a way that has no value (`Partial`) or is not known.
    """
    if isinstance(value, Tensor):
        return Part(rank, value, value.shape, (rank,), (Placement(_REPLICATE),))
    if isinstance(value, UnreadableTensor):
        raise NoTensor(value.reason)
    if isinstance(value, Record) and value.name == "DTensor":
        return _part(_attributes(value), rank)
    if isinstance(value, Record) and value.name == "ShardedTensor":
        return _boxes(value, rank)
    raise NoTensor(f"is a {value.name if isinstance(value, Record) else type(value).__name__} and no tensor")


def join(parts: Sequence[Held]) -> tuple[Tensor, list[Copy]]:
    """The tensor that all ranks hold together, and pairs of copies that must be equal.

    Raises:
        ChunkError: Parts are missing, overlap, or belong to different tensors.
        UnsupportedError: The mesh divides an axis in an order that is not known.
    """
    kinds = {(type(part), part.shape) for part in parts}
    if len(kinds) > 1:
        shapes = sorted({str(list(part.shape)) for part in parts})
        raise ChunkError(f"ranks disagree on what it is ({' or '.join(shapes)})")
    boxes = [box for part in parts if isinstance(part, Boxes) for box in part.boxes]
    if isinstance(parts[0], Boxes):
        if not boxes:
            raise ChunkError("no rank holds anything of it")
        return join_chunks(boxes[0].tensor.dtype, parts[0].shape, boxes), []
    return _join_mesh([part for part in parts if isinstance(part, Part)])


def _attributes(value: object) -> Mapping[str, Any]:
    """The attributes that an object would have, with or without `__slots__`."""
    states = value.state if isinstance(value, Record) else None
    found: dict[str, Any] = {}
    for state in states if isinstance(states, tuple) else (states,):
        if isinstance(state, dict):
            found.update(state)
    return found


def _integers(value: Any, what: str) -> tuple[int, ...]:
    listed = isinstance(value, tuple | list) and len(value) <= MAX_AXES
    if not listed or not all(type(item) is int and 0 <= item < 1 << 63 for item in value):
        raise NoTensor(f"has no {what}")
    return tuple(value)


def _local(value: object) -> Tensor:
    if isinstance(value, UnreadableTensor):
        raise NoTensor(value.reason)
    if not isinstance(value, Tensor):
        raise NoTensor("has no local tensor")
    return value


def _part(attributes: Mapping[str, Any], rank: int) -> Part:
    spec = _attributes(attributes.get("_spec"))
    meta = spec.get("tensor_meta")
    shape = _integers(meta.args[0] if isinstance(meta, Record) and meta.args else None, "shape")
    coordinate = _integers(_attributes(spec.get("mesh")).get("_coordinate_on_dim"), "place on a device mesh")
    placements = tuple(_placement(item) for item in spec.get("placements") or ())
    if len(placements) != len(coordinate):
        raise NoTensor(f"has {len(placements)} placements on a device mesh of {len(coordinate)} dimensions")
    if any(placement.dim >= len(shape) for placement in placements):
        raise NoTensor(f"is {list(shape)} and split along another axis")
    local = _local(attributes.get("_local_tensor"))
    if len(local.shape) != len(shape):
        raise NoTensor(f"is {list(shape)}, but its part is {list(local.shape)}")
    return Part(rank, local, shape, coordinate, placements)


def _placement(value: object) -> Placement:
    if not isinstance(value, Record) or value.name not in (_REPLICATE, _SHARD, _STRIDED):
        name = value.name if isinstance(value, Record) else type(value).__name__
        raise UnsupportedError(f"a tensor placed as {name}", hint="save it replicated or sharded")
    if value.name == _REPLICATE:
        return Placement(_REPLICATE)
    attributes = _attributes(value)
    numbers = (attributes.get("dim"), attributes.get("split_factor", 1)) if attributes else (*value.args, 1)[:2]
    dim, factor = _integers(numbers, "axis that it is split along")
    return Placement(value.name, dim, factor)


def _boxes(value: Record, rank: int) -> Boxes:
    match value.state:
        case (list() as shards, Record() as metadata, *_):
            shape = _integers(_attributes(metadata).get("size"), "shape")
            return Boxes(rank, tuple(_box(_attributes(shard)) for shard in shards), shape)
    raise NoTensor("has no shards")


def _box(shard: Mapping[str, Any]) -> Box:
    offsets = _integers(_attributes(shard.get("metadata")).get("shard_offsets"), "place for its shard")
    return Box(offsets, _local(shard.get("tensor")))


def _join_mesh(parts: Sequence[Part]) -> tuple[Tensor, list[Copy]]:
    first = parts[0]
    if {part.placements for part in parts} != {first.placements}:
        raise ChunkError("ranks disagree on how it is split")
    sizes = [1 + max(places) for places in zip(*(part.coordinate for part in parts), strict=True)]
    at: dict[tuple[int, ...], list[Part]] = defaultdict(list)
    split = [axis for axis, placement in enumerate(first.placements) if placement.kind != _REPLICATE]
    for part in parts:
        at[tuple(part.coordinate[axis] for axis in split)].append(part)
    for place in _places([sizes[axis] for axis in split]):
        if place not in at:
            raise ChunkError(f"no rank holds its part {_shown(place)} of {_shown([sizes[axis] for axis in split])}")
    copies = [Copy(same[0], other) for same in at.values() for other in same[1:]]
    whole = {place: same[0].local for place, same in at.items()}
    for axis in _order([first.placements[axis] for axis in split], [sizes[axis] for axis in split]):
        whole = _joined(whole, axis, first.placements[split[axis]].dim)
    (tensor,) = whole.values()
    if tensor.shape != first.shape:
        raise ChunkError(f"its parts make up {list(tensor.shape)} and not {list(first.shape)}")
    return tensor, copies


def _places(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The places on a mesh, one by one: a file may state a huge mesh, so no list of them is made."""
    for number in range(prod(sizes)):
        place = []
        for size in reversed(sizes):
            number, index = divmod(number, size)
            place.append(index)
        yield tuple(reversed(place))


def _shown(place: Sequence[int]) -> str:
    return " x ".join(str(index) for index in place)


def _order(placements: Sequence[Placement], sizes: Sequence[int]) -> list[int]:
    """Dimensions of the mesh from the one that split last to the one that split first.

    They split from left to right, except that a strided one comes after those to its right which split its axis.
    """
    for axis, placement in enumerate(placements):
        later = zip(placements[axis + 1 :], sizes[axis + 1 :], strict=True)
        before = prod(size for other, size in later if other.dim == placement.dim)
        if placement.kind == _STRIDED and placement.split_factor != before:
            raise UnsupportedError("a tensor that its device mesh splits in an order that is not known")
    return sorted(range(len(placements)), key=lambda axis: (placements[axis].kind != _STRIDED, -axis))


def _joined(parts: Mapping[tuple[int, ...], Tensor], axis: int, dim: int) -> dict[tuple[int, ...], Tensor]:
    """The parts with those that differ in dimension `axis` of the mesh alone joined along axis `dim`."""
    rows: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
    for place in sorted(parts):
        rows[*place[:axis], 0, *place[axis + 1 :]].append(parts[place])
    return {place: _concatenated(row, dim) for place, row in rows.items()}


def _concatenated(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Tensors joined along an axis that was divided as by `torch.chunk`: equal parts, then a smaller, then nothing."""
    length = sum(tensor.shape[dim] for tensor in tensors)
    if [tensor.shape[dim] for tensor in tensors] != list(_chunk_sizes(length, len(tensors))):
        raise ChunkError(f"its parts have {_shown([tensor.shape[dim] for tensor in tensors])} of {length} indices")
    shape = list(tensors[0].shape)
    shape[dim] = length
    boxes, start = [], 0
    for tensor in tensors:
        if tensor.dtype != tensors[0].dtype:
            raise ChunkError(f"its parts are {tensors[0].dtype} and {tensor.dtype}")
        boxes.append(Box(tuple(start if axis == dim else 0 for axis in range(len(shape))), tensor))
        start += tensor.shape[dim]
    return join_chunks(tensors[0].dtype, tuple(shape), boxes)


def _chunk_sizes(length: int, count: int) -> Iterator[int]:
    share = -(-length // count)
    for number in range(count):
        yield max(0, min(share, length - number * share))
