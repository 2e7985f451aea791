"""torch.save files against torch itself, both ways; hostile and damaged ones are refused by one clear error."""

from __future__ import annotations

import argparse
import functools
import io
import pickle
import random
import signal
import struct
import sys
import types
import zipfile
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptkit.dtypes import DTYPES, DTYPES_BY_TORCH_NAME, TORCH_DTYPE_NAMES
from ckptkit.errors import CkptkitError, InputError, UnsupportedError
from ckptkit.formats.torch_file.pickles import (
    ClassName,
    Namespace,
    Record,
    TorchDType,
    UnreadableTensor,
    dumps,
    lay_out_torch_file,
    loads,
    read_torch_file,
)
from ckptkit.formats.torch_file.torch_types import STORAGES_BY_DTYPE
from ckptkit.formats.torch_file.zipfiles import lay_out_archive
from ckptkit.io.plan import OutputFile
from ckptkit.tensors import Region, Tensor
from tests.formats.torch_file.torch_files import as_torch, contents, leaves, torch_bytes, write_out

ALL_DTYPES = sorted(DTYPES)

OPEN = f"{open.__module__}.open"  # of `io`, and since Python 3.12 of `_io`
FROM_BYTES = f"{torch.storage._load_from_bytes.__module__}\n{torch.storage._load_from_bytes.__name__}"


def make(name: str, *shape: int) -> torch.Tensor:
    """Random bits as a torch tensor of the type that `name` stands for."""
    dtype = getattr(torch, TORCH_DTYPE_NAMES[DTYPES[name]])
    size = int(np.prod(shape)) * DTYPES[name].itemsize
    bits = np.random.default_rng(size).integers(0, 2 if name == "BOOL" else 256, size, dtype=np.uint8)
    return torch.from_numpy(bits).view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


def ours(name: str, *shape: int) -> Tensor:
    """The same bits at hand."""
    return Tensor.from_bytes(torch_bytes(make(name, *shape)), DTYPES[name], shape)


def saved(tmp_path: Path, obj: object, name: str = "model_optim_rng.pt", **options: Any) -> Path:
    torch.save(obj, tmp_path / name, **options)
    return tmp_path / name


def read(tmp_path: Path, obj: object, **options: Any) -> Any:
    return read_torch_file(saved(tmp_path, obj, **options))


def check(found: object, expected: torch.Tensor) -> None:
    assert isinstance(found, Tensor)
    assert TORCH_DTYPE_NAMES[found.dtype] == str(expected.dtype).removeprefix("torch.")
    assert found.shape == tuple(expected.shape)
    assert contents(found) == torch_bytes(expected)


# Types


def test_every_dtype_has_the_name_and_size_that_torch_gives_it() -> None:
    assert sorted(dtype.name for dtype in TORCH_DTYPE_NAMES) == ALL_DTYPES
    for dtype, name in TORCH_DTYPE_NAMES.items():
        assert getattr(torch, name).itemsize == dtype.itemsize
        assert DTYPES_BY_TORCH_NAME[name] is dtype
        assert TorchDType(name).dtype is dtype
    typed = {name: kind for kind, name in torch.storage._storage_type_to_dtype_map().items()}
    for dtype, storage in STORAGES_BY_DTYPE.items():
        assert typed[getattr(torch, TORCH_DTYPE_NAMES[dtype])] == storage
    new = {getattr(torch, TORCH_DTYPE_NAMES[d]) for d in TORCH_DTYPE_NAMES if d not in STORAGES_BY_DTYPE}
    assert new <= torch.storage._new_dtypes()


def test_every_torch_dtype_is_listed() -> None:
    for dtype in {value for value in vars(torch).values() if isinstance(value, torch.dtype)}:
        name = str(dtype).removeprefix("torch.")
        assert loads(pickle.dumps(dtype, 2), "x") == TorchDType(name)


# Reading what torch wrote


@pytest.mark.parametrize("name", ALL_DTYPES)
def test_tensors_of_every_dtype(tmp_path: Path, name: str) -> None:
    tensors = {"a": make(name, 3, 5), "b": make(name, 7), "scalar": make(name), "empty": make(name, 0, 4)}
    found = read(tmp_path, tensors)
    assert list(found) == list(tensors)
    for key, tensor in tensors.items():
        check(found[key], tensor)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol(tmp_path: Path, protocol: int) -> None:
    obj = {"t": make("BF16", 2, 3), "args": argparse.Namespace(a=b"\xff\0", d=torch.bfloat16, s={1, 2}), "n": 1 << 70}
    found = read(tmp_path, obj, pickle_protocol=protocol)
    check(found["t"], obj["t"])
    assert found["args"].fields == {"a": b"\xff\0", "d": TorchDType("bfloat16"), "s": {1, 2}}
    assert found["n"] == 1 << 70


def test_a_tensor_alone(tmp_path: Path) -> None:
    check(read(tmp_path, make("F32", 2, 2)), make("F32", 2, 2))


