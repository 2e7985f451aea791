"""Every family on CUDA ranks: fp32 against transformers, bf16 by the noise floor. `make test-gpu` runs this.

A grid of n ranks uses NCCL where the machine has n GPUs; with fewer, gloo ranks share them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ckptkit.cli.app import app
from ckptkit.conversion.convert import convert
from ckptkit.sharding.grid import Parallelism
from ckptkit.verification import verify
from ckptkit.verification.ranks.pool import RankPool
from ckptkit.verification.reports.report import VerificationReport
from tests.models import LLAMAS, MODELS, save_llama, save_model
from tests.precision import MANY_ROWS

pytestmark = pytest.mark.gpu

KINDS = ["gqa", "tied", "llama3", *MODELS]
GRIDS = [Parallelism(2), Parallelism(1, 2), Parallelism(2, 2)]
EXPERT_GRIDS = [Parallelism(ep=2), Parallelism(2, 1, ep=2)]
DTYPES = ("float32", "bfloat16")
EXACT = 2e-5
"""Also with experts: routing is replayed."""


def has_experts(kind: str) -> bool:
    """Whether a kind has experts."""
    return any("experts" in key for key in MODELS.get(kind, ("", {}))[1])


def cases() -> list[tuple[str, Parallelism, str]]:
    """Each kind on every grid in fp32, and in bf16 on one, with experts on two."""
    found = []
    for number, kind in enumerate(KINDS):
        found += [(kind, grid, "float32") for grid in [*GRIDS, *(EXPERT_GRIDS if has_experts(kind) else [])]]
        found.append((kind, GRIDS[number % len(GRIDS)], "bfloat16"))
        if has_experts(kind):
            found.append((kind, EXPERT_GRIDS[number % len(EXPERT_GRIDS)], "bfloat16"))
    return found


@pytest.mark.parametrize(("kind", "grid", "dtype"), cases(), ids=str)
def test_family(pool: RankPool, tmp_path: Path, kind: str, grid: Parallelism, dtype: str) -> None:
    report = compared(pool, tmp_path, kind, grid, dtype)
    logits = report.levels[-1]
    record(kind, grid, dtype, logits.details, report.passed)
    assert report.passed, logits.summary


def compared(
    pool: RankPool, tmp_path: Path, kind: str, grid: Parallelism, dtype: str = "float32"
) -> VerificationReport:
    """A tiny model of a kind, converted and verified."""
    source = (save_llama if kind in LLAMAS else save_model)(tmp_path / "hf", kind)
    convert(source, tmp_path / "meg", to="torch", grid=grid, spec="local")
    return verify(source, tmp_path / "meg", device="cuda", dtype=dtype, tokens=MANY_ROWS, tolerance=EXACT, pool=pool)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["gqa", "mixtral"])
def test_a_fault_is_seen_and_located(pool: RankPool, tmp_path: Path, kind: str, dtype: str) -> None:
    """What passes above could also pass because nothing is looked at."""
    import torch

    from ckptkit.verification.logits import Side, verify_logits

    assert compared(pool, tmp_path, kind, GRIDS[0]).passed
    name = f"decoder.layers.2.mlp.{'router' if has_experts(kind) else 'linear_fc2'}.weight"
    for path in (tmp_path / "meg").glob("release/*/model_optim_rng.pt"):
        content = torch.load(path, weights_only=False)
        content["model"][name] = content["model"][name].roll(1, 0)
        torch.save(content, path)
    sides = Side(tmp_path / "hf", "hf"), Side(tmp_path / "meg", "megatron")
    report = verify_logits(*sides, device="cuda", dtype=dtype, tolerance=EXACT, pool=pool)
    assert not report.passed
    assert report.location is not None and name in report.location.tensors, report.messages


def test_the_command(pool: RankPool, tmp_path: Path) -> None:
    """The same from the command line, which starts ranks of its own, with all reports."""
    source = save_model(tmp_path / "hf", "qwen3_moe")
    convert(source, tmp_path / "meg", to="torch", grid=Parallelism(ep=2))
    reports = [tmp_path / f"report.{kind}" for kind in ("json", "junit", "html")]
    options = [f"--{file.suffix[1:]}={file}" for file in reports]
    how = ["--device", "cuda", "--dtype", "bfloat16"]
    result = CliRunner().invoke(app, ["verify", str(source), str(tmp_path / "meg"), *how, *options])
    assert result.exit_code == 0, result.output
    assert all(file.stat().st_size > 500 for file in reports)


def record(kind: str, grid: Parallelism, dtype: str, details: dict[str, Any], passed: bool) -> None:
    """Appends a line of figures to the file that CKPTKIT_GPU_REPORT names, for the table in docs/verification.md."""
    if target := os.environ.get("CKPTKIT_GPU_REPORT"):
        figures = {key: details.get(key) for key in ("agreement", "noise", "routing", "seconds", "versions")}
        agreement = {key: value for key, value in (figures["agreement"] or {}).items() if key != "per_position"}
        line = {"kind": kind, "grid": str(grid), "dtype": dtype, "passed": passed, **figures, "agreement": agreement}
        with Path(target).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
