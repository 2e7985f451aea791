"""Running models in CUDA memory: `save_hf`, `load_hf` and `state_dict_of` on two to four ranks.

The ranks are gloo processes that share the machine's devices (see `tests/formats/megatron_ranks.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.formats.golden_hf import save_hf
from tests.formats.megatron_ranks import Job, run
from tests.formats.rank_pool import RankProcesses
from tests.formats.test_live_models import check

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankProcesses]:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with RankProcesses(4, "tests.formats.megatron_ranks") as processes:
        yield processes


@pytest.mark.parametrize(
    ("model", "grid"),
    [
        ("qwen3", {"tp": 2}),
        ("qwen3_tied", {"pp": 2}),
        ("qwen3_moe", {"tp": 2, "ep": 2}),
        ("qwen3", {"tp": 2, "dp": 2}),
    ],
)
def test_both_ways(ranks: RankProcesses, tmp_path: Path, model: str, grid: dict[str, Any]) -> None:
    import torch

    if "dp" in grid and torch.cuda.device_count() < 4:
        pytest.skip("needs a GPU for each of its four ranks: where they shared two, one of them died")
    check(ranks, tmp_path, Job("save_hf", "", model, **grid))


def test_slices_are_on_the_device(ranks: RankProcesses, tmp_path: Path) -> None:
    given = {"hf_reference": str(save_hf(tmp_path / "hf", "qwen3"))}
    assert run(ranks, [Job("slices", "", "qwen3", tp=2, metadata=given)]) == [""]
