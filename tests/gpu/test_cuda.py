"""Every family on CUDA ranks: fp32 against transformers, bf16 by the noise floor. `make test-gpu` runs this.

A grid of n ranks uses NCCL where the machine has n GPUs; with fewer, gloo ranks share them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptkit.conversion import convert
from ckptkit.sharding.grid import Parallelism
from ckptkit.verification import verify
from ckptkit.verification.pool import RankPool
from tests.models import LLAMAS, MODELS, save_llama, save_model

pytestmark = pytest.mark.gpu

KINDS = ["gqa", "tied", "llama3", *MODELS]
GRIDS = [Parallelism(2), Parallelism(1, 2), Parallelism(2, 2)]
EXPERT_GRIDS = [Parallelism(ep=2), Parallelism(2, 1, ep=2)]
TOKENS = [[(7 * i + 3 * i * i) % 250 for i in range(40)], [(11 * i + 5) % 250 for i in range(40)]]


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with RankPool(4, start_timeout=300.0) as ranks:
        yield ranks


def has_experts(kind: str) -> bool:
    return kind.startswith(("qwen3_moe", "mixtral"))


def cases() -> list[tuple[str, Parallelism, str]]:
    """Each kind on every grid in fp32, and on one grid in bf16."""
    found = []
    for number, kind in enumerate(KINDS):
        grids = [*GRIDS, *(EXPERT_GRIDS if has_experts(kind) else [])]
        found += [(kind, grid, "float32") for grid in grids]
        found.append((kind, grids[number % len(GRIDS)], "bfloat16"))
    return found


@pytest.mark.parametrize(("kind", "grid", "dtype"), cases(), ids=str)
def test_family(pool: RankPool, tmp_path: Path, kind: str, grid: Parallelism, dtype: str) -> None:
    save = save_llama if kind in LLAMAS else save_model
    source = save(tmp_path / "hf", kind)
    convert(source, tmp_path / "meg", to="torch", grid=grid, spec="local")
    report = verify(
        source,
        tmp_path / "meg",
        device="cuda",
        dtype=dtype,
        tokens=TOKENS,
        tolerance=1e-4 if has_experts(kind) else 2e-5,
        pool=pool,
    )
    logits = report.levels[-1]
    record(kind, grid, dtype, logits.details, report.passed)
    assert report.passed, logits.summary


def record(kind: str, grid: Parallelism, dtype: str, details: dict[str, object], passed: bool) -> None:
    """Appends a line of figures to the file that CKPTKIT_GPU_REPORT names, for the table in docs/verification.md."""
    if target := os.environ.get("CKPTKIT_GPU_REPORT"):
        figures = {key: details.get(key) for key in ("agreement", "noise", "versions")}
        for figure in figures.values():
            if isinstance(figure, dict):
                figure.pop("per_position", None)
        line = {"kind": kind, "grid": str(grid), "dtype": dtype, "passed": passed, **figures}
        with Path(target).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
