"""The index of a sharded model: paths that mean the same file are the same, for every command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptkit.conversion.convert import convert
from ckptkit.errors import InputError
from ckptkit.inspection.hashing import hash_checkpoint
from ckptkit.inspection.validation import validate
from fixtures.make_damaged import FIRST, INDEX, SECOND, SOUND
from tests.models import files_of, save_llama

Change = Callable[[str], str]
SPELLINGS: dict[str, Change] = {
    "dot": lambda name: f"./{name}",
    "dots": lambda name: f"././/{name}",
    "folder": lambda name: f"weights/{name}",
    "folder, dot": lambda name: f"./weights//./{name}",
    "mixed": lambda name: name if name.startswith("model-00001") else f"./{name}",
}


def sharded(path: Path, spell: Change) -> Path:
    """A model whose index spells its shards otherwise, and has them where it says."""
    save_llama(path, shard="100KB")
    index = json.loads((path / INDEX).read_text())
    for name in set(index["weight_map"].values()):
        (path / spell(name)).parent.mkdir(exist_ok=True)
        (path / name).rename(path / spell(name))
    index["weight_map"] = {key: spell(name) for key, name in index["weight_map"].items()}
    (path / INDEX).write_text(json.dumps(index))
    return path


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_of_one_path(tmp_path: Path, name: str) -> None:
    source, plain = sharded(tmp_path / "source", SPELLINGS[name]), save_llama(tmp_path / "plain", shard="100KB")
    expected = hash_checkpoint(plain).tensors
    assert hash_checkpoint(source).tensors == expected
    assert validate(source, values=True).passed
    for to in ("hf", "packed", "torch", "torch_dist"):
        convert(source, tmp_path / to, to=to)
        assert hash_checkpoint(tmp_path / to).tensors == expected
        assert validate(tmp_path / to).passed
    convert(tmp_path / "torch", tmp_path / "back", to="hf")
    assert files_of(tmp_path / "back") == files_of(source)


def with_index(path: Path, weight_map: object) -> Path:
    path.mkdir()
    for file in (SOUND / "hf").iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return path


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("../x", "points outside"),
        ("/etc/passwd", "points outside"),
        ("./../x", "points outside"),
        ("a/../../x", "points outside"),
        (".", "points outside"),
        ("", "points outside"),
        ("..\\x", "points outside"),
        ("x\0y", "points outside"),
        (3, "no weight_map"),
        (None, "no weight_map"),
        ([FIRST], "no weight_map"),
    ],
)
def test_paths_that_lead_elsewhere(tmp_path: Path, shard: object, message: str) -> None:
    source = with_index(tmp_path / "hf", {"lm_head.weight": shard, "model.norm.weight": SECOND})
    with pytest.raises(InputError, match=message):
        convert(source, tmp_path / "out", to="torch")
    assert not validate(source).passed


@pytest.mark.parametrize("command", ["convert", "validate"])
def test_a_shard_that_is_no_file(tmp_path: Path, command: str) -> None:
    import os

    source = with_index(tmp_path / "hf", {"lm_head.weight": FIRST, "model.norm.weight": SECOND})
    (source / FIRST).unlink()
    os.mkfifo(source / FIRST)
    if command == "validate":
        assert not validate(source).passed
        return
    with pytest.raises(InputError, match="which is missing"):
        convert(source, tmp_path / "out", to="torch")
