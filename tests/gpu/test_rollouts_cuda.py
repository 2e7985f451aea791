"""What an engine recorded on a GPU, beside the trainer's grid on GPUs: the same, or told from rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ckptkit import convert
from ckptkit.sharding.grid import Parallelism
from ckptkit.verification.ranks.pool import RankPool
from ckptkit.verification.reports.report import VerificationReport
from ckptkit.verification.rollouts.verify import verify_engine
from tests.rollouts import sample, save_recorded, write

pytestmark = pytest.mark.gpu

KINDS = [("llama", Parallelism(1, 3)), ("llama", Parallelism(2)), ("qwen3_moe", Parallelism(ep=2))]


def judged(
    folder: Path, pool: RankPool, kind: str, grid: Parallelism, dtype: str, **sampling: Any
) -> VerificationReport:
    """The report on what transformers sampled on the GPU, with the experts that it chose."""
    source = save_recorded(folder / "hf", kind)
    convert(source, folder / "meg", to="torch", grid=grid)
    records = sample(source, dtype=dtype, routing=kind != "llama", device="cuda", tokens=40, **sampling)
    file = write(folder / "rollouts.jsonl", records)
    return verify_engine(
        None, folder / "meg", file, engine_dtype=dtype, dtype=dtype, device="cuda", packed=True, pool=pool
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "grid"), KINDS, ids=str)
def test_the_same(tmp_path: Path, pool: RankPool, kind: str, grid: Parallelism, dtype: str) -> None:
    report = judged(tmp_path, pool, kind, grid, dtype)
    assert report.passed, report.levels[0].summary
    assert ("replayed" in report.levels[0].details["columns"]) == (kind != "llama")


def test_an_unknown_temperature_is_told_from_rounding(tmp_path: Path, pool: RankPool) -> None:
    report = judged(tmp_path, pool, "llama", Parallelism(2), "bfloat16", temperature=0.8)
    assert not report.passed and report.levels[0].details["scaled"]
