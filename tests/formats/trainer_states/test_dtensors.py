"""Parts of tensors on device meshes of every shape, split with torch's rule and joined again."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ckptkit.dtypes import DTYPES
from ckptkit.errors import InputError, UnsupportedError
from ckptkit.formats.dcp.chunks import Box, ChunkError
from ckptkit.formats.torch_file.pickles import Record, UnreadableTensor, loads
from ckptkit.formats.trainer_states.dtensors import Boxes, Held, NoTensor, Part, Placement, held, join
from ckptkit.tensors import Tensor
from tests.test_tensors import materialise

Array = NDArray[np.uint16]
Case = tuple[Array, tuple[int, ...], tuple[Placement, ...]]


def tensor_of(array: Array) -> Tensor:
    return Tensor.from_bytes(np.ascontiguousarray(array).tobytes(), DTYPES["U16"], array.shape)


def chunk(array: Array, size: int, dim: int) -> list[Array]:
    """As `torch.chunk`, with empty parts in place of absent ones."""
    share = -(-array.shape[dim] // size)
    return [
        np.take(array, range(*slice(i * share, (i + 1) * share).indices(array.shape[dim])), dim) for i in range(size)
    ]


def split(array: Array, sizes: tuple[int, ...], placements: tuple[Placement, ...]) -> list[Part]:
    """What each rank of a mesh holds; dimensions split from left to right, strided ones after those to their right."""
    order = [a for a, p in enumerate(placements) if p.kind == "Shard"]
    order += [a for a, p in reversed(list(enumerate(placements))) if p.kind == "_StridedShard"]
    parts = []
    for rank, coordinate in enumerate(product(*map(range, sizes))):
        local = array
        for axis in order:
            local = chunk(local, sizes[axis], placements[axis].dim)[coordinate[axis]]
        parts.append(Part(rank, tensor_of(local), array.shape, coordinate, placements))
    return parts


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    sizes = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    placements: list[Placement] = []
    for axis in reversed(range(len(sizes))):
        kind = draw(st.sampled_from(["Replicate", "Shard", "_StridedShard"]))
        dim = -1 if kind == "Replicate" else draw(st.integers(0, len(shape) - 1))
        later = [sizes[axis + 1 + i] for i, other in enumerate(placements) if other.dim == dim]
        strided = kind == "_StridedShard" and all(other.kind != "_StridedShard" for other in placements)
        if kind == "_StridedShard" and not strided:
            kind = "Shard"
            if any(other.kind == "_StridedShard" and other.dim == dim for other in placements):
                kind, dim = "Replicate", -1
        factor = int(np.prod(later)) if kind == "_StridedShard" else 1
        placements.insert(0, Placement(kind, dim, factor))
    array = np.arange(int(np.prod(shape)), dtype=np.uint16).reshape(shape)
    return array, sizes, tuple(placements)


@given(cases(), st.randoms())
def test_joining_is_the_inverse_of_splitting(case: Case, order: Any) -> None:
    array, sizes, placements = case
    parts: list[Held] = [*split(array, sizes, placements)]
    order.shuffle(parts)
    tensor, copies = join(parts)
    assert (materialise(tensor) == array).all()
    replicas = int(np.prod([size for size, place in zip(sizes, placements, strict=True) if place.kind == "Replicate"]))
    assert len(copies) == len(parts) - len(parts) // replicas
    for copy in copies:
        assert (materialise(copy.first.local) == materialise(copy.second.local)).all()


@given(cases(), st.data())
def test_a_missing_part(case: Case, data: st.DataObject) -> None:
    """Of a part that no other rank holds; the last rank along a dimension shows in the shape."""
    array, sizes, placements = case
    parts = split(array, sizes, placements)
    gone = data.draw(st.sampled_from(parts))
    alone = all(place.kind != "Replicate" or size == 1 for size, place in zip(sizes, placements, strict=True))
    rest: list[Held] = [part for part in parts if part is not gone]
    assume(rest and alone and gone.local.numel)
    with pytest.raises(ChunkError):
        join(rest)


ARRAY = np.arange(20, dtype=np.uint16).reshape(10, 2)
FLAT = (Placement("Shard", 0),)


def test_parts_that_do_not_fit() -> None:
    parts = split(ARRAY, (4,), FLAT)
    exchanged = [Part(p.rank, p.local, p.shape, (3 - p.coordinate[0],), p.placements) for p in parts]
    with pytest.raises(ChunkError, match="its parts have 1 x 3 x 3 x 3 of 10 indices"):
        join(exchanged)
    other = Part(3, parts[3].local, parts[3].shape, (3,), (Placement("Replicate"),))
    with pytest.raises(ChunkError, match="ranks disagree on how it is split"):
        join([*parts[:3], other])
    with pytest.raises(ChunkError, match=r"ranks disagree on what it is \(\[10, 2\] or \[3, 2\]\)"):
        join([*parts[:3], Part(3, parts[3].local, (3, 2), (3,), FLAT)])
    wide = Tensor.from_bytes(bytes(8), DTYPES["U32"], (1, 2))
    with pytest.raises(ChunkError, match="its parts are U16 and U32"):
        join([*parts[:3], Part(3, wide, (10, 2), (3,), FLAT)])
    strided = (Placement("_StridedShard", 0, 3), Placement("Shard", 0))
    with pytest.raises(UnsupportedError, match="in an order that is not known"):
        join(split(ARRAY, (2, 2), strided))


def test_boxes_of_sharded_tensors() -> None:
    boxes = [Box((0, 0), tensor_of(ARRAY[:4])), Box((4, 0), tensor_of(ARRAY[4:]))]
    parts: list[Held] = [Boxes(0, (boxes[1],), (10, 2)), Boxes(1, (boxes[0],), (10, 2)), Boxes(2, (), (10, 2))]
    tensor, copies = join(parts)
    assert (materialise(tensor) == ARRAY).all() and not copies
    with pytest.raises(ChunkError, match="leave holes"):
        join(parts[1:])
    with pytest.raises(ChunkError, match="overlap"):
        join([parts[0], *parts])
    with pytest.raises(ChunkError, match="no rank holds anything of it"):
        join(parts[2:])


def dtensor(**changes: Any) -> Record:
    values = {"coordinate": (0,), "dim": 0, "kind": "Shard", "shape": (3, 2), "local": tensor_of(ARRAY[:3]), **changes}
    placement = Record("torch.distributed.tensor.placement_types", values["kind"], (), {"dim": values["dim"]})
    mesh = Record("torch.distributed.device_mesh", "DeviceMesh", (), {"_coordinate_on_dim": values["coordinate"]})
    meta = Record("torch.distributed.tensor._dtensor_spec", "TensorMeta", (values["shape"], (2, 1), None))
    spec = Record("m", "DTensorSpec", (), {"mesh": mesh, "placements": (placement,), "tensor_meta": meta})
    return Record("torch.distributed.tensor", "DTensor", (), (None, {"_local_tensor": values["local"], "_spec": spec}))


def test_a_dtensor() -> None:
    part = held(dtensor(), 0)
    assert isinstance(part, Part)
    assert (part.shape, part.coordinate, part.placements) == ((3, 2), (0,), FLAT)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"coordinate": None}, "has no place on a device mesh"),
        ({"coordinate": (0, 1)}, "has 1 placements on a device mesh of 2 dimensions"),
        ({"coordinate": (-1,)}, "has no place on a device mesh"),
        ({"dim": 2}, "split along another axis"),
        ({"dim": -1}, "has no axis that it is split along"),
        ({"shape": "3"}, "has no shape"),
        ({"shape": (3,)}, "but its part is"),
        ({"local": None}, "has no local tensor"),
        ({"local": UnreadableTensor("is sparse")}, "is sparse"),
    ],
    ids=str,
)
def test_a_dtensor_that_says_too_little(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(NoTensor, match=reason):
        held(dtensor(**changes), 0)


@pytest.mark.parametrize(
    "value", [3, "x", Record("m", "Other"), Record("m", "ShardedTensor"), UnreadableTensor("is sparse")]
)
def test_what_is_no_tensor(value: object) -> None:
    with pytest.raises(NoTensor):
        held(value, 0)


def test_a_partial_sum() -> None:
    with pytest.raises(UnsupportedError, match="a tensor placed as Partial"):
        held(dtensor(kind="Partial"), 0)


def test_only_listed_classes_inside_classes_are_named() -> None:
    """Protocol 2 spells `ShardedTensor.ProcessGroupState` as a call of `getattr`, which nothing else may use."""
    api = b"ctorch.distributed._shard.sharded_tensor.api\nShardedTensor\n"
    nested = loads(b"\x80\x02c__builtin__\ngetattr\n" + api + b"X\x11\x00\x00\x00ProcessGroupState\x86R)\x81.", "x")
    assert isinstance(nested, Record) and nested.name == "ShardedTensor.ProcessGroupState"
    with pytest.raises(InputError, match=r"names builtins\.getattr, which is not on the list"):
        loads(b"\x80\x02c__builtin__\ngetattr\n" + api + b"X\x08\x00\x00\x00__init__\x86R.", "x")