def test_shared_storages_and_shared_objects(tmp_path: Path) -> None:
    base = make("F32", 6, 8)
    found = read(tmp_path, {"base": base, "again": base, "bottom": base[4:], "flat": base.view(-1)[5:9]})
    assert found["base"] is found["again"]
    check(found["bottom"], base[4:])
    check(found["flat"], base.view(-1)[5:9])
    assert found["bottom"].bands[0].pieces[0].offset == found["base"].bands[0].pieces[0].offset + 4 * 8 * 4


@pytest.mark.parametrize(
    ("view", "pitch"),
    [
        (lambda t: t[:, 2:5], 16),
        (lambda t: t.view(3, 2, 8)[..., 1:3], 16),
        (lambda t: t.view(6, 1, 8)[1:5, :, 4:], 16),
        (lambda t: t[::2], 32),
        (lambda t: t[2:3, 1:4], 6),
        (lambda t: t[:, 3], 16),
        (lambda t: t.view(-1)[1::3], 6),
        (lambda t: t[3, 3], 2),
        (lambda t: t[:, 7:], 16),
    ],
)
def test_views_become_regions_with_a_pitch(tmp_path: Path, view: Any, pitch: int) -> None:
    tensor = view(make("BF16", 6, 8))
    found = read(tmp_path, tensor)
    check(found, tensor)
    (band,) = found.bands
    assert [piece.pitch for piece in band.pieces] == [pitch]


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.t(),
        lambda t: t[:, ::2],
        lambda t: t[:1].expand(3, 8),
        lambda t: t.view(3, 2, 8)[:, 0:1, :].expand(3, 2, 8),
        lambda t: t.view(2, 3, 8)[:, :2],
        lambda t: t.view(2, 3, 8).transpose(0, 1),
        lambda t: t.to_sparse(),
        lambda t: t.to("meta"),
        lambda t: torch.complex(t, t).conj(),
        lambda t: t.to(torch.complex128),
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    ],
)
def test_tensors_that_are_no_rows_are_marked(tmp_path: Path, view: Any) -> None:
    found = read(tmp_path, {"junk": view(torch.randn(6, 8)), "weight": make("F32", 2)})
    check(found["weight"], make("F32", 2))
    assert isinstance(found["junk"], UnreadableTensor)
    error = found["junk"].error("decoder.weight", "a.pt")
    assert isinstance(error, InputError)
    assert str(error).startswith("a.pt: tensor decoder.weight ")


def test_a_tensor_pickled_as_bytes_is_marked() -> None:
    found = loads(pickle.dumps({"rng": torch.zeros(2, 3)}), "x")
    assert found == {"rng": UnreadableTensor("lies in bytes inside the pickle", (2, 3))}


def test_names_of_megatron_core_0_19() -> None:
    """It replaces a function of torch's by one of its own, and has enums that earlier releases lack."""
    data = pickle.dumps({"rng": torch.zeros(2, 3)}, 2)
    renamed = data.replace(f"c{FROM_BYTES}\n".encode(), b"cmegatron.core.safe_globals\nsafe_load_from_bytes\n")
    assert b"safe_load_from_bytes" in renamed
    assert loads(renamed, "x") == {"rng": UnreadableTensor("lies in bytes inside the pickle", (2, 3))}
    for name in ("CudaGraphModule", "InferenceCudaGraphScope"):
        found: Any = loads(f"\x80\x02cmegatron.core.transformer.enums\n{name}\nK\x01\x85R.".encode("latin-1"), "x")
        assert (found.name, found.args) == (name, (1,))


