"""Running models of the real Megatron-Core: `save_hf` is `convert` of what it saves, and `load_hf` the way back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckptkit.conversion.convert import convert
from tests.formats.golden_hf import save_hf
from tests.formats.megatron_ranks import Job, run
from tests.formats.rank_pool import RankProcesses
from tests.formats.round_trip import label
from tests.models import files_of

pytest.importorskip("megatron.core")

FAST = [Job("save_hf", "", "qwen3_moe", tp=2, pp=2)]
GRIDS: list[tuple[str, dict[str, Any]]] = [
    ("qwen3", {}),
    ("qwen3", {"tp": 2, "pp": 2, "vpp": 2}),
    ("qwen3", {"pp": 2, "layout": "Et|tttL"}),
    ("qwen3_tied", {"tp": 2, "pp": 2}),
    ("qwen3_tied", {"pp": 4, "layout": "E||ttt|tL"}),
    ("qwen3_moe", {"tp": 2, "ep": 2}),
    ("qwen3_moe", {"ep": 4}),
]
SLOW = [Job("save_hf", "", model, **grid) for model, grid in GRIDS]


@pytest.mark.parametrize("job", [*FAST, *(pytest.param(job, marks=pytest.mark.slow) for job in SLOW)], ids=label)
def test_both_ways(megatron_ranks: RankProcesses, tmp_path: Path, job: Job) -> None:
    check(megatron_ranks, tmp_path, job)


def check(ranks: RankProcesses, folder: Path, job: Job) -> None:
    """What `save_hf` writes is what `convert` makes of a distributed checkpoint; `load_hf` takes any format back."""
    source = save_hf(folder / "hf", job.model)
    given = {"hf_reference": str(source)}
    live, dist = str(folder / "live"), folder / "dist"
    jobs = [
        replace(job, folder=live, metadata=given),
        replace(job, action="save", folder=str(dist)),
        replace(job, action="load_hf", folder=live),
        replace(job, action="load_hf", folder=str(dist), metadata=given),
    ]
    assert run(ranks, jobs) == [""] * len(jobs)
    convert(dist, folder / "converted", to="hf", hf_reference=source)
    assert files_of(folder / "live") == files_of(folder / "converted") == files_of(source)


@pytest.fixture(scope="module")
def eight_ranks() -> Any:
    with RankProcesses(8, "tests.formats.megatron_ranks") as ranks:
        yield ranks


@pytest.mark.slow
def test_eight_ranks(eight_ranks: RankProcesses, tmp_path: Path) -> None:
    check(eight_ranks, tmp_path, Job("save_hf", "", "qwen3_moe", tp=2, pp=2, ep=2))
