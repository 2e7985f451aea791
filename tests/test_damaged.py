"""Damaged and odd inputs: one clear line, the right error, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptkit.conversion import convert
from ckptkit.errors import CkptkitError, InputError, UnsupportedError
from ckptkit.sharding.grid import Parallelism
from tests.models import files_of, save_llama

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("hf") / "model", shard="300KB")


@pytest.fixture(scope="module")
def megatron(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("meg") / "model"
    convert(sharded, path, to="torch", grid=Parallelism(2, 2))
    return path


def first_shard(path: Path) -> Path:
    return sorted(path.glob("model-*.safetensors"))[0]


def index_of(path: Path) -> Path:
    return path / "model.safetensors.index.json"


def edit_index(change: Callable[[dict[str, str]], object]) -> Damage:
    def damage(path: Path) -> None:
        index = json.loads(index_of(path).read_text())
        change(index["weight_map"])
        index_of(path).write_text(json.dumps(index))

    return damage


def edit_config(**changes: object) -> Damage:
    def damage(path: Path) -> None:
        config = path / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))

    return damage


def link_out(path: Path) -> None:
    shard, outside = first_shard(path), path.parent / "outside.safetensors"
    shutil.move(shard, outside)
    os.symlink(outside, shard)


def add_tensor(name: str) -> Damage:
    def damage(path: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        shard = first_shard(path)
        save_file({**load_file(shard), name: torch.zeros(2)}, shard)
        edit_index(lambda weight_map: weight_map.update({name: shard.name}))(path)

    return damage


def put_in_two_shards(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    first, second = sorted(path.glob("model-*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor}, second)


HF: dict[str, tuple[Damage, type[CkptkitError], str]] = {
    "truncated shard": (lambda p: os.truncate(first_shard(p), 5000), InputError, "truncated"),
    "lfs pointer": (
        lambda p: first_shard(p).write_text("version https://git-lfs.github.com/spec/v1\n"),
        InputError,
        "Git-LFS pointer.*git lfs pull",
    ),
    "missing shard": (lambda p: first_shard(p).unlink(), InputError, "the index names .*, which is missing"),
    "no index": (lambda p: index_of(p).unlink(), InputError, "without model.safetensors.index.json"),
    "broken index": (lambda p: index_of(p).write_text("{"), InputError, "not valid JSON"),
    "empty index": (lambda p: index_of(p).write_text("{}"), InputError, "no weight_map"),
    "path traversal": (
        edit_index(lambda m: m.update({"model.norm.weight": "../outside.safetensors"})),
        InputError,
        r"points outside the folder \(\.\./outside",
    ),
    "unlisted tensor": (edit_index(lambda m: m.pop("model.norm.weight")), InputError, "which the index does not list"),
    "listed elsewhere": (
        edit_index(lambda m: m.update({"model.norm.weight": min(m.values())})),
        InputError,
        "the index lists model.norm.weight in",
    ),
    "two shards": (put_in_two_shards, InputError, "is in two shards"),
    "symlink out": (link_out, InputError, "symbolic link out of the folder"),
    "no config": (lambda p: (p / "config.json").unlink(), InputError, "config.json: no such file"),
    "config is a list": (lambda p: (p / "config.json").write_text("[]"), InputError, "not a JSON object"),
    "unknown architecture": (
        edit_config(architectures=["BertModel"]),
        UnsupportedError,
        "no family converts BertModel",
    ),
    "quantised": (
        edit_config(quantization_config={"quant_method": "fp8"}),
        UnsupportedError,
        r"quantised weights \(fp8\)",
    ),
    "fp8 scales": (
        add_tensor("model.layers.0.mlp.down_proj.weight_scale_inv"),
        UnsupportedError,
        "FP8 with block scales",
    ),
    "gptq": (add_tensor("model.layers.0.mlp.down_proj.qweight"), UnsupportedError, "GPTQ or AWQ"),
    "unknown tensor": (add_tensor("model.surprise"), InputError, "1 unknown to this family: model.surprise"),
    "other sizes": (edit_config(intermediate_size=145), InputError, r"is \[144, 96\], the config says \[145, 96\]"),
}


@pytest.mark.parametrize("damage", HF)
def test_hugging_face_input(sharded: Path, tmp_path: Path, damage: str) -> None:
    hurt, error, match = HF[damage]
    source = shutil.copytree(sharded, tmp_path / "in" / "model")
    hurt(source)
    rejected(source, tmp_path, error, match)


def rank_file(path: Path, tp_rank: int = 1, pp_rank: int = 1) -> Path:
    return path / "release" / f"mp_rank_{tp_rank:02d}_{pp_rank:03d}" / "model_optim_rng.pt"


def edit_rank(change: Callable[[dict[str, object]], object]) -> Damage:
    def damage(path: Path) -> None:
        import torch

        content = torch.load(rank_file(path), weights_only=False)
        change(content)
        torch.save(content, rank_file(path))

    return damage


class RunsCode:
    """Loading a pickle of it makes a directory."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def plant_code(path: Path) -> None:
    edit_rank(lambda content: content.update(extra=RunsCode(path.parent / "code-ran")))(path)