def test_a_module_with_its_state_dict(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    state = module.state_dict()
    assert state._metadata, "the case needs an OrderedDict with attributes"
    found = read(tmp_path, state)
    assert type(found) is dict
    for name, tensor in state.items():
        check(found[name], tensor)


def test_parameters_and_tensors_with_attributes(tmp_path: Path) -> None:
    plain, marked, subclassed = (torch.nn.Parameter(make("F16", 2, 3)) for _ in range(3))
    marked.tensor_model_parallel = True  # as Megatron does
    buffer = torch.nn.Buffer(make("F16", 2, 3))
    tensor = make("F16", 2, 3)
    tensor.note = "x"
    found = read(tmp_path, [plain, marked, subclassed, buffer, tensor])
    for leaf in found:
        check(leaf, make("F16", 2, 3))


def test_a_training_checkpoint(tmp_path: Path) -> None:
    obj = {
        "args": argparse.Namespace(
            params_dtype=torch.bfloat16,
            exit_signal=signal.SIGTERM,
            save=Path("/a/b"),
            size=torch.Size([2, 3]),
            device=torch.device("cpu"),
            nested=types.SimpleNamespace(x=1.5),
            counter=Counter("aab"),
            default=defaultdict(list, {"k": [1]}),
            kind=int,
            z=1 + 2j,
        ),
        "rng_state": [{"random": random.getstate(), "np": np.random.get_state(), "torch": torch.get_rng_state()}],
        "extra": io.BytesIO(b"payload"),
        "scalar": np.float64(0.5),
        "iteration": 3,
        "checkpoint_version": 3.0,
    }
    found = read(tmp_path, obj)
    fields = found["args"].fields
    assert fields["params_dtype"] == TorchDType("bfloat16")
    assert (fields["exit_signal"].name, fields["exit_signal"].args) == ("Signals", (signal.SIGTERM,))
    assert (fields["save"].name, fields["save"].args) == ("PosixPath", ("/", "a", "b"))
    assert fields["size"] == (2, 3)
    assert fields["device"].args == ("cpu",)
    assert fields["nested"] == Namespace({"x": 1.5})
    assert (fields["counter"], fields["default"], fields["z"]) == ({"a": 2, "b": 1}, {"k": [1]}, 1 + 2j)
    assert fields["kind"] == ClassName("builtins", "int")
    rng = found["rng_state"][0]
    assert rng["random"] == random.getstate()
    assert rng["np"][0] == "MT19937"
    assert rng["np"][1].state[-1] == np.random.get_state()[1].tobytes()
    check(rng["torch"], torch.get_rng_state())
    assert found["extra"].state[0] == b"payload"
    assert found["scalar"].name == "scalar"
    assert (found["iteration"], found["checkpoint_version"]) == (3, 3.0)


def test_everything_that_megatron_allows_itself(tmp_path: Path) -> None:
    safe_globals = pytest.importorskip("megatron.core.safe_globals")
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    obj = {
        cls.__name__: next(iter(cls)) if isinstance(cls, type(signal.Signals)) else cls
        for cls in safe_globals.SAFE_GLOBALS
    }
    obj["OptimizerConfig"] = safe_globals.OptimizerConfig()
    obj["layout"] = PipelineParallelLayerLayout("Et|tL", 2)
    found = read(tmp_path, obj)
    assert found["ModelType"].args == (obj["ModelType"].value,)
    assert found["OptimizerConfig"].state["lr"] is None
    assert found["layout"].state["input_data"] == "Et|tL"
    assert {name for name, leaf in found.items() if not isinstance(leaf, Record | ClassName)} == set()


def test_distributed_tensors(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    if dist.is_initialized():  # a model for packed inputs keeps its group
        from ckptkit.megatron import parallel

        parallel.finalize()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
        whole = torch.arange(12.0).reshape(3, 4)
        shard = distribute_tensor(whole, mesh, [Shard(0), Replicate()])
        path = saved(tmp_path, {"shard": shard, "parameter": torch.nn.Parameter(shard)})
    finally:
        dist.destroy_process_group()
    found: Any = read_torch_file(path)
    for leaf in found.values():
        assert (leaf.module, leaf.name) == ("torch.distributed.tensor", "DTensor")
        _, attributes = leaf.state
        check(attributes["_local_tensor"], whole)
        spec = attributes["_spec"].state
        assert [placement.name for placement in spec["placements"]] == ["Shard", "Replicate"]
        assert spec["mesh"].state["_mesh_dim_names"] == ("dp", "tp")


def test_more_than_64_tensors(tmp_path: Path) -> None:
    tensors = {f"layer.{i}": torch.full((3,), i) for i in range(300)}
    found = read(tmp_path, tensors)
    for name, tensor in tensors.items():
        check(found[name], tensor)


def test_one_archive_among_several_in_a_file(tmp_path: Path) -> None:
    tensors = [make("BF16", 3, 5), make("F32", 2), make("I64", 4)]
    parts = []
    for tensor in tensors:
        torch.save(tensor, buffer := io.BytesIO())
        parts.append(buffer.getvalue())
    path = tmp_path / "__0_0.distcp"
    path.write_bytes(b"".join(parts))
    start = 0
    for tensor, part in zip(tensors, parts, strict=True):
        check(read_torch_file(path, start, len(part)), tensor)
        start += len(part)
    with pytest.raises(InputError, match="are wanted, the file has"):
        read_torch_file(path, start, 10)


# Distributed checkpoint metadata


@pytest.fixture
def distributed(tmp_path: Path) -> Path:
    import torch.distributed.checkpoint as dcp

    state = {"w": make("BF16", 3, 5), "b": make("F32", 7), "object": [None]}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    return tmp_path / "dcp"


def test_metadata(distributed: Path) -> None:
    found: Any = loads((distributed / ".metadata").read_bytes(), ".metadata")
    tensors = found.state["state_dict_metadata"]
    assert tensors["w"].state["size"] == (3, 5)
    assert tensors["w"].state["properties"].state[0] == TorchDType("bfloat16")
    assert tensors["object"].name == "BytesStorageMetadata"
    places = {key.state["fqn"]: info.state for key, info in found.state["storage_data"].items()}
    shard = distributed / places["w"]["relative_path"]
    check(read_torch_file(shard, places["w"]["offset"], places["w"]["length"]), make("BF16", 3, 5))
    assert read_torch_file(shard, places["object"]["offset"], places["object"]["length"]) == [None]


def test_metadata_written_again_is_loaded_by_torch(distributed: Path) -> None:
    import torch.distributed.checkpoint as dcp

    raw = (distributed / ".metadata").read_bytes()
    again = dumps(loads(raw, ".metadata"))
    assert pickle.loads(again) == pickle.loads(raw)
    (distributed / ".metadata").write_bytes(again)
    state = {"w": torch.zeros(3, 5, dtype=torch.bfloat16), "b": torch.zeros(7)}
    dcp.load(state, checkpoint_id=distributed, no_dist=True)
    assert torch_bytes(state["w"]) == torch_bytes(make("BF16", 3, 5))


def test_a_bare_pickle_has_no_tensors() -> None:
    with pytest.raises(TypeError, match="tensor a has no place"):
        dumps({"a": ours("F32", 2)})


# Writing


def layout_of(tmp_path: Path, obj: object) -> Path:
    return write_out(lay_out_torch_file("model_optim_rng.pt", obj), tmp_path)


def load(path: Path, mmap: bool = False) -> Any:
    return torch.load(path, weights_only=True, mmap=mmap)


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_what_we_write(tmp_path: Path, mmap: bool) -> None:
    tensors = {
        f"{name}.{shape}": ours(name, *shape) for name in ALL_DTYPES for shape in [(3, 5), (), (0, 4), (1, 2, 3)]
    }
    path = layout_of(tmp_path, {"model": tensors, "iteration": 0})
    found = load(path, mmap)
    assert list(found["model"]) == list(tensors)
    for key, tensor in tensors.items():
        assert str(found["model"][key].dtype) == f"torch.{TORCH_DTYPE_NAMES[tensor.dtype]}"
        assert tuple(found["model"][key].shape) == tensor.shape
        assert torch_bytes(found["model"][key]) == contents(tensor)
    assert zipfile.ZipFile(path).testzip() is None


def test_casts_are_honoured(tmp_path: Path) -> None:
    source = ours("F32", 4, 3)
    path = layout_of(tmp_path, {"w": source.astype(DTYPES["BF16"])})
    torch.testing.assert_close(load(path)["w"], as_torch(source).bfloat16(), equal_nan=True)
    assert zipfile.ZipFile(path).testzip() is None


def test_plain_values_survive(tmp_path: Path) -> None:
    obj = {
        "args": Namespace({"d": TorchDType("bfloat16"), "none": None, "list": [1, [2, ()]], "e": b""}),
        "empty": Namespace(),
        "b": bytes(range(256)),
        "text": "ä\ud800",
        "ordered": OrderedDict([("a", 1), ("b", 2)]),
        "ints": [
            0,
            255,
            256,
            65535,
            65536,
            -1,
            -129,
            -(1 << 31),
            1 << 31,
            -(1 << 31) - 1,
            1 << 63,
            -(1 << 63),
            1 << 2000,
        ],
        "floats": [0.5, -0.0, 1e308, float("inf")],
        "bools": (True, False),
        "tuples": ((1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        7: {},
        -7: [],
    }
    path = layout_of(tmp_path, obj)
    with torch.serialization.safe_globals([argparse.Namespace]):
        found = torch.load(path, weights_only=True)
    assert vars(found.pop("args")) == {"d": torch.bfloat16, "none": None, "list": [1, [2, ()]], "e": b""}
    assert vars(found.pop("empty")) == {}
    assert type(found["ordered"]) is OrderedDict
    assert found == {key: value for key, value in obj.items() if key not in ("args", "empty")}
    assert read_torch_file(path) == obj


def test_the_same_object_stays_the_same(tmp_path: Path) -> None:
    tensor, items = ours("F32", 2, 2), [1, 2]
    file = lay_out_torch_file(
        "a.pt", {"embed": tensor, "head": tensor, "other": ours("F32", 2, 2), "x": items, "y": items}
    )
    assert file.tensors == 2
    found = load(write_out(file, tmp_path))
    assert found["embed"] is found["head"]
    assert found["x"] is found["y"]
    assert found["other"].data_ptr() != found["embed"].data_ptr()


def test_segments_are_named_by_their_keys() -> None:
    file = lay_out_torch_file("a.pt", {"model": {"decoder.w": ours("F32", 2)}, "n": 1})
    assert [segment.name for segment in file.segments if segment.name] == ["model.decoder.w"]


OBJECTS: list[Any] = [
    {},
    {"a": ("BF16", 2, 3)},
    {f"layer.{i}.weight": ("F32", 2, i % 3) for i in range(130)},
    {"v3": ("U16", 3), "fp8": ("F8_E4M3", 2, 2), "scalar": ("F64",), "empty": ("I64", 0, 2, 1)},
    OrderedDict([(f"k{i}", i) for i in range(5)]),
    OrderedDict(one=1),
    OrderedDict(),
    *({i: i * 7 for i in range(n)} for n in (1, 999, 1000, 1001, 2000)),
    *(OrderedDict((i, i * 7) for i in range(n)) for n in (1000, 1001, 2001)),
    *(list(range(n)) for n in (1, 1000, 1001, 2000)),
    {"args": Namespace({"a": 1, "dtype": TorchDType("bfloat16")}), "n": 3.5, "t": (1, 2), "l": ["x", "x"]},
    {"bytes": b"\0\xffabc", "ints": [1 << 40, -(1 << 40), -(1 << 39), -1, 300]},
]


def both(obj: Any) -> tuple[Any, Any]:
    """An object for us and for torch; `(dtype, *shape)` stands for a tensor."""
    if isinstance(obj, tuple) and isinstance(obj[0], str):
        return ours(*obj), make(*obj)
    if isinstance(obj, dict):
        pairs = [(key, *both(value)) for key, value in obj.items()]
        kind = type(obj)
        return kind((key, a) for key, a, _ in pairs), kind((key, b) for key, _, b in pairs)
    if isinstance(obj, Namespace):
        return obj, argparse.Namespace(**both(obj.fields)[1])
    return (obj, getattr(torch, obj.name)) if isinstance(obj, TorchDType) else (obj, obj)


@pytest.mark.parametrize("obj", OBJECTS)
def test_our_bytes_are_those_of_torch(tmp_path: Path, obj: Any) -> None:
    """All of them, except for the identity that torch derives from the contents (and its checksums)."""
    mine, theirs = both(obj)
    expected = saved(tmp_path, theirs)
    with zipfile.ZipFile(expected) as archive:
        identity = archive.read("model_optim_rng/.data/serialization_id")
    found = write_out(lay_out_torch_file("model_optim_rng.pt", mine), tmp_path / "ours")
    with zipfile.ZipFile(found) as archive:
        own = archive.read("model_optim_rng/.data/serialization_id")
        crc = archive.getinfo("model_optim_rng/.data/serialization_id").CRC
    assert len(own) == len(identity)
    with zipfile.ZipFile(expected) as archive:
        theirs_crc = archive.getinfo("model_optim_rng/.data/serialization_id").CRC
    swapped = expected.read_bytes().replace(identity, own)
    assert found.read_bytes() == swapped.replace(struct.pack("<I", theirs_crc), struct.pack("<I", crc))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("release/mp_rank_00/model_optim_rng.pt", "model_optim_rng"),
        ("a.b.pt", "a.b"),
        ("noext", "noext"),
        (".a.pt", ".a"),
        ("x y.pt", "x y"),
        ("é.pt", "archive"),
    ],
)
def test_archives_are_named_as_torch_names_them(tmp_path: Path, path: str, expected: str) -> None:
    torch.save({}, tmp_path / Path(path).name)
    for file in (tmp_path / Path(path).name, write_out(lay_out_torch_file(path, {}), tmp_path / "ours")):
        assert zipfile.ZipFile(file).namelist()[0] == f"{expected}/data.pkl"


def test_an_archive_can_be_named() -> None:
    file = lay_out_torch_file("__0_0.distcp", ours("F32", 2), archive_name="archive")
    assert b"archive/data.pkl" in contents(file.segments[0].tensor)


def test_offsets_that_torch_calculates_are_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.serialization import config

    path = layout_of(tmp_path, {f"w{i}": ours("F32", i % 5, 3) for i in range(30)})
    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")
    with config.patch("load.calculate_storage_offsets", True):
        found = load(path, mmap=True)
    assert torch_bytes(found["w4"]) == contents(ours("F32", 4, 3))


def test_the_same_input_gives_the_same_layout() -> None:
    def build() -> OutputFile:
        key = "".join(["we", "ight"])
        return lay_out_torch_file(
            "a.pt", {key: ours("F32", 2), "args": Namespace({"x": [key], "y": (1, "we" + "ight")})}
        )

    assert build() == build()


@pytest.mark.parametrize(
    "value",
    [
        {1},
        Path("a"),
        np.float32(1),
        object(),
        UnreadableTensor("is sparse"),
        Record("os", "system", ("true",)),
        ClassName("builtins", "eval"),
        TorchDType("load"),
        Namespace({1: 2}),  # type: ignore[dict-item]
        1 << 2100,
        signal.SIGTERM,
    ],
)
def test_other_types_are_not_written(value: object) -> None:
    with pytest.raises(TypeError):
        lay_out_torch_file("a.pt", {"model": {"x": [value]}})


def test_the_place_of_a_wrong_type_is_named() -> None:
    with pytest.raises(TypeError, match=r"a set at model\.x cannot"):
        lay_out_torch_file("a.pt", {"model": {"x": {1}}})


# Hostile pickles


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *args: object) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


def hostile(sentinel: Path) -> dict[str, object]:
    """What pickles as a call that would leave a file behind, by the name that it calls."""
    import os
    import subprocess

    command, code = f"touch {sentinel}", f"open({str(sentinel)!r}, 'w')"
    return {
        "posix.system": Call(os.system, command),
        "subprocess.Popen": Call(subprocess.Popen, ["touch", str(sentinel)]),
        "builtins.eval": Call(eval, code),
        "builtins.exec": Call(exec, code),
        OPEN: Call(open, str(sentinel), "w"),
        "builtins.getattr": Call(getattr, "x", "upper"),
        "functools.partial": functools.partial(print),
        "torch.hub.load": Call(torch.hub.load, "a/b", "c"),
    }


HOSTILE = ["posix.system", "subprocess.Popen", "builtins.eval", "builtins.exec", OPEN, "builtins.getattr"]
HOSTILE += ["functools.partial", "torch.hub.load"]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("protocol", [2, 4])
def test_code_is_refused_and_not_run(tmp_path: Path, name: str, protocol: int) -> None:
    data = pickle.dumps(hostile(tmp_path / "sentinel")[name], protocol)
    path = tmp_path / "a.pt"
    write_archive(path, data)
    for attempt in (lambda: read_torch_file(path), lambda: loads(data, path)):
        with pytest.raises(InputError) as caught:
            attempt()
        spelled = name.replace("subprocess", "commands") if protocol == 2 else name  # as in Python 2
        shown = f"its pickle names {spelled}, which is not on the list of things a checkpoint needs"
        assert str(caught.value) == f"{path}: {shown}; nothing was run"
    assert not (tmp_path / "sentinel").exists()
    if name in ("builtins.eval", "builtins.exec", OPEN):
        pickle.loads(data)
        assert (tmp_path / "sentinel").exists(), "the case would not have shown a run"


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02cthis\ns\n.",
        b"\x80\x04\x8c\x04this\x8c\x01s\x93.",
        b"\x80\x02(cthis\ns\no.",
        b"(ithis\ns\n.",
    ],
)
def test_names_are_not_even_imported(data: bytes) -> None:
    sys.modules.pop("this", None)
    with pytest.raises(InputError):
        loads(data, "x")
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cut off"),
        (b"\x80\x02", "cut off"),
        (b"\x80\x02}", "cut off"),
        (b"\x80\x02.", "takes more values"),
        (b"\x80\x09N.", "protocol 9"),
        (b"\x80\x02\x82\x01.", "is not one that checkpoints use"),  # EXT1
        (b"\x80\x02\x83\x01\x00.", "is not one that checkpoints use"),
        (b"\x80\x02\x84\x01\x00\x00\x00.", "is not one that checkpoints use"),
        (b"Pstorage\n.", "is not one that checkpoints use"),
        (b"\x80\x05\x97.", "is not one that checkpoints use"),  # NEXT_BUFFER
        (b"\x80\x02K\x01Q.", "not a storage"),
        (b"\x80\x02X\x07\x00\x00\x00storageQ.", "not a storage"),
        (b"\x80\x02h\x00.", "used before it is made"),
        (b"\x80\x02X\xff\xff\xff\xff.", "cut off"),
        (b"\x80\x02X\x01\x00\x00\x00\xff.", "not valid text"),
        (b"\x80\x04\x8d" + b"\xff" * 8 + b".", "cut off"),
        (b"\x80\x02\x8b\xff\xff\xff\x7f.", "an integer of"),
        (b"\x80\x02t.", "a mark is missing"),
        (b"\x80\x02}(K\x01u.", "a key without a value"),
        (b"\x80\x02}]K\x01s.", "a key of type list"),
        (b"\x80\x04\x8f(]\x90.", "a key of type list"),
        (b"\x80\x02K\x01K\x02a.", "items for something that is no list"),
        (b"\x80\x02NNR.", "a call without arguments"),
        (b"\x80\x02N)R.", "a call of a NoneType"),
        (b"\x80\x02ctorch\nfloat32\n)R.", "a call of a TorchDType"),
        (b"\x80\x02ctorch\nSize\nN\x85R.", "torch.Size"),
        (b"\x80\x02ctorch\nSize\nJ\xff\xff\xff\xff\x85\x85R.", "proper sizes"),
        (b"\x80\x02N}b.", "a state for a NoneType"),
        (b"\x80\x02ctorch\nSize\n}b.", "a state for a ClassName"),
        (b"\x80\x02cargparse\nNamespace\n)R}K\x01Nsb.", "no names"),
        (b"\x80\x02cargparse\nNamespace\nN\x85R.", "a namespace that is made of"),
        (b"\x80\x04cargparse\nNamespace\n)}NNs\x92.", "keyword arguments"),
        (b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n)R.", "not rebuilt as torch does"),
        (b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\nq\x00(h\x00h\x00)}tR.", "not rebuilt as torch does"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "not rebuilt as torch does"),
        (b"\x80\x02ctorch._utils\n_rebuild_parameter\nN\x85R.", "a parameter without data"),
        (b"\x80\x02c__builtin__\nset\nN\x85R.", "a set that is made of"),
    ],
)
def test_pickles_that_make_no_sense(data: bytes, reason: str) -> None:
    with pytest.raises(InputError, match="its pickle is damaged at byte") as caught:
        loads(data, "a.pt")
    assert reason in str(caught.value)


