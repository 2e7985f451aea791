"""Hugging Face outputs against what transformers itself writes for the same model and the same size of shards."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ckptkit import Parallelism, convert
from tests.models import save_llama

SHARD = "300KB"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file, so that the output's shards are ours and not the source's."""
    return save_llama(tmp_path_factory.mktemp("one") / "model")


@pytest.fixture(scope="module", params=["torch", "torch_dist"])
def ours(model: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("ours")
    convert(model, folder / "meg", to=request.param, grid=Parallelism(2, 2))
    convert(folder / "meg", folder / "hf", to="hf", shard_size=300_000)
    return folder / "hf"


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("theirs") / "model", shard=SHARD)


def index_of(path: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((path / "model.safetensors.index.json").read_text())
    return index


def test_the_index(ours: Path, theirs: Path) -> None:
    mine, other = index_of(ours), index_of(theirs)
    assert mine["metadata"] == other["metadata"]
    assert mine["weight_map"].keys() == other["weight_map"].keys()
    assert list(mine["weight_map"]) == sorted(mine["weight_map"])


def test_shards(ours: Path, theirs: Path) -> None:
    """The same pattern of names, counted from 1, all there and no more; none over the size but single tensors."""
    from safetensors import safe_open

    pattern = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
    for path in (ours, theirs):
        names = sorted(set(index_of(path)["weight_map"].values()))
        assert names == sorted(file.name for file in path.glob("*.safetensors"))
        numbers = [tuple(map(int, match.groups())) for name in names if (match := pattern.fullmatch(name))]
        assert numbers == [(number, len(names)) for number in range(1, len(names) + 1)] and len(names) > 2
        for name in names:
            with safe_open(path / name, "pt") as file:
                assert file.metadata() == {"format": "pt"}
                tensors = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118  no mapping
                assert sum(tensor.nbytes for tensor in tensors) <= 300_000 or len(tensors) == 1


def test_a_single_file(model: Path, ours: Path, tmp_path: Path) -> None:
    convert(ours, tmp_path / "single", to="hf", shard_size=10**9)
    written = sorted(file.name for file in (tmp_path / "single").iterdir())
    assert written == sorted(file.name for file in model.iterdir())
    assert "model.safetensors.index.json" not in written


def test_small_files_are_carried(model: Path, ours: Path) -> None:
    small = ("config.json", "generation_config.json", "tokenizer/notes.txt")
    assert all((ours / name).read_bytes() == (model / name).read_bytes() for name in small)


def test_transformers_loads_it(model: Path, ours: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    loaded, about = load(ours, output_loading_info=True)
    assert not any(about.values()), about
    expected = load(model).state_dict()
    found = loaded.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
