"""`hash`: the same for one model in any layout, what other tools compute, and different after one bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ckptkit.cli import app as cli
from ckptkit.errors import UsageError
from ckptkit.inspection.hashing import Hashes, hash_checkpoint
from tests.inspection.conftest import LAYOUTS
from tests.models import files_of


def tensors_of(found: Hashes) -> list[tuple[str, str, tuple[int, ...], str]]:
    return [(item.name, item.dtype, item.shape, item.sha256) for item in found.tensors]


def test_tensors_against_safetensors(tied: dict[str, Path]) -> None:
    from safetensors import safe_open

    expected = {}
    for shard in tied["hf"].glob("*.safetensors"):
        with safe_open(shard, "numpy") as file:
            expected.update({name: file.get_tensor(name).tobytes() for name in file.keys()})  # noqa: SIM118  no mapping
    found = hash_checkpoint(tied["hf"], only="tensors")
    assert {item.name: item.sha256 for item in found.tensors} == {
        name: hashlib.sha256(data).hexdigest() for name, data in expected.items()
    }
    assert found.bytes == sum(map(len, expected.values())) and found.files == []


@pytest.mark.parametrize("model", ["tied", "experts"])
def test_every_layout_gives_the_same(model: str, request: pytest.FixtureRequest) -> None:
    layouts: dict[str, Path] = request.getfixturevalue(model)
    found = {layout: hash_checkpoint(layouts[layout], only="tensors", threads=3) for layout in LAYOUTS}
    assert len({item.model for item in found.values()}) == 1
    assert all(tensors_of(item) == tensors_of(found["hf"]) for item in found.values())
    assert tensors_of(hash_checkpoint(layouts["torch"], only="tensors", threads=1)) == tensors_of(found["hf"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files(tied: dict[str, Path], layout: str) -> None:
    found = hash_checkpoint(tied[layout], only="files")
    expected = {name: hashlib.sha256(data).hexdigest() for name, data in files_of(tied[layout]).items()}
    assert {item.path: item.sha256 for item in found.files} == expected
    assert (found.tensors, found.model) == ([], None)


def test_one_bit(tied: dict[str, Path], changed: Callable[[str], Path]) -> None:
    copy = changed("hf")
    shard = sorted(copy.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    before, after = hash_checkpoint(tied["hf"]), hash_checkpoint(copy)
    moved = [a.name for a, b in zip(after.tensors, before.tensors, strict=True) if a != b]
    assert len(moved) == 1 and after.model != before.model
    assert [a.path for a, b in zip(after.files, before.files, strict=True) if a != b] == [shard.name]


def test_progress_and_bad_part(tied: dict[str, Path]) -> None:
    seen: list[tuple[int, int]] = []
    found = hash_checkpoint(tied["hf"], progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (found.bytes, found.bytes)
    with pytest.raises(UsageError, match="one of tensors, files"):
        hash_checkpoint(tied["hf"], only="headers")


def test_as_a_command(tied: dict[str, Path]) -> None:
    lines = {}
    for layout in ("hf", "torch"):
        result = CliRunner().invoke(cli.app, ["hash", str(tied[layout]), "--only", "tensors"], prog_name="ckptkit")
        assert result.exit_code == 0
        lines[layout] = result.stdout
    assert lines["hf"] == lines["torch"] and "(model)" in lines["hf"]
    result = CliRunner().invoke(cli.app, ["hash", str(tied["torch_dist"]), "--json"], prog_name="ckptkit")
    told = json.loads(result.stdout)
    assert told["model"] in lines["hf"]
    assert "release/.metadata" in {file["path"] for file in told["files"]}
    assert CliRunner().invoke(cli.app, ["hash", str(tied["hf"] / "no")], prog_name="ckptkit").exit_code == 3
