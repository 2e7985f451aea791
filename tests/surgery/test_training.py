"""Training nothing but the adapter, on two tensor parallel ranks, against transformers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.formats.rank_pool import RankProcesses
from tests.surgery.adapter_training import RUNS
from tests.surgery.stage_training import run_adapter_training

EXACT = 2e-5


@pytest.fixture(scope="module")
def answers(
    two_ranks: RankProcesses, wide_splits: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What each of the two ranks saw: (kind of adapter, sequence parallelism) -> facts."""
    folder = tmp_path_factory.mktemp("training")
    for kind, path in wide_splits.items():
        (folder / kind).symlink_to(path)
    return run_adapter_training(two_ranks, folder)


@pytest.mark.parametrize(("kind", "sequence_parallel", "recompute"), RUNS)
def test_adapter_only_steps(answers: list[dict[str, Any]], kind: str, sequence_parallel: bool, recompute: bool) -> None:
    ranks = [answer[f"{kind} {sequence_parallel} {recompute}"] for answer in answers]
    first = ranks[0]
    assert first["matrices"] == (["linear_1"] if kind == "linear" else ["linear_1", "linear_2"])
    assert first["gradient_error"] < EXACT < 1e-2 < first["swapped"]
    assert first["weight_error"] < EXACT
    for rank in ranks:
        assert rank["losses"] == pytest.approx(first["expected"], rel=EXACT)
    assert all(later < 0.999 * earlier for earlier, later in itertools.pairwise(first["losses"]))
    for rank in ranks:
        assert rank["frozen"] > 20 and rank["moved"] == []
