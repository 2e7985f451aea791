"""Full recompute of activations changes no bit of any gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ckptkit import convert
from ckptkit.sharding.grid import Parallelism
from ckptkit.verification.ranks.jobs import OPENER
from ckptkit.verification.ranks.pool import RankPool
from ckptkit.verification.run_options import RunOptions
from ckptkit.verification.sides import Side, open_side
from ckptkit.verification.training import files
from ckptkit.verification.training.passes import Backwards, TrainingRun
from tests.verification.conftest import DEVICE
from tests.verification.training.conftest import Sources
from tests.verification.training.test_gradients import PACKED, SP, rows, some_slow

WAYS: list[tuple[str, Parallelism, dict[str, Any]]] = [
    ("gemma4_text-moe", Parallelism(2, ep=2), {**SP, **PACKED}),
    ("gemma4_text-e2b", Parallelism(1, 2, 2), PACKED),
    ("gqa", Parallelism(2, 2), SP),
    ("mixtral", Parallelism(1, 2, ep=2), {}),
]


@pytest.mark.parametrize(("kind", "grid", "how"), some_slow(WAYS), ids=str)
def test_recompute_changes_no_bit(
    sources: Sources, tmp_path: Path, pool: RankPool, kind: str, grid: Parallelism, how: dict[str, Any]
) -> None:
    convert(sources[kind], tmp_path / "meg", to="torch", spec="local", grid=grid)
    reference, candidate = (
        open_side(side, OPENER) for side in (Side(sources[kind], "hf"), Side(tmp_path / "meg", "megatron"))
    )
    backwards = Backwards(pool, tmp_path, OPENER, rows())
    options = RunOptions.of(device=DEVICE, **how)
    theirs = backwards.run(reference, "reference", options.plain())

    def contents(name: str, **more: Any) -> dict[str, bytes]:
        run = backwards.run(candidate, name, RunOptions.of(**{**vars(options), **more}), routed_as=theirs)
        assert isinstance(run, TrainingRun)
        return {path.name: path.read_bytes() for path in (run.folder / files.GRADIENTS).iterdir()}

    kept = contents("kept")
    assert len(kept) == grid.world_size * grid.vpp
    assert contents("recomputed", recompute=True) == kept