def test_a_large_memo_index_costs_nothing() -> None:
    assert loads(b"\x80\x02Nr\xff\xff\xff\x7f.", "x") is None


def test_nesting_without_end_is_refused() -> None:
    deep = b")" + b"\x85" * 100_000
    for data in (b"\x80\x02" + deep + b".", b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."):
        with pytest.raises(InputError, match="nests more than"):
            loads(data, "x")
    with pytest.raises(InputError, match="too many parts"):
        loads(b"\x80\x02}" + deep + b"Ns.", "x")
    doubled = b"\x80\x02}K\x01" + b"2\x86" * 60 + b"Ns."
    with pytest.raises(InputError, match="too many parts"):
        loads(doubled, "x")


def test_containers_that_contain_themselves_are_refused() -> None:
    loop: list[object] = []
    loop.append({"x": loop})
    with pytest.raises(InputError, match="contains itself"):
        loads(pickle.dumps(loop), "x")
    assert loads(pickle.dumps([twice := [1], twice]), "x") == [[1], [1]]


# Damaged files


def write_archive(path: Path, data: bytes, *, storages: dict[str, bytes] | None = None, **records: bytes) -> None:
    """A container around any pickle, with right checksums."""
    names: dict[str, bytes] = {"data.pkl": data, "byteorder": b"little", "version": b"3\n"}
    names.update({name.replace("_", "."): value for name, value in records.items()})
    names.update({f"data/{key}": value for key, value in (storages or {}).items()})
    layout = lay_out_archive((f"a/{name}", content, "") for name, content in names.items())
    write_out(OutputFile(path.name, layout.size, layout.segments, layout.checksums), path.parent)


def tensor_pickle(elements: int, offset: int, size: str, stride: str) -> bytes:
    """A pickled fp32 tensor, numbers as given (`size` and `stride` as Python tuples)."""

    class Pickler(pickle._Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", elements) if obj is Pickler else None

    function = torch._utils._rebuild_tensor_v2
    Pickler(out := io.BytesIO(), 2).dump(Call(function, Pickler, offset, eval(size), eval(stride), False, {}))
    return out.getvalue()


@pytest.mark.parametrize(
    ("elements", "offset", "size", "stride", "reason"),
    [
        (6, 0, "(2, 3)", "(3, 1)", None),
        (6, 1, "(2, 3)", "(3, 1)", "reaches beyond its storage"),
        (6, 0, "(2, 3)", "(4, 1)", "reaches beyond its storage"),
        (6, -1, "(2, 3)", "(3, 1)", "reaches beyond its storage"),
        (6, 0, "(1 << 62, 1 << 62)", "(0, 1)", "reaches beyond its storage"),
        (6, 0, "(1 << 63,)", "(0,)", "proper sizes"),
        (6, 0, "(2, -3)", "(3, 1)", "proper sizes"),
        (6, 0, "(2, 3)", "(3,)", "more or fewer strides"),
        (6, 0, "(2, 3)", "(-3, 1)", "proper sizes"),
        (6, 0, "(2, 3.0)", "(3, 1)", "proper sizes"),
        (7, 0, "(2, 3)", "(3, 1)", "storage 0 has 24 bytes instead of 28"),
        (-1, 0, "(2, 3)", "(3, 1)", "not a storage"),
    ],
)
def test_tensors_must_lie_in_their_storage(
    tmp_path: Path, elements: int, offset: int, size: str, stride: str, reason: str | None
) -> None:
    path = tmp_path / "a.pt"
    write_archive(path, tensor_pickle(elements, offset, size, stride), storages={"0": bytes(range(24))})
    if reason is None:
        assert contents(read_torch_file(path)) == bytes(range(24))  # type: ignore[arg-type]
        return
    with pytest.raises(InputError, match=reason):
        read_torch_file(path)


def test_a_missing_storage(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    write_archive(path, tensor_pickle(6, 0, "(2, 3)", "(3, 1)"))
    with pytest.raises(InputError, match="record a/data/0 is missing"):
        read_torch_file(path)


def test_a_wrong_checksum_of_the_pickle(tmp_path: Path) -> None:
    path = saved(tmp_path, {"some_key": 1})
    path.write_bytes(path.read_bytes().replace(b"some_key", b"same_key"))
    with pytest.raises(InputError, match=r"record model_optim_rng/data\.pkl is damaged"):
        read_torch_file(path)


def test_other_containers_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UnsupportedError, match=r"before torch 1\.6; load it with torch"):
        read_torch_file(path)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(UnsupportedError, match="TorchScript"):
        read_torch_file(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", b"y")
    with pytest.raises(InputError, match=r"needs one record data\.pkl"):
        read_torch_file(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"N." * 100)
    with pytest.raises(UnsupportedError, match="compressed"):
        read_torch_file(path)
    for data, reason in [
        (b"", "empty"),
        (b"\0" * 100, "not a file that torch.save wrote"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (pickle.dumps({}), "not a file that torch.save wrote"),
        (b"PK\x03\x04" + b"\0" * 100, "directory at its end is missing"),
    ]:
        path.write_bytes(data)
        with pytest.raises(InputError, match=reason):
            read_torch_file(path)
    with pytest.raises(InputError, match="no such file"):
        read_torch_file(tmp_path / "missing.pt")


def test_byte_order(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    write_archive(path, b"\x80\x02N.", byteorder=b"big")
    with pytest.raises(UnsupportedError, match="big-endian"):
        read_torch_file(path)
    write_archive(path, b"\x80\x02N.", byteorder=b"middle")
    with pytest.raises(UnsupportedError, match="byteorder"):
        read_torch_file(path)
    assert read(tmp_path, {"a": 1}, _disable_byteorder_record=True) == {"a": 1}


@pytest.mark.parametrize("keep", [10, 200, -1, -30, -100, -400])
def test_truncated_files(tmp_path: Path, keep: int) -> None:
    path = saved(tmp_path, {"a": torch.zeros(20)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="truncated or not a zip archive"):
        read_torch_file(path)


# Fuzzing


@functools.cache
def specimen() -> bytes:
    """A small file with something of everything."""
    base = make("BF16", 4, 6)
    obj = {
        "model": OrderedDict(a=base, view=base[1:, 2:4], t=base.t(), p=torch.nn.Parameter(make("F32", 3))),
        "fp8": make("F8_E4M3", 4),
        "args": argparse.Namespace(d=torch.bfloat16, s=torch.Size([1]), path=Path("/a"), b=b"x", set={1}),
        "np": np.arange(3),
        "numbers": [1, 2.5, -(1 << 40), None, True, ("x", (1, 2, 3, 4))],
    }
    torch.save(obj, buffer := io.BytesIO())
    return buffer.getvalue()


@functools.cache
def specimen_pickle() -> bytes:
    return zipfile.ZipFile(io.BytesIO(specimen())).read("archive/data.pkl")


def damaged(data: bytes, edits: list[tuple[int, int]], cut: int | None) -> bytes:
    result = bytearray(data)
    for at, value in edits:
        result[at % len(result)] = value
    return bytes(result[: None if cut is None else cut % len(result)])


EDITS = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=8)
CUTS = st.one_of(st.none(), st.integers(0, 1 << 16))


def survives(path: Path) -> None:
    """Either an error of ours, or tensors that lie in the file."""
    try:
        value = read_torch_file(path)
    except CkptkitError as error:
        assert "\n" not in str(error)
        return
    for leaf in leaves(value):
        if isinstance(leaf, Tensor):
            for band in leaf.bands:
                for piece in band.pieces:
                    assert isinstance(piece, Region)
                    assert piece.offset >= 0
                    assert piece.offset + (piece.rows - 1) * piece.pitch + piece.width <= path.stat().st_size


@settings(max_examples=400)
@given(EDITS, CUTS)
def test_fuzzed_files(tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]], cut: int | None) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.pt"
    path.write_bytes(damaged(specimen(), edits, cut))
    survives(path)


@settings(max_examples=400)
@given(EDITS, CUTS)
def test_fuzzed_pickles(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]], cut: int | None
) -> None:
    """The checksum is right here, so that the damage reaches the pickle machine."""
    path = tmp_path_factory.getbasetemp() / "fuzzed.pt"
    storages = {str(key): bytes(48) for key in range(3)}
    write_archive(path, damaged(specimen_pickle(), edits, cut), storages=storages)
    survives(path)


NAMES = [("torch._utils", "_rebuild_tensor_v2"), ("torch", "FloatStorage"), ("torch", "Size"), ("os", "system")]
OPCODES = st.sampled_from(
    [bytes([code]) for code in b"(012N\x88\x89)\x85\x86\x87t]}\x8f\x91aesu\x90\x94\x93R\x81\x92bQ."]
    + [b"K\x01", b"q\x00", b"h\x00", b"q\x01", b"h\x01", b"X\x01\x00\x00\x00a", b"\x8c\x02os", b"C\x01x", b"I1\n"]
    + [f"c{module}\n{name}\n".encode() for module, name in NAMES]
)


@settings(max_examples=400)
@given(st.lists(OPCODES, max_size=40))
def test_fuzzed_opcodes(opcodes: list[bytes]) -> None:
    try:
        loads(b"\x80\x02" + b"".join(opcodes) + b".", "x")
    except CkptkitError as error:
        assert isinstance(error, InputError)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 80), 1 << 80)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.sampled_from([TorchDType("bfloat16"), TorchDType("int8")]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(-5, 5), inner, max_size=4)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3).map(Namespace)
    ),
    max_leaves=20,
)


@settings(max_examples=200)
@given(VALUES)
def test_values_come_back_as_they_were(value: object) -> None:
    assert loads(dumps(value), "x") == value
    assert dumps(value) == dumps(loads(dumps(value), "x"))
