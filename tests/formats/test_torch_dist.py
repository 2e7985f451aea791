"""Distributed checkpoints: the real Megatron-Core saves what we read, and strictly loads what we write."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckptkit.dtypes import DTYPES
from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.formats.dcp.reading import METADATA, open_dcp
from ckptkit.formats.dcp.writing import NewChunk, NewObject, lay_out_dcp
from ckptkit.formats.torch_dist import (
    GlobalTensor,
    is_torch_dist,
    lay_out_torch_dist,
    open_torch_dist,
    stacks,
)
from ckptkit.formats.torch_file.pickles import Namespace, TorchDType, lay_out_torch_file, read_torch_file
from ckptkit.formats.torch_legacy import iteration_folder
from ckptkit.sharding.grid import Parallelism
from ckptkit.tables.family import MegatronQuirks
from ckptkit.tables.megatron_names import distributed_states, norms_from_local_spec, norms_of_local_spec
from ckptkit.tensors import Tensor
from tests.formats.megatron_ranks import EXPERTS, LAST_NORMS, LAYERS, Job, arguments, run, weights
from tests.formats.rank_pool import RankProcesses
from tests.formats.torch_file.torch_files import as_torch, contents, torch_bytes, write_out

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

MIXED = {"moe_layer_freq": [0, *[1] * (LAYERS - 1)]}
ONE_BY_ONE = {"non_homogeneous_layers": True}


def axis_of(name: str) -> tuple[int | None, int]:
    """The axis that tensor parallel ranks divide, and its blocks."""
    if re.search(r"linear_fc1\.weight\d*$", name):
        return 0, 2
    if re.search(r"(linear_qkv\.(weight|bias)|word_embeddings\.weight|output_layer\.weight)$", name):
        return 0, 1
    return (-1, 1) if re.search(r"(linear_proj\.weight|linear_fc2\.weight\d*)$", name) else (None, 1)


def items(model: str, pp: int = 1, dtype: str = "float32", spec: str = "te") -> list[GlobalTensor]:
    """The tensors of a model, spread over `pp` stages, with the names and states that the tables give for a spec."""
    kind = DTYPES[{"float32": "F32", "bfloat16": "BF16"}[dtype]]
    found = []
    norms = norms_of_local_spec(weights(model, dtype)) if spec == "local" else {}
    for name, values in weights(model, dtype).items():
        tensor = Tensor.from_bytes(torch_bytes(values), kind, tuple(values.shape))
        layer = re.search(r"layers\.(\d+)\.", name)
        stage = int(layer[1]) * pp // LAYERS if layer else 0 if name.startswith("embedding") else pp - 1
        states = tuple(distributed_states(name, spec, MegatronQuirks()))
        found.append(GlobalTensor(norms.get(name, name), tensor, *axis_of(name), stage, states))
    return found


def write(folder: Path, model: str, pp: int = 1, dtype: str = "float32", spec: str = "te", **options: Any) -> Path:
    """Writes a checkpoint as ckptkit lays it out; returns the folder with the chunks."""
    args = {**arguments(), **(MIXED if model == "mixed" else {})}
    for file in lay_out_torch_dist(items(model, pp, dtype, spec), args, dtype=dtype, **options):
        write_out(file, folder)
    found = iteration_folder(folder)
    assert found is not None
    return found


def same(folder: Path, model: str, dtype: str = "float32") -> None:
    """Whether a checkpoint holds exactly the golden values of a model."""
    stored, expected = open_torch_dist(folder, folder).tensors, weights(model, dtype)
    moved = norms_from_local_spec(stored)
    found = {moved.get(name, name): tensor for name, tensor in stored.items()}
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(as_torch(found[name]), expected[name])] == []


SAVES_1 = [
    Job("save", "dense"),
    Job("save", "dense_bf16", dtype="bfloat16"),
    Job("save", "tied", "tied"),
    Job("save", "moe", "moe"),
    Job("save", "mixed", "mixed"),
    Job("save", "singletons", "moe", metadata={"singleton_local_shards": True}),
]
SAVES_4 = [
    Job("save", "dense_tp2_pp2", tp=2, pp=2),
    Job("save", "dense_tp2_vpp2", tp=2, pp=2, vpp=2),
    Job("save", "moe_tp2_ep2", "moe", tp=2, ep=2),
]
OURS: dict[str, dict[str, Any]] = {
    "our_dense": {"model": "dense", "spec": "local"},
    "our_dense_tp2_pp2": {"model": "dense", "pp": 2, "grid": Parallelism(2), "spec": "local"},
    "our_dense_bf16": {"model": "dense", "grid": Parallelism(4), "dtype": "bfloat16", "spec": "local"},
    "our_tied": {"model": "tied", "spec": "local"},
    "our_moe": {"model": "moe", "spec": "local"},
    "our_moe_tp2_ep2": {"model": "moe", "grid": Parallelism(2, ep=2), "spec": "local"},
    "our_moe_ep4_etp1": {"model": "moe", "grid": Parallelism(2, ep=4, etp=1), "spec": "local"},
    "our_mixed": {"model": "mixed", "spec": "local"},
    "our_layers": {"model": "dense", "stacked": False, "spec": "local"},
    "our_te": {"model": "dense"},
}
LOADS_1 = [
    Job("load", "our_dense_tp2_pp2"),
    Job("load", "our_dense_bf16", dtype="bfloat16"),
    Job("load", "our_tied", "tied"),
    Job("load", "our_moe_tp2_ep2", "moe"),
    Job("load", "our_moe_ep4_etp1", "moe"),
    Job("load", "our_mixed", "mixed"),
    Job("load", "our_layers", metadata=ONE_BY_ONE),
    Job("load", "our_te", strict="assume_ok_unexpected"),
    Job("refuse", "our_te", strict="raise_all"),
    Job("load", "our_dense", strict="raise_unexpected"),
    Job("refuse", "our_dense", "moe", strict="raise_unexpected"),
]
LOADS_4 = [
    Job("load", "our_dense", tp=2, pp=2),
    Job("load", "our_dense_tp2_pp2", tp=4),
    Job("load", "our_dense_bf16", tp=2, pp=2, vpp=2, dtype="bfloat16"),
    Job("load", "our_tied", "tied", pp=4),
    Job("load", "our_moe", "moe", tp=2, ep=2),
    Job("load", "our_moe_tp2_ep2", "moe", ep=2, pp=2),
    Job("load", "our_moe", "moe", ep=4),
    Job("load", "our_mixed", "mixed", ep=2, pp=2),
]


class World:
    """What happened when real ranks ran all jobs of a size."""

    def __init__(self, ranks: RankProcesses, folder: Path, jobs: list[Job]) -> None:
        self.folder = folder
        placed = [Job(**{**vars(job), "folder": str(self.path(job.folder))}) for job in jobs]
        self.results = dict(zip(map(repr, jobs), run(ranks, placed), strict=True))

    def path(self, name: str) -> Path:
        """The folder of a checkpoint."""
        return self.folder / name / "release" if name.startswith("our_") else self.folder / name

    def check(self, job: Job) -> Path:
        """The folder of a job, if it went well."""
        if problem := self.results[repr(job)]:
            pytest.fail(problem, pytrace=False)
        return self.path(job.folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("torch_dist")
    for name, options in OURS.items():
        write(path / name, **options)
    return path


@pytest.fixture(scope="module")
def one_rank(megatron_ranks: RankProcesses, folder: Path) -> World:
    return World(megatron_ranks, folder, [*SAVES_1, *LOADS_1])


@pytest.fixture(scope="module")
def four_ranks(megatron_ranks: RankProcesses, folder: Path) -> World:
    return World(megatron_ranks, folder, [*SAVES_4, *LOADS_4])


def label(job: Job) -> str:
    return f"{job.folder}-tp{job.tp}-pp{job.pp}-vpp{job.vpp}-ep{job.ep}-{job.action}-{job.strict}"


@pytest.mark.slow
@pytest.mark.parametrize("job", SAVES_1, ids=label)
def test_reads_what_one_rank_of_megatron_core_saved(one_rank: World, job: Job) -> None:
    same(one_rank.check(job), job.model, job.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("job", SAVES_4, ids=label)
def test_reads_what_a_grid_of_megatron_core_saved(four_ranks: World, job: Job) -> None:
    same(four_ranks.check(job), job.model, job.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("job", LOADS_1, ids=label)
def test_one_rank_of_megatron_core_loads_strictly_what_we_write(one_rank: World, job: Job) -> None:
    one_rank.check(job)


@pytest.mark.slow
@pytest.mark.parametrize("job", LOADS_4, ids=label)
def test_a_grid_of_megatron_core_loads_strictly_what_we_write(four_ranks: World, job: Job) -> None:
    four_ranks.check(job)


def boxes(path: Path) -> dict[str, Any]:
    """Every key of a model: dtype, shape and the places of chunks, or None for an object."""
    files = open_dcp(path)
    found: dict[str, Any] = {
        key: (str(stored.dtype), stored.shape, sorted((chunk.offsets, chunk.sizes) for chunk in stored.chunks))
        for key, stored in files.tensors.items()
    }
    return found | dict.fromkeys(key for key in files.objects if not key.startswith("common_state/"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("our_dense", "dense"),
        ("our_tied", "tied"),
        ("our_moe", "moe"),
        ("our_mixed", "mixed"),
        ("our_dense_tp2_pp2", "dense_tp2_pp2"),
        ("our_dense_tp2_pp2", "dense_tp2_vpp2"),
        ("our_moe_tp2_ep2", "moe_tp2_ep2"),
    ],
)
def test_keys_and_chunks_are_those_of_megatron_core(one_rank: World, four_ranks: World, ours: str, theirs: str) -> None:
    our_boxes, their_boxes = boxes(one_rank.path(ours)), boxes(one_rank.path(theirs))
    assert {key.partition("/")[0] for key in our_boxes.keys() - their_boxes.keys()} <= LAST_NORMS
    assert {key: our_boxes[key] for key in their_boxes} == their_boxes


@pytest.mark.slow
def test_empty_states_and_metadata_are_those_of_megatron_core(one_rank: World) -> None:
    ours, theirs = open_dcp(one_rank.path("our_dense")), open_dcp(one_rank.path("dense"))
    assert len(ours.objects) == 4 * LAYERS + 1
    for key in (key for key in ours.objects if key.partition("/")[0] not in LAST_NORMS):
        assert ours.object(key) == theirs.object(key) == [None]
    config, expected = (json.loads((files.path / "metadata.json").read_text()) for files in (ours, theirs))
    assert expected.items() <= config.items()
    assert expected["sharded_backend"] == "torch_dist"


@pytest.mark.slow
def test_args_of_either_form_are_read(one_rank: World) -> None:
    path = one_rank.path("dense")
    assert open_torch_dist(path, path).args == arguments(SAVES_1[0])


def test_ranks_write_files_of_their_own(folder: Path) -> None:
    def files(name: str) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for key, stored in open_dcp(folder / name / "release").tensors.items():
            for chunk in stored.chunks:
                found.setdefault(chunk.span.file, set()).add(key)
        return found

    dense = files("our_dense_tp2_pp2")
    assert sorted(dense) == [f"__{rank}_0.distcp" for rank in range(4)]
    assert "embedding.word_embeddings.weight" in dense["__1_0.distcp"]
    assert "output_layer.weight" in dense["__3_0.distcp"]
    assert "decoder.final_layernorm.weight" not in dense["__3_0.distcp"]
    moe = files("our_moe_tp2_ep2")
    assert sorted(moe) == [f"__{rank}_0.distcp" for rank in range(4)]
    assert moe["__3_0.distcp"] == {f"decoder.layers.mlp.experts.experts.linear_fc{number}.weight" for number in (1, 2)}
    assert sorted(files("our_moe_ep4_etp1")) == [f"__{rank}_0.distcp" for rank in range(4)]


def test_plain_torch_loads_what_we_write(folder: Path) -> None:
    import torch.distributed.checkpoint as dcp

    state = {
        "decoder.layers.mlp.linear_fc1.weight": torch.zeros(LAYERS, 96, 32),
        "output_layer.weight": torch.zeros(96, 32),
    }
    dcp.load(state, checkpoint_id=folder / "our_dense_tp2_pp2" / "release", no_dist=True)
    golden = weights("dense")
    assert torch.equal(state["output_layer.weight"], golden["output_layer.weight"])
    for layer, values in enumerate(state["decoder.layers.mlp.linear_fc1.weight"]):
        assert torch.equal(values, golden[f"decoder.layers.{layer}.mlp.linear_fc1.weight"])


@pytest.mark.parametrize("name", OURS)
def test_what_we_write_comes_back(folder: Path, name: str) -> None:
    options = OURS[name]
    path = folder / name / "release"
    same(path, options["model"], options.get("dtype", "float32"))
    opened = open_torch_dist(path, folder / name)
    expected = {**arguments(), **(MIXED if options["model"] == "mixed" else {}), "ckpt_format": "torch_dist"}
    assert opened.args == expected
    assert opened.stacked == (name not in ("our_mixed", "our_layers"))
    assert bool(norms_from_local_spec(opened.tensors)) == (options["model"] in ("moe", "mixed"))
    assert opened.ignored == ()


def test_common_state_is_what_megatron_loads_with_weights_only(folder: Path) -> None:
    path = folder / "our_mixed" / "release" / "common.pt"
    common = read_torch_file(path)
    assert isinstance(common, dict)
    assert common["checkpoint_version"] == 3.0
    assert common["args"].fields["params_dtype"] == TorchDType("float32")
    assert common["content_metadata"]["non_homogeneous_layers"] is True
    import argparse

    with torch.serialization.safe_globals([argparse.Namespace]):
        assert torch.load(path, weights_only=True)["args"].moe_layer_freq == MIXED["moe_layer_freq"]


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / name, "moe", grid=Parallelism(2, ep=2))
    files = sorted(file.relative_to(tmp_path / "a") for file in (tmp_path / "a").rglob("*") if file.is_file())
    assert len(files) == 8
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


def test_te_writes_the_states_of_its_own_modules() -> None:
    def keys(spec: str, model: str) -> set[str]:
        laid_out = lay_out_torch_dist(items(model, spec=spec), arguments(), dtype="float32")
        files = {file.path: file for file in laid_out}
        data = contents(files[f"release/{METADATA}"].segments[0].tensor)
        return {key.decode() for key in re.findall(rb"[\w.]+\._extra_state/shard_[\d.]+_[\d.]+", data)}

    te, local = keys("te", "moe"), keys("local", "moe")
    assert local < te
    assert {re.sub(r"shard_\d+_", "shard_0_", key) for key in te - local} == {
        f"decoder.layers.{module}._extra_state/shard_0_4"
        for module in ("self_attention.q_layernorm", "self_attention.k_layernorm", "pre_mlp_layernorm")
    }
    assert "decoder.final_layernorm._extra_state/shard_0_1" in local
    experts = [key for key in te if ".experts.experts." in key]
    assert len(experts) == 2 * LAYERS * EXPERTS
    assert "decoder.layers.mlp.experts.experts.linear_fc1._extra_state/shard_3.2_4.4" in experts


def test_states_that_no_module_asks_for_any_more_are_read_over(tmp_path: Path) -> None:
    """Outputs of older versions have one for attention."""
    old = [
        replace(item, states=(*item.states, item.name.replace("linear_qkv.weight", "core_attention._extra_state")))
        if item.name.endswith(".linear_qkv.weight")
        else item
        for item in items("dense")
    ]
    for file in lay_out_torch_dist(old, arguments(), dtype="float32"):
        write_out(file, tmp_path)
    keys = open_dcp(tmp_path / "release").objects
    assert "decoder.layers.self_attention.core_attention._extra_state/shard_0_4" in keys
    same(tmp_path / "release", "dense")


def test_norm_before_experts_is_named_by_the_spec(tmp_path: Path) -> None:
    te = open_dcp(write(tmp_path / "te", "moe")).tensors
    local = open_dcp(write(tmp_path / "local", "moe", spec="local")).tensors
    assert te.keys() - local.keys() == {"decoder.layers.pre_mlp_layernorm.weight"}
    assert local.keys() - te.keys() == {"decoder.layers.mlp.linear_fc1.layer_norm_weight"}
    same(tmp_path / "te" / "release", "moe")


def test_layers_are_stacked_where_stock_megatron_stacks_them() -> None:
    dense = {item.name: item.tensor.shape for item in items("dense")}
    mixed = {item.name: item.tensor.shape for item in items("mixed")}
    assert stacks(dense, {"moe_layer_freq": 1})
    assert not stacks(mixed, {})
    for args in (
        {"moe_layer_freq": [1, 1]},
        {"moe_layer_freq": 2},
        {"linear_attention_freq": 4},
        {"hetereogenous_dist_checkpoint": True},
        {"heterogeneous_layers_config_path": "layers.json"},
    ):
        assert not stacks(dense, args)
    with pytest.raises(UsageError, match="layers that differ cannot be stacked"):
        lay_out_torch_dist(items("mixed"), {}, dtype="float32", stacked=True)


def test_what_does_not_divide_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"weight: 64 do not divide over 1 x 3 tensor parallel ranks; choose"):
        lay_out_torch_dist(items("dense")[3:], {}, dtype="float32", grid=Parallelism(3))
    with pytest.raises(UsageError, match="4 experts do not divide over 3 ranks"):
        lay_out_torch_dist(items("moe"), {}, dtype="float32", grid=Parallelism(ep=3))


def container(folder: Path, tensors: dict[str, Any], objects: dict[str, bytes] | None = None) -> Path:
    """A distributed checkpoint with given keys, one chunk each."""
    chunks = []
    for key, values in tensors.items():
        tensor = Tensor.from_bytes(torch_bytes(values), DTYPES["F32"], tuple(values.shape))
        chunks.append(NewChunk(key, (0,) * len(tensor.shape), tensor, ("__0_0.distcp",)))
    stored = [NewObject(key, data, "__0_0.distcp") for key, data in (objects or {}).items()]
    for file in lay_out_dcp("", {key: tuple(values.shape) for key, values in tensors.items()}, chunks, stored):
        write_out(file, folder)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    return folder


def test_common_state_of_newer_releases_and_keys_that_are_no_model(tmp_path: Path) -> None:
    layout = lay_out_torch_file("archive", [{"args": Namespace({"num_layers": 2, "device": TorchDType("uint8")})}])
    state = contents(layout.segments[0].tensor)
    norm = torch.randn(2, 4)
    other = torch.zeros(3)
    tensors = {
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": norm,
        "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight": other,
        "chained_1.optimizer.state.exp_avg.x": other,
        "mtp.layers.0.enorm.weight": other,
    }
    files = open_torch_dist(container(tmp_path, tensors, {"common_state/shard_0_1": state}), tmp_path)
    assert files.args == {"num_layers": 2}
    assert sorted(files.tensors) == [
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.1.mlp.linear_fc1.layer_norm_weight",
        "mtp.layers.0.enorm.weight",
    ]
    assert torch.equal(as_torch(files.tensors["decoder.layers.1.mlp.linear_fc1.layer_norm_weight"]), norm[1])
    assert files.ignored == ("chained_1.optimizer.state.exp_avg.x", next(key for key in tensors if "optimizer" in key))


def test_chunks_that_span_experts_are_read(tmp_path: Path) -> None:
    """As the grouped experts without Transformer Engine wrote them."""
    values = torch.randn(2, 4, 6, 5)
    halves = [
        NewChunk(
            "decoder.layers.mlp.experts.experts.linear_fc1.weight",
            (layer, start, row, 0),
            Tensor.from_bytes(
                torch_bytes(values[layer : layer + 1, start : start + 2, row : row + 3]), DTYPES["F32"], (1, 2, 3, 5)
            ),
            ("__0_0.distcp",),
        )
        for layer in range(2)
        for start in (0, 2)
        for row in (0, 3)
    ]
    for file in lay_out_dcp("", {halves[0].key: (2, 4, 6, 5)}, halves):
        write_out(file, tmp_path)
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    files = open_torch_dist(tmp_path, tmp_path)
    for layer in range(2):
        for expert in range(4):
            name = f"decoder.layers.{layer}.mlp.experts.linear_fc1.weight{expert}"
            assert torch.equal(as_torch(files.tensors[name]), values[layer, expert])


def test_names_that_make_no_sense(tmp_path: Path) -> None:
    half = torch.zeros(2, 3)
    cases = {
        r"linear_fc1\.weight_w has no counterpart": {"decoder.layers.0.mlp.linear_fc1.weight_w": half},
        r"linear_fc1\.weight_v has no counterpart": {"decoder.layers.0.mlp.linear_fc1.weight_v": half},
        "of its shape and dtype": {
            "decoder.layers.0.mlp.linear_fc1.weight_w": half,
            "decoder.layers.0.mlp.linear_fc1.weight_v": half[:1],
        },
        r"decoder\.layers\.0\.x is stored twice": {"decoder.layers.0.x": half[0], "decoder.layers.x": half},
        r"experts\.linear_fc1\.weight is \[3\], not a stack of layers or experts": {
            "decoder.layers.mlp.experts.experts.linear_fc1.weight": half[0]
        },
    }
    for number, (match, tensors) in enumerate(cases.items()):
        path = container(tmp_path / str(number), tensors)
        with pytest.raises(InputError, match=match) as raised:
            open_torch_dist(path, path)
        assert "\n" not in str(raised.value)


def test_other_backends_and_incomplete_folders(tmp_path: Path) -> None:
    assert not is_torch_dist(tmp_path)
    config = tmp_path / "metadata.json"
    config.write_text('{"sharded_backend": "zarr"}')
    assert is_torch_dist(tmp_path)
    with pytest.raises(UnsupportedError, match="distributed checkpoint of backend 'zarr'"):
        open_torch_dist(tmp_path, tmp_path)
    config.write_text('{"sharded_backend": "torch_dist"}')
    with pytest.raises(InputError, match=r"no \.metadata"):
        open_torch_dist(tmp_path, tmp_path)
    config.write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        is_torch_dist(tmp_path)
    container(tmp_path, {"x": torch.zeros(1)})
    for file in [lay_out_torch_file("common.pt", ["no dictionary"])]:
        write_out(file, tmp_path)
    with pytest.raises(InputError, match="the common state is not a dictionary"):
        open_torch_dist(tmp_path, tmp_path)