MEGATRON: dict[str, tuple[Damage, type[CkptkitError], str]] = {
    "missing rank": (lambda p: shutil.rmtree(rank_file(p).parent), InputError, "mp_rank_01_001 is missing"),
    "missing file": (lambda p: rank_file(p).unlink(), InputError, r"no model_optim_rng\.pt"),
    "cut short": (lambda p: os.truncate(rank_file(p), 9000), InputError, r"model_optim_rng\.pt"),
    "disagreeing args": (
        edit_rank(lambda c: setattr(c["args"], "rotary_base", 5)),
        InputError,
        "args.rotary_base is 5, another rank has 10000",
    ),
    "runs code": (plant_code, InputError, "mkdir"),
    "no model": (edit_rank(lambda c: c.pop("model")), InputError, "holds no `model`"),
    "lost tensor": (
        edit_rank(lambda c: c["model"].pop("decoder.final_layernorm.weight")),
        InputError,
        "1 missing: decoder.final_layernorm.weight",
    ),
    "extra tensor": (
        edit_rank(lambda c: c["model"].update({"decoder.more": c["model"]["decoder.final_layernorm.weight"]})),
        InputError,
        "1 unknown to this family: decoder.more",
    ),
    "tracker": (
        lambda p: (p / "latest_checkpointed_iteration.txt").write_text("12"),
        InputError,
        "names iter_0000012, which is not there",
    ),
    "sidecar": (
        lambda p: first_shard(p / "ckptkit" / "headers").write_bytes(b"x"),
        InputError,
        "damaged header copy",
    ),
    "newer sidecar": (
        lambda p: (p / "ckptkit" / "manifest.json").write_text('{"schema": 99}'),
        UnsupportedError,
        "sidecar schema 99",
    ),
}


@pytest.mark.parametrize("damage", MEGATRON)
def test_megatron_input(megatron: Path, tmp_path: Path, damage: str) -> None:
    hurt, error, match = MEGATRON[damage]
    source = shutil.copytree(megatron, tmp_path / "in" / "model")
    hurt(source)
    rejected(source, tmp_path, error, match)
    assert not (source.parent / "code-ran").exists()


def rejected(source: Path, tmp_path: Path, error: type[CkptkitError], match: str) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(error, match=match) as caught:
        convert(source, tmp_path / "out" / "model", to="hf")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


def test_stale_shards_and_other_formats_are_listed_not_read(sharded: Path, tmp_path: Path) -> None:
    source = shutil.copytree(sharded, tmp_path / "model")
    (source / "original").mkdir()
    for name in (
        "model-00009-of-00009.safetensors",
        "consolidated.safetensors",
        "original/consolidated.00.pth",
        "m.gguf",
    ):
        (source / name).write_bytes(b"not even weights")
    result = convert(source, tmp_path / "out", to="hf")
    assert sum("is not part of the model" in note for note in result.notes) == 4
    assert files_of(tmp_path / "out") == files_of(sharded)


def test_not_a_checkpoint(tmp_path: Path) -> None:
    for path, match in ((tmp_path / "absent", "no such directory"), (tmp_path, "not a checkpoint that ckptkit knows")):
        with pytest.raises(InputError, match=match):
            convert(path, tmp_path / "out", to="hf")
