"""Every family through every format and many grids: the same files come back, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ckptkit.conversion.convert import convert
from ckptkit.errors import InputError, UsageError
from ckptkit.families import family_of
from ckptkit.inspection.summary import inspect
from ckptkit.sharding.grid import Parallelism
from tests.models import MODELS, files_of, raw_config, save_model

GRIDS = [
    Parallelism(2, 2),
    Parallelism(1, 2, 2),
    Parallelism(4),
    Parallelism(1, 4),
]
EXPERT_GRIDS = [
    Parallelism(2, 2, ep=2),
    Parallelism(1, 1, ep=4),
    Parallelism(2, 1, ep=2, etp=1),
    Parallelism(4, 2, ep=2, etp=2),
    Parallelism(2, 2, etp=1),
]


def is_moe(kind: str) -> bool:
    raw: dict[str, Any] = raw_config(kind)
    raw = raw.get("text_config") or raw
    return any(raw.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts"))


MOE = ["qwen3_moe", "qwen3_moe-mixed", "qwen3_moe-stepped", "mixtral", "mixtral-windowed"]
SCORED = ["glm4_moe", "glm4_moe-air", "glm4_moe-sparse", "deepseek_v3", "deepseek_v3-moonlight", "glm4_moe_lite"]
DELTA = ["qwen3_next", "qwen3_next-mixed", "qwen3_5_moe_text", "qwen3_5_moe"]
GPT_OSS = ["gpt_oss", "gpt_oss-plain"]
GEMMA4_MOE = ["gemma4_text-moe", "gemma4-moe"]


def test_the_list_of_expert_models_is_complete() -> None:
    assert [kind for kind in MODELS if is_moe(kind)] == [*MOE, *SCORED, *DELTA, *GPT_OSS, *GEMMA4_MOE]


@pytest.mark.parametrize("kind", MODELS)
def test_round_trip(tmp_path: Path, kind: str) -> None:
    source = save_model(tmp_path / "hf", kind, dtype="bfloat16")
    spec = ("te", "local")[len(kind) % 2]
    grid = GRIDS[sum(map(ord, kind)) % len(GRIDS)]
    convert(source, tmp_path / "packed", to="packed", spec=spec)
    convert(tmp_path / "packed", tmp_path / "meg", to="torch", grid=grid, spec=spec)
    convert(source, tmp_path / "direct", to="torch", grid=grid, spec=spec)
    convert(tmp_path / "meg", tmp_path / "back", to="hf")
    assert files_of(tmp_path / "back") == files_of(source)
    assert files_of(tmp_path / "meg") == files_of(tmp_path / "direct")
    assert inspect(tmp_path / "meg").parameters == inspect(source).parameters


def other_writers() -> list[tuple[str, str]]:
    """Kinds, and the spellings of their family that are no specs of megatron-core's (verl's has tests of its own)."""
    found = [(kind, family_of(raw_config(kind), kind)) for kind in MODELS]
    usual = {"te", "local", "verl"}
    return [(kind, name.name) for kind, family in found for name in family.spellings if name.name not in usual]


@pytest.mark.parametrize(("kind", "spec"), other_writers())
def test_round_trip_in_the_names_of_other_writers(tmp_path: Path, kind: str, spec: str) -> None:
    source = save_model(tmp_path / "hf", kind, dtype="bfloat16")
    convert(source, tmp_path / "meg", to="torch", grid=Parallelism(2, 2), spec=spec)
    convert(tmp_path / "meg", tmp_path / "back", to="hf")
    assert files_of(tmp_path / "back") == files_of(source)
    convert(tmp_path / "meg", tmp_path / "te", to="torch", grid=Parallelism(1, 2))
    convert(source, tmp_path / "direct", to="torch", grid=Parallelism(1, 2))
    assert files_of(tmp_path / "te") == files_of(tmp_path / "direct")


@pytest.mark.parametrize(
    "kind",
    [
        "qwen3",
        "qwen3_moe",
        "qwen3_moe-mixed",
        "gemma3",
        "apertus",
        "glm4_moe",
        "deepseek_v3",
        "qwen3_next-mixed",
        "gpt_oss",
        "gemma4_text-e4b",
        "gemma4",
        "gemma4-moe",
    ],
)
def test_distributed_checkpoints_in_any_order(tmp_path: Path, kind: str) -> None:
    source = save_model(tmp_path / "hf", kind, dtype="bfloat16")
    grid = Parallelism(2, 2, ep=2) if is_moe(kind) else Parallelism(2, 2)
    convert(source, tmp_path / "dist", to="torch_dist", grid=grid)
    convert(tmp_path / "dist", tmp_path / "back", to="hf")
    assert files_of(tmp_path / "back") == files_of(source)
    assert inspect(tmp_path / "dist").grid == str(grid)
    convert(tmp_path / "dist", tmp_path / "legacy", to="torch", grid=Parallelism(1, 2))
    convert(source, tmp_path / "direct", to="torch", grid=Parallelism(1, 2))
    assert files_of(tmp_path / "legacy") == files_of(tmp_path / "direct")
    convert(tmp_path / "legacy", tmp_path / "again", to="torch_dist", grid=grid)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "dist")


@pytest.mark.slow
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_round_trip_over_all_grids(tmp_path: Path, kind: str, grid: Parallelism) -> None:
    source = save_model(tmp_path / "hf", kind, dtype="bfloat16")
    convert(source, tmp_path / "meg", to="torch", grid=grid)
    convert(tmp_path / "meg", tmp_path / "back", to="hf")
    assert files_of(tmp_path / "back") == files_of(source)


@pytest.mark.parametrize("grid", EXPERT_GRIDS, ids=str)
@pytest.mark.parametrize(
    ("kind", "experts"),
    [
        ("qwen3_moe-mixed", "grouped"),
        ("qwen3_moe-stepped", "sequential"),
        ("mixtral", "sequential"),
        ("glm4_moe", "grouped"),
        ("qwen3_next", "grouped"),
        ("gpt_oss", "sequential"),
        ("gemma4_text-moe", "grouped"),
    ],
)
def test_experts_over_ranks(tmp_path: Path, kind: str, experts: str, grid: Parallelism) -> None:
    source = save_model(tmp_path / "hf", kind, dtype="bfloat16", fused=experts == "grouped")
    convert(source, tmp_path / "meg", to="torch", grid=grid, experts=experts)
    convert(tmp_path / "meg", tmp_path / "back", to="hf")
    assert files_of(tmp_path / "back") == files_of(source)
    convert(tmp_path / "meg", tmp_path / "again", to="torch", grid=Parallelism(1, 2, ep=2))
    convert(source, tmp_path / "direct", to="torch", grid=Parallelism(1, 2, ep=2))
    assert files_of(tmp_path / "again") == files_of(tmp_path / "direct")


def test_experts_need_a_grid_that_divides(tmp_path: Path) -> None:
    source = save_model(tmp_path / "moe", MOE[0])
    with pytest.raises(UsageError, match="experts do not divide over --ep 3"):
        convert(source, tmp_path / "meg", to="torch", grid=Parallelism(ep=3))
    with pytest.raises(UsageError, match="would collide"):
        convert(source, tmp_path / "meg", to="torch", grid=Parallelism(1, etp=2))
    dense = save_model(tmp_path / "dense", "qwen3")
    with pytest.raises(UsageError, match="but this model has none"):
        convert(dense, tmp_path / "meg", to="torch", grid=Parallelism(ep=2))


def test_diverging_copies_on_expert_ranks_are_an_error(tmp_path: Path) -> None:
    import torch

    source = save_model(tmp_path / "hf", MOE[0])
    convert(source, tmp_path / "meg", to="torch", grid=Parallelism(1, 1, ep=2))
    path = tmp_path / "meg" / "release" / "mp_rank_00_001" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    content["model"]["decoder.final_layernorm.weight"] *= 2
    torch.save(content, path)
    with pytest.raises(InputError, match=r"decoder\.final_layernorm\.weight on expert parallel ranks 0 and 1"):
        convert(tmp_path / "meg", tmp_path / "back", to="hf")


def test_gemma3_text_part_alone(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = save_model(tmp_path / "hf", "gemma3")
    result = convert(source, tmp_path / "text", to="hf", layout="text")
    assert any("left out (--layout text)" in text for text in result.lossy)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "text", output_loading_info=True)
    assert not any(info.values())
    assert json.loads((tmp_path / "text" / "config.json").read_text())["architectures"] == ["Gemma3ForCausalLM"]
    convert(source, tmp_path / "meg", to="torch", layout="text")
    convert(tmp_path / "meg", tmp_path / "back", to="hf")
    assert files_of(tmp_path / "back") == files_of(source)
    with pytest.raises(UsageError, match="is a text model already"):
        convert(save_model(tmp_path / "qwen2", "qwen2"), tmp_path / "no", to="hf", layout="text")
