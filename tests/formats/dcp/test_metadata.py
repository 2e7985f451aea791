"""`.metadata` is written by patterns of bytes: it must be what writing one record after the other gives."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import Any

import pytest

from ckptkit.dtypes import DTYPES, TORCH_DTYPE_NAMES
from ckptkit.formats.dcp.chunks import ChunkError, check_cover
from ckptkit.formats.dcp.reading import METADATA
from ckptkit.formats.dcp.writing import NewChunk, NewObject, lay_out_dcp
from ckptkit.formats.torch_file.pickles import Record, TorchDType, dumps
from ckptkit.formats.torch_file.pickling import Pattern, Writer, integer
from ckptkit.tensors import Tensor
from tests.formats.torch_file.torch_files import contents

pytest.importorskip("torch")

BF16 = DTYPES["BF16"]
MODULE = "torch.distributed.checkpoint.metadata"
STORAGE = "torch.distributed.checkpoint.filesystem"


def record(name: str, module: str = MODULE, **state: object) -> Record:
    return Record(module, name, state=state)


def described(
    shapes: Mapping[str, tuple[int, ...]], chunks: Iterable[NewChunk], objects: Iterable[NewObject], found: Any
) -> bytes:
    """The file, record by record; which bytes hold what is taken from the one that was `found`."""
    size = lru_cache(maxsize=4096)(lambda values: Record("torch", "Size", (values,)))
    places = iter(found.storage_data.values())

    def place() -> Record:
        info = next(places)
        parts = {"relative_path": info.relative_path, "offset": info.offset, "length": info.length}
        return record("_StorageInfo", STORAGE, **parts)

    layout = Record("torch.serialization", "_get_layout", ("torch.strided",))
    encoding = Record(MODULE, "_MEM_FORMAT_ENCODING", (0,))
    properties = (TorchDType(TORCH_DTYPE_NAMES[BF16]), layout, False, encoding, False)
    common = Record(MODULE, "TensorProperties", state=properties)
    boxes: dict[str, list[object]] = {key: [] for key in shapes}
    tensors: dict[str, object] = {
        key: record("TensorStorageMetadata", properties=common, size=size(shape), chunks=boxes[key])
        for key, shape in shapes.items()
    }
    stored: dict[object, object] = {}
    nothing = Record(MODULE, "BytesStorageMetadata")
    for new in objects:
        tensors[new.key] = nothing
        stored[record("MetadataIndex", fqn=new.key, index=None)] = place()
    for chunk in chunks:
        lead = len(chunk.offsets) - len(chunk.tensor.shape)
        axis = lead + (chunk.axis % len(chunk.tensor.shape) if chunk.tensor.shape else 0)
        sizes = list(chunk.sizes)
        if chunk.tensor.shape:
            sizes[axis] //= len(chunk.files)
        for number in range(len(chunk.files)):
            first = list(chunk.offsets)
            if chunk.tensor.shape:
                first[axis] += number * sizes[axis]
            offsets = size(tuple(first))
            boxes[chunk.key].append(record("ChunkStorageMetadata", offsets=offsets, sizes=size(tuple(sizes))))
            stored[record("MetadataIndex", fqn=chunk.key, index=None, offset=offsets)] = place()
    state = {
        "state_dict_metadata": tensors,
        "planner_data": None,
        "storage_data": stored,
        "storage_meta": None,
    }
    return dumps(Record(MODULE, "Metadata", state=state))


def experts(layers: int, count: int, tp: int) -> tuple[dict[str, tuple[int, ...]], list[NewChunk]]:
    """Stacked layers with experts, a norm and a matrix that is not stacked."""
    fc1, fc2 = Tensor.full(BF16, (4 * tp, 3)), Tensor.full(BF16, (3, 2 * tp))
    files = tuple(f"__{rank}_0.distcp" for rank in range(tp))
    chunks = [NewChunk("head", (0, 0), Tensor.full(BF16, (tp * 300, 3)), files)]
    for layer in range(layers):
        chunks.append(NewChunk("norm", (layer, 0), Tensor.full(BF16, (3,)), files[:1]))
        chunks += [NewChunk("fc1", (layer, expert, 0, 0), fc1, files * 2) for expert in range(count)]
        chunks += [NewChunk("fc2", (layer, expert, 0, 0), fc2, files, -1) for expert in range(count)]
    shapes = {
        "head": (tp * 300, 3),
        "norm": (layers, 3),
        "fc1": (layers, count, 4 * tp, 3),
        "fc2": (layers, count, 3, 2 * tp),
    }
    return shapes, chunks


def scattered(seed: int) -> tuple[dict[str, tuple[int, ...]], list[NewChunk]]:
    """Tensors of every number of axes in chunks of one shape each."""
    rng = random.Random(seed)
    shapes: dict[str, tuple[int, ...]] = {}
    chunks = []
    for number in range(rng.randrange(1, 30)):
        sizes = tuple(rng.randrange(1, 4) for _ in range(rng.randrange(5)))
        counts = tuple(rng.randrange(1, 4) for _ in sizes)
        key = f"tensor{number}"
        shapes[key] = tuple(a * b for a, b in zip(sizes, counts, strict=True))
        for at in product(*map(range, counts)):
            offsets = tuple(a * b for a, b in zip(at, sizes, strict=True))
            chunks.append(NewChunk(key, offsets, Tensor.full(BF16, sizes), (f"{rng.randrange(5)}",)))
    return shapes, chunks


def check(shapes: Mapping[str, tuple[int, ...]], chunks: Sequence[NewChunk], objects: Sequence[NewObject]) -> None:
    (file,) = (file for file in lay_out_dcp("", shapes, chunks, objects) if file.path == METADATA)
    piece = file.segments[0].tensor.bands[0].pieces[0]
    data = piece.data if isinstance(piece.data, bytes) else piece.data.read(0, file.size)
    assert data == described(shapes, chunks, objects, pickle.loads(data))


@pytest.mark.parametrize(("layers", "count", "tp"), [(1, 1, 1), (2, 3, 2), (3, 40, 8), (2, 300, 8)])
def test_experts(layers: int, count: int, tp: int) -> None:
    """The last one has more sizes between equal ones than are kept in mind."""
    objects = [NewObject(f"state/shard_{n}", b"x", f"__{n % tp}_0.distcp") for n in range(count)]
    check(*experts(layers, count, tp), objects)


@pytest.mark.parametrize("seed", range(12))
def test_any_chunks(seed: int) -> None:
    shapes, chunks = scattered(seed)
    check(shapes, chunks, [NewObject(f"object{n}", b"x", "0") for n in range(seed % 3)])


def test_a_batch_that_is_full() -> None:
    """Lists and dicts are written in groups of a thousand."""
    for count in (999, 1000, 1001, 2000):
        chunks = [NewChunk("x", (row, 0), Tensor.full(BF16, (1, 2)), ("f",)) for row in range(count)]
        check({"x": (count, 2)}, chunks, [])


def test_a_pattern_of_values_that_are_not_in_all() -> None:
    def writer() -> Writer:
        found = Writer()
        found.save([f"word{number}" for number in range(300)])
        return found

    strings = iter(["one", "another"])
    pattern = Pattern(writer(), lambda value: (record("MetadataIndex", text=next(strings), number=value),))
    with pytest.raises(TypeError, match="not in all objects"):
        pattern.save(integer(1))

    def twice(value: object) -> tuple[object, ...]:
        part = record("MetadataIndex", number=value)
        return (record("MetadataIndex", first=part, again=part),)

    pattern = Pattern(writer(), twice)
    with pytest.raises(TypeError, match="refer to a part of itself"):
        pattern.save(integer(1))


def test_a_pattern_writes_what_objects_give() -> None:
    rows = [(number, number**3) for number in range(600)]
    plain, fast = Writer(), Writer()
    pattern = Pattern(fast, lambda a, b: (record("MetadataIndex", fqn=a, index=None, offset=(b, a)),))
    kept = [record("MetadataIndex", fqn=a, index=None, offset=(b, a)) for a, b in rows]
    for (a, b), one in zip(rows, kept, strict=True):
        plain.save(one)
        pattern.save(integer(a), integer(b))
    assert fast.out == plain.out


@pytest.mark.parametrize(
    ("shape", "boxes", "match"),
    [
        ((4, 2), [((0, 0), (2, 2))], "leave holes"),
        ((4, 2), [((0, 0), (2, 2))] * 2, "overlap|holes"),
        ((4, 2), [((0, 0), (2, 2)), ((1, 0), (2, 2))], "overlap|holes"),
        ((4, 2), [((0, 0), (2, 2)), ((4, 0), (2, 2))], "does not lie inside"),
        ((4, 2), [((0, 0), (2, 2)), ((-2, 0), (2, 2))], "does not lie inside"),
        ((4, 2), [((0,), (2, 2)), ((2, 0), (2, 2))], "does not lie inside"),
        ((4, 2), [((0, 0), (2, 2)), ((2, 0), (2, 2)), ((2, 0), (2, 2))], "overlap"),
        ((3, 2), [((0, 0), (2, 2)), ((2, 0), (2, 2))], "does not lie inside"),
        ((4, 2), [((0, 0), (3, 2)), ((2, 0), (2, 1))], "overlap|holes"),
    ],
)
def test_boxes_that_do_not_cover(shape: tuple[int, ...], boxes: Any, match: str) -> None:
    with pytest.raises(ChunkError, match=match):
        check_cover(shape, boxes)


def test_boxes_that_cover() -> None:
    check_cover((4, 6), [((row, column), (2, 3)) for row in (0, 2) for column in (0, 3)])
    check_cover((4, 6), [((0, 0), (1, 6)), ((1, 0), (3, 2)), ((1, 2), (3, 4))])
    check_cover((), [((), ())])
    check_cover((0, 3), [((0, 0), (0, 3))])


def test_a_chunk_that_does_not_divide() -> None:
    for tensor, axis in ((Tensor.full(BF16, (5, 2)), 0), (Tensor.full(BF16, (2, 4, 2)), 1)):
        chunk = NewChunk("x", (0,) * len(tensor.shape), tensor, ("a", "b"), axis)
        with pytest.raises(ChunkError, match="does not divide into 2 chunks"):
            lay_out_dcp("", {"x": tensor.shape}, [chunk])


def test_small_metadata_is_kept_as_it_is() -> None:
    file = next(file for file in lay_out_dcp("", *scattered(1)) if file.path == METADATA)
    assert pickle.loads(contents(file.segments[0].tensor)).planner_data is None
