"""Adapters on real megatron-core linears, against PEFT on transformers: fp32 logits at every position."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptkit import convert
from ckptkit.errors import UnsupportedError, UsageError
from ckptkit.sharding.grid import Parallelism
from ckptkit.tables.lora import LAYOUTS
from ckptkit.verification.logits import verify_logits
from ckptkit.verification.ranks.jobs import AdapterJob
from ckptkit.verification.ranks.pool import RankPool
from ckptkit.verification.reports.report import LogitsReport
from ckptkit.verification.sides import Side
from tests.lora import save_adapter
from tests.models import MODELS, save_model
from tests.verification.conftest import DEVICE

EXACT = 1e-4
"""What an adapter adds is as large as the weights here; a fault is off by far more."""
QUIET: dict[str, Any] = {"target_modules": "all-linear", "lora_alpha": 2}
GRIDS = [Parallelism(2), Parallelism(1, 2), Parallelism(2, 2)]
EXPERT_GRIDS = [Parallelism(ep=2), Parallelism(2, ep=2), Parallelism(2, ep=2, etp=1), Parallelism(1, 2, ep=2)]
EXPERTS = [kind for kind, (_, changes) in MODELS.items() if any("experts" in key for key in changes)]

Saved = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A tiny model of a kind with a random adapter for all that PEFT calls linear layers, saved once."""
    done: dict[str, tuple[Path, Path]] = {}

    def get(kind: str) -> tuple[Path, Path]:
        if kind not in done:
            folder = tmp_path_factory.mktemp("adapters") / kind
            base = save_model(folder / "base", kind)
            done[kind] = base, save_adapter(folder / "adapter", base, **QUIET)
        return done[kind]

    return get


def cases() -> list[Any]:
    """Each family once, grids and layouts taking turns; each kind on each grid in each layout is slow."""
    families: dict[str, str] = {kind.split("-")[0]: kind for kind in reversed(MODELS)}
    quick = []
    for at, kind in enumerate(families.values()):
        grids = [*EXPERT_GRIDS, *GRIDS] if kind in EXPERTS else GRIDS
        quick.append((kind, grids[at % len(grids)], LAYOUTS[at // 2 % len(LAYOUTS)]))
    every = [
        *itertools.product(MODELS, GRIDS, LAYOUTS),
        *itertools.product(EXPERTS, EXPERT_GRIDS, LAYOUTS),
    ]
    return [*quick, *(pytest.param(*case, marks=pytest.mark.slow) for case in every if case not in quick)]


def logits_of(base: Path, adapter: Path, candidate: Path, pool: RankPool, **options: Any) -> LogitsReport:
    """The logits level by itself: PEFT's, and those of megatron-core with an adapter in a Megatron checkpoint."""
    grid = options.pop("grid", None)
    reference = Side(base, "hf", adapter=AdapterJob(str(adapter)))
    found = Side(base, "megatron", grid=grid, adapter=AdapterJob(str(candidate)))
    return verify_logits(reference, found, pool=pool, device=DEVICE, **{"tolerance": EXACT, **options})


@pytest.mark.parametrize(("kind", "grid", "layout"), cases(), ids=str)
def test_against_peft(saved: Saved, tmp_path: Path, pool: RankPool, kind: str, grid: Parallelism, layout: str) -> None:
    base, adapter = saved(kind)
    try:
        convert(adapter, tmp_path / "meg", to="torch", adapter_layout=layout, grid=grid, hf_reference=base)
    except (UnsupportedError, UsageError) as error:
        assert layout == "canonical" and kind.startswith("gemma4"), error
        return
    if layout == "canonical" and "linear_key_head_dim" in MODELS[kind][1]:  # no other software has such pairs
        with pytest.raises(UnsupportedError, match=r"adapters for part0, part1.*no library has"):
            logits_of(base, adapter, tmp_path / "meg", pool, grid=grid, greedy=0)
        return
    report = logits_of(base, adapter, tmp_path / "meg", pool, grid=grid, greedy=0)
    assert report.passed, (report.summary, report.messages)
