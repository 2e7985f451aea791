"""`validate`: yes to every layout, and no, with the place, to every damage."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ckptkit.cli import app as cli
from ckptkit.errors import InputError, UnsupportedError
from ckptkit.inspection.validation import Validation, validate
from tests.inspection.conftest import LAYOUTS
from tests.inspection.test_differences import RANK, change_rank

Damage = Callable[[Path], object]


def answers(found: Validation) -> dict[str, bool]:
    return {check.name: check.passed for check in found.checks}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sound_in_every_layout(tied: dict[str, Path], experts: dict[str, Path], layout: str) -> None:
    for model in (tied, experts):
        found = validate(model[layout], values=True, threads=2)
        assert answers(found) == {"files": True, "tensors": True, "checksums": True, "values": True}
        assert found.passed and found.not_asked == [] and found.format == layout
        assert [check.warnings for check in found.checks] == [[], [], [], []]
        records = found.checks[2].summary.split()[0].replace(",", "")
        assert records.isdigit() == (layout in ("torch", "torch_dist"))


def flip(file: Path, at: int) -> None:
    """Inverts one bit; from the end if `at` is negative."""
    with file.open("r+b") as stream:
        stream.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 4]))


def flip_in_tensor(path: Path) -> None:
    """In the middle of the rank's file there are weights, as almost everywhere."""
    flip(path / RANK, (path / RANK).stat().st_size // 2)


def flip_in_chunk(path: Path) -> None:
    from ckptkit.checkpoints.opening import open_checkpoint

    tensor = open_checkpoint(path).tensors["decoder.layers.1.mlp.linear_fc2.weight"]
    piece: Any = tensor.bands[0].pieces[0]
    flip(Path(piece.file), piece.offset + 8)


def shards(path: Path) -> list[Path]:
    return sorted(path.glob("model-*.safetensors"))


def edit_json(name: str, **changes: object) -> Damage:
    def damage(path: Path) -> None:
        file = path / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return damage


DAMAGES: dict[str, tuple[str, Damage, str, str]] = {
    "truncated shard": ("hf", lambda p: os.truncate(shards(p)[1], 5000), "files", "00002-of-.*truncated"),
    "missing shard": ("hf", lambda p: shards(p)[2].unlink(), "files", "the index names .*, which is missing"),
    "trailing bytes": ("packed", lambda p: (p / "model.safetensors").open("ab").write(b"x"), "files", "1 trailing"),
    "broken generation config": (
        "hf",
        lambda p: (p / "generation_config.json").write_text("{,}"),
        "files",
        "generation_config.json: not valid JSON",
    ),
    "lfs pointer": (
        "hf",
        lambda p: (p / "tokenizer" / "notes.txt").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "files",
        "notes.txt: a Git-LFS pointer instead of the file; run `git lfs pull`",
    ),
    "cut rank": ("torch", lambda p: os.truncate(p / RANK, 9000), "files", "directory at its end is missing"),
    "cut chunk file": (
        "torch_dist",
        lambda p: os.truncate(p / "release" / "__0_0.distcp", 5000),
        "files",
        "__0_0.distcp: bytes .* are wanted, the file has 5,000.*and 11 more in it",
    ),
    "sizes": ("hf", edit_json("config.json", intermediate_size=145), "tensors", r"the config says \[145, 96\]"),
    "index": (
        "hf",
        lambda p: edit_json("model.safetensors.index.json", weight_map={"x": shards(p)[0].name})(p),
        "tensors",
        "the index lists x",
    ),
    "lost tensor": (
        "torch",
        lambda p: change_rank(p, lambda model: model.pop("decoder.final_layernorm.weight")),
        "tensors",
        "missing: decoder.final_layernorm.weight",
    ),
    "args": (
        "packed",
        edit_json("megatron_args.json", norm_epsilon=0.5),
        "tensors",
        "args say norm_eps 0.5, config.json says 1e-05",
    ),
    "missing rank": ("torch", lambda p: shutil.rmtree((p / RANK).parent), "tensors", "mp_rank_01_001 is missing"),
    "bit in a record": ("torch", flip_in_tensor, "checksums", "mp_rank_01_001.*/data/.* its checksum is wrong"),
    "bit in a chunk": ("torch_dist", flip_in_chunk, "checksums", r"\.distcp: record .* its checksum is wrong"),
    "nan": (
        "torch",
        lambda p: change_rank(p, lambda model: model["decoder.final_layernorm.weight"][2:4].fill_(float("nan"))),
        "values",
        "final_layernorm.weight on tensor parallel ranks 0 and 1",
    ),
    "inf": (
        "torch",
        lambda p: change_rank(p, lambda m: m["decoder.layers.0.mlp.linear_fc2.weight"][0, :3].fill_(float("inf"))),
        "values",
        "layers.2.mlp.down_proj.weight: 0 NaN and 3 infinite of 13,824 elements",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage(changed: Callable[[str], Path], name: str) -> None:
    layout, damage, question, match = DAMAGES[name]
    path = changed(layout)
    damage(path)
    found = validate(path, values=True)
    wrong = {check.name: check.problems for check in found.checks if not check.passed}
    assert list(wrong) == [question] and not found.passed
    assert len(wrong[question]) == 1
    with pytest.raises(InputError, match=match):
        raise InputError(wrong[question][0])


def test_every_damaged_file_is_named(changed: Callable[[str], Path]) -> None:
    path = changed("hf")
    for shard in shards(path)[:3]:
        os.truncate(shard, 100)
    found = validate(path)
    assert [shard.name in text for shard, text in zip(shards(path), found.checks[0].problems, strict=False)] == [
        True
    ] * 3
    assert found.not_asked == ["tensors", "checksums", "values"] and found.format is None


def test_a_bit_that_nothing_protects_is_not_noticed_without_its_checksum(changed: Callable[[str], Path]) -> None:
    path = changed("torch")
    flip_in_tensor(path)
    found = validate(path, checksums=False)
    assert found.passed and found.not_asked == ["checksums", "values"]


def rewrite(path: Path, **values: float) -> None:
    """Fills tensors of the single-file model with one value each."""
    from safetensors.numpy import load_file, save_file

    for shard in shards(path):
        weights = {name: tensor.copy() for name, tensor in load_file(shard).items()}
        for ending, value in values.items():
            for name in (name for name in weights if name.endswith(ending.replace("__", "."))):
                weights[name][...] = value
        save_file(weights, shard, {"format": "pt"})


def test_zeros(changed: Callable[[str], Path]) -> None:
    path = changed("hf")
    rewrite(path, layers__1__mlp__up_proj__weight=0.0, layers__2__input_layernorm__weight=-0.0)
    values = validate(path, values=True).checks[-1]
    assert values.problems == ["model.layers.1.mlp.up_proj.weight is all zero"]
    assert values.warnings == ["model.layers.2.input_layernorm.weight is all zero"]


def test_a_wrong_total_size_is_odd(changed: Callable[[str], Path]) -> None:
    path = changed("hf")
    edit_json("model.safetensors.index.json", metadata={"total_size": 5})(path)
    found = validate(path)
    assert found.passed
    assert found.checks[0].warnings == [
        "model.safetensors.index.json says total_size 5, the tensors have 1,156,224 bytes"
    ]


def test_files_without_checksums_are_read(tied: dict[str, Path], changed: Callable[[str], Path]) -> None:
    import torch

    path = changed("torch")
    torch.serialization.set_crc32_options(False)
    try:
        change_rank(path, lambda model: None)
    finally:
        torch.serialization.set_crc32_options(True)
    found = validate(path, values=True)
    assert found.passed
    (warning,) = found.checks[2].warnings
    assert "records were written without checksums" in warning


def test_pickled_shards(tied: dict[str, Path], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    weights = {name: tensor for shard in shards(tied["hf"]) for name, tensor in load_file(shard).items()}
    shutil.copy(tied["hf"] / "config.json", tmp_path / "config.json")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert validate(tmp_path, values=True).passed
    flip(tmp_path / "pytorch_model.bin", (tmp_path / "pytorch_model.bin").stat().st_size // 2)
    assert answers(validate(tmp_path)) == {"files": True, "tensors": True, "checksums": False}


def test_what_is_not_supported_is_not_damaged(changed: Callable[[str], Path]) -> None:
    path = changed("hf")
    edit_json("config.json", architectures=["BertModel"])(path)
    with pytest.raises(UnsupportedError, match="no family converts BertModel"):
        validate(path)


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["validate", *arguments], prog_name="ckptkit")
    return result.exit_code, result.stdout


def test_as_a_command(tied: dict[str, Path], changed: Callable[[str], Path]) -> None:
    code, text = run(str(tied["torch"]))
    assert code == 0 and text.endswith("sound\n")
    path = changed("torch")
    flip_in_tensor(path)
    code, text = run(str(path))
    assert code == 3 and "wrong (checksums)" in text and text.endswith("damaged or inconsistent\n")
    code, text = run(str(path), "--json")
    told = json.loads(text)
    assert (code, told["passed"], [check["passed"] for check in told["checks"]]) == (3, False, [True, True, False])
    assert run(str(path), "--headers-only")[0] == 0
    assert run(str(path), "--headers-only", "--values")[0] == 2
    assert run(str(path / "no"))[0] == 3
