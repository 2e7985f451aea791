"""The ranks that are blamed for a difference of bytes, the facts of the run, and the hashes of both sides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptkit import convert, verify
from ckptkit.inspection.hashing import hash_checkpoint
from ckptkit.sharding.grid import Parallelism
from tests.megatron.test_families_against_transformers import put, rewrite
from tests.models import save_model

GRID = Parallelism(2, 2, ep=2)
EXPERT = "decoder.layers.0.mlp.experts.local_experts.0.linear_fc2.weight"
CASES: dict[str, tuple[str, list[str], str, list[int]]] = {
    # tensor in the file, files (tensor, pipeline, expert rank), canonical name, ranks
    "an expert": (EXPERT, ["01_001_001"], "decoder.layers.2.mlp.experts.linear_fc2.weight2", [7]),
    "a matrix in every replica": (
        "decoder.layers.0.self_attention.linear_proj.weight",
        ["01_000_000", "01_000_001"],
        "decoder.layers.0.self_attention.linear_proj.weight",
        [1, 3],
    ),
    "the vocabulary": (
        "embedding.word_embeddings.weight",
        ["00_000_000", "00_000_001"],
        "embedding.word_embeddings.weight",
        [0, 2],
    ),
    "a norm on all ranks": (
        "decoder.final_layernorm.weight",
        [f"{tensor}_001_{expert}" for tensor in ("00", "01") for expert in ("000", "001")],
        "decoder.final_layernorm.weight",
        [4, 5, 6, 7],
    ),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("guilt") / "hf", "mixtral")


def damage(folder: Path, name: str, files: list[str]) -> None:
    def bend(weight: Any) -> Any:
        weight = weight.clone()
        weight.flatten()[:3] += 0.5
        return weight

    change = put(name, bend)
    for file in files:
        rewrite(folder / "release" / f"mp_rank_{file}" / "model_optim_rng.pt", lambda content: change(content["model"]))


@pytest.mark.parametrize("case", CASES)
def test_the_ranks_that_hold_a_difference(source: Path, tmp_path: Path, case: str) -> None:
    name, files, key, ranks = CASES[case]
    convert(source, tmp_path / "meg", to="torch", grid=GRID, spec="te", experts="sequential")
    damage(tmp_path / "meg", name, files)
    (level,) = [level for level in verify(source, tmp_path / "meg", level="weights").levels if level.name == "weights"]
    (found,) = level.details["differences"]
    assert (found["tensor"], found["ranks"], found["differing"]) == (key, ranks, 3)
    assert found["largest"] == pytest.approx(0.5, rel=1e-3)
    assert found["layer"] == (int(key.split(".")[2]) if "layers" in key else None)


def test_the_largest_difference_is_first(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "meg", to="torch", experts="sequential")
    for layer in (1, 0):
        change = put(f"decoder.layers.{layer}.self_attention.linear_proj.weight", lambda weight: weight * (3 - layer))  # noqa: B023
        rewrite(
            tmp_path / "meg" / "release" / "mp_rank_00" / "model_optim_rng.pt",
            lambda content: change(content["model"]),  # noqa: B023
        )
    report = verify(source, tmp_path / "meg", level="weights")
    found = report.levels[-1].details["differences"]
    assert [item["layer"] for item in found] == [0, 1]
    assert found[0]["largest"] > found[1]["largest"]


def test_the_report_of_equal_models_says_how_it_was_made(llama: Callable[..., Path], tmp_path: Path) -> None:
    source = llama("gqa", num_hidden_layers=2)
    convert(source, tmp_path / "meg", to="torch", grid=Parallelism(2))
    report = verify(source, tmp_path / "meg", level="weights", hash=True, command="ckptkit verify")
    sides = report.to_dict()["sides"]
    assert report.levels[-1].details["differences"] == []
    assert sides["reference"]["sha256"] == sides["candidate"]["sha256"] == hash_checkpoint(source).model
    assert report.command == "ckptkit verify" and report.started.endswith("+00:00")
    assert {"python", "torch", "ckptkit-megatron"} <= report.versions.keys()
    assert verify(source, tmp_path / "meg", level="structure").sides["candidate"].sha256 is None
