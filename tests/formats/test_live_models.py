"""Running models of the real Megatron-Core: `save_hf` is `convert` of what it saves, and `load_hf` the way back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckptkit.conversion.convert import convert
from tests.formats.golden_hf import save_hf
from tests.formats.megatron_ranks import Job, is_moe, run
from tests.formats.rank_pool import RankProcesses
from tests.formats.round_trip import label
from tests.models import files_of

pytest.importorskip("megatron.core")

FAST = [Job("save_hf", "", "qwen3_moe", tp=2, pp=2), Job("save_hf", "", "gpt_oss", ep=2)]
GRIDS: list[tuple[str, dict[str, Any]]] = [
    ("qwen3", {}),
    ("qwen3", {"tp": 2, "pp": 2, "vpp": 2}),
    ("qwen3", {"pp": 2, "layout": "Et|tttL"}),
    ("qwen3_tied", {"tp": 2, "pp": 2}),
    ("qwen3_tied", {"pp": 4, "layout": "E||ttt|tL"}),
    ("qwen3_moe", {"tp": 2, "ep": 2}),
    ("qwen3_moe", {"ep": 4}),
    ("qwen3", {"tp": 2, "dp": 2}),
    ("qwen3_moe", {"ep": 2, "dp": 2}),
    ("gpt_oss", {"tp": 2, "pp": 2}),
    ("gpt_oss", {"pp": 2, "ep": 2}),
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


def test_slices(megatron_ranks: RankProcesses, tmp_path: Path) -> None:
    source = save_hf(tmp_path / "hf", "qwen3_moe")
    given = {"hf_reference": str(source)}
    assert run(megatron_ranks, [Job("slices", "", "qwen3_moe", tp=2, pp=2, metadata=given)]) == [""]


@pytest.mark.slow
@pytest.mark.parametrize("grid", [{"tp": 4}, {"ep": 2, "tp": 2}, {"pp": 2, "dp": 2}], ids=str)
@pytest.mark.parametrize("model", ["qwen3", "qwen3_tied", "qwen3_moe", "gpt_oss"])
def test_slices_of_grids(megatron_ranks: RankProcesses, tmp_path: Path, model: str, grid: dict[str, Any]) -> None:
    if not is_moe(model, 0) and "ep" in grid:
        pytest.skip("it has no experts")
    if model == "gpt_oss" and len(grid) > 1 and "ep" in grid:
        grid = {"ep": 4}  # its tensor parallel ranks share no expert
    given = {"hf_reference": str(save_hf(tmp_path / "hf", model))}
    assert run(megatron_ranks, [Job("slices", "", model, metadata=given, **grid)]) == [""]


def test_what_is_refused(megatron_ranks: RankProcesses, tmp_path: Path) -> None:
    source, other = save_hf(tmp_path / "hf", "qwen3"), save_hf(tmp_path / "moe", "qwen3_moe")
    jobs = [
        Job("differing", str(tmp_path / "out"), "qwen3", tp=2, metadata={"hf_reference": str(source)}),
        Job("other_model", str(other), "qwen3", tp=2, pp=2),
    ]
    assert run(megatron_ranks, jobs) == ["", ""]


@pytest.fixture(scope="module")
def eight_ranks() -> Any:
    with RankProcesses(8, "tests.formats.megatron_ranks") as ranks:
        yield ranks


@pytest.mark.slow
def test_eight_ranks(eight_ranks: RankProcesses, tmp_path: Path) -> None:
    check(eight_ranks, tmp_path, Job("save_hf", "", "qwen3_moe", tp=2, pp=2, ep=2))


def test_columns_of_several_ranks_are_refused() -> None:
    """An expert of GPT-OSS that tensor parallel ranks share: no rank's memory has what its columns are made of."""
    from ckptkit.dtypes import DTYPES
    from ckptkit.errors import UnsupportedError
    from ckptkit.io.computed import columns_together
    from ckptkit.io.plan import MEMORY
    from ckptkit.megatron.live.holding import owner
    from ckptkit.tensors import Tensor, vstack

    def part(rank: int, name: str) -> Tensor:
        return Tensor.from_file(f"{MEMORY}0,{rank},0/0/{name}", 0, DTYPES["BF16"], (4, 6))

    whole = columns_together([part(1, "gate"), part(1, "up")])
    assert owner(part(1, "gate").bands[0].pieces[0]) == owner(whole.bands[0].pieces[0]) == (0, 1, 0)
    shared = [vstack([part(rank, name) for rank in range(2)]) for name in ("gate", "up")]
    with pytest.raises(UnsupportedError, match=r"several ranks hold.*GPT-OSS"):
        owner(columns_together(shared).bands[0].pieces[0])
