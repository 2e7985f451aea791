"""Sequences cut over context parallel ranks: logits and gradients of every family, against transformers.

The rows are longer than every window of these models, and of lengths that do not divide: windows cross every cut.
"""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest

from ckptkit import convert, open_checkpoint, verify
from ckptkit.errors import UnsupportedError
from ckptkit.sharding.grid import Parallelism
from ckptkit.verification.adapters.verify import verify_adapter
from ckptkit.verification.ranks.pool import RankPool
from ckptkit.verification.reports.report import VerificationReport
from ckptkit.verification.sides import Side
from ckptkit.verification.training.level import verify_gradients
from tests.lora import save_adapter
from tests.megatron.test_families_against_transformers import EXPERTS
from tests.models import save_model
from tests.verification.adapters.test_against_peft import QUIET
from tests.verification.conftest import DEVICE
from tests.verification.training.conftest import Sources
from tests.verification.training.test_gradients import (
    EXACT,
    GEMMA4,
    PACKED,
    RECOMPUTE,
    SP,
    Way,
    has_delta_nets,
    kinds_by_family,
    named,
    rows,
    some_slow,
)
from tests.verification.training.test_training import in_this_job

WAYS: list[Way] = [
    (Parallelism(), {"cp": 2}),
    (Parallelism(), {"cp": 4, **PACKED}),
    (Parallelism(2), {"cp": 2, **SP, **PACKED}),
    (Parallelism(1, 2), {"cp": 2, **PACKED, **RECOMPUTE}),
    (Parallelism(1, 2, 2), {"cp": 2}),
    (Parallelism(), {"cp": 2, "dp": 2, **PACKED, **RECOMPUTE}),
    (Parallelism(), {"cp": 4}),
    (Parallelism(2), {"cp": 2, **RECOMPUTE}),
]
EXPERT_WAYS: list[Way] = [
    (Parallelism(ep=2), {"cp": 2, **PACKED}),
    (Parallelism(2, ep=2), {"cp": 2, **SP}),
    (Parallelism(1, 2, ep=2), {"cp": 2, **RECOMPUTE}),
    (Parallelism(ep=4), {"cp": 4, **PACKED}),
    (Parallelism(2, ep=2, etp=1), {"cp": 2, **SP, **PACKED, **RECOMPUTE}),
    (Parallelism(1, 2, 2, ep=2), {"cp": 2, **PACKED}),
]
QUICK = [
    ("mistral", WAYS[1]),
    ("gemma3_text", WAYS[3]),
    ("gemma4_text-e2b", WAYS[2]),
    ("gemma4_text-dense", WAYS[4]),
    ("gemma4_text-moe", EXPERT_WAYS[0]),
    ("mixtral-windowed", EXPERT_WAYS[1]),
    ("gqa", WAYS[5]),
    ("deepseek_v3", EXPERT_WAYS[1]),
    ("qwen3_5_text", WAYS[2]),
]


def ways_of(kind: str) -> list[Way]:
    """How models of a kind run; megatron-core trains experts on several tensor ranks only if it splits sequences."""
    if kind not in EXPERTS:
        return WAYS
    return [*EXPERT_WAYS, *(way for way in WAYS if way[0].tp == 1 or way[1].get("sequence_parallel"))]


def cases() -> list[Any]:
    """A few families in a few ways; all of them in all ways are slow."""
    every = [(kind, way) for kinds in kinds_by_family().values() for kind in kinds for way in ways_of(kind)]
    assert all(case in every for case in QUICK)
    slow = (pytest.param(*case, marks=pytest.mark.slow) for case in every if case not in QUICK)
    return [*QUICK, *slow]


def verified(source: Path, folder: Path, pool: RankPool, way: Way, **options: Any) -> VerificationReport:
    grid, how = way
    convert(source, folder / "meg", to="torch", spec="local", grid=grid)
    given = {"level": "gradients", "tolerance": EXACT, "tokens": rows(), "device": DEVICE, **how, **options}
    return verify(source, folder / "meg", pool=pool, **given)


def record(kind: str, way: Way, report: VerificationReport) -> None:
    """Appends a line of figures to the file that CKPTKIT_CP_REPORT names (see benchmarks/cp_table.py)."""
    if target := os.environ.get("CKPTKIT_CP_REPORT"):
        logits, gradients = (level.details for level in report.levels[-2:])
        figures = {
            "logits": logits["agreement"]["relative_error"],
            "error": max(tensor["error"] for tensor in gradients["worst"]),
            "noise": logits["noise"],
            "ratio": max((one["rms"] / one["noise"] for one in gradients["worst"] if one["noise"]), default=None),
            "passed": report.passed,
            "device": logits["candidate_ran"]["devices"],
            "versions": gradients["versions"],
        }
        line = {"kind": kind, "grid": str(way[0]), "how": way[1], "dtype": gradients["dtype"], **figures}
        with open(target, "a", encoding="utf-8") as file:
            print(json.dumps(line), file=file)


def check(kind: str, way: Way, report: VerificationReport) -> None:
    """Both levels passed, and ran as asked."""
    assert report.passed, report.levels[-1].summary
    record(kind, way, report)
    for level in report.levels[-2:]:
        assert level.details["candidate_ran"]["context_parallel"] == way[1]["cp"]
        kinds = ["ckptkit.megatron.attention.ExactAttention"]
        kinds.insert(
            0 if way[1]["cp"] > 1 else 1, "ckptkit.megatron.context_parallel.attention.ContextParallelAttention"
        )
        assert [kind in level.details["own_modules"] for kind in kinds] == [True, False]


@pytest.mark.parametrize(("kind", "way"), cases(), ids=named)
def test_logits_and_gradients(sources: Sources, tmp_path: Path, pool: RankPool, kind: str, way: Way) -> None:
    exact = {"dtype": "float64"} if has_delta_nets(kind) else {}
    check(kind, way, verified(sources[kind], tmp_path, pool, way, **exact))


def test_heads_of_delta_nets_that_do_not_divide(tmp_path: Path, pool: RankPool) -> None:
    source = save_model(tmp_path / "hf", "qwen3_5_text", linear_num_key_heads=2, linear_num_value_heads=4)
    with pytest.raises(UnsupportedError, match="2 key heads of a DeltaNet do not divide over 2 tensor and 2 context"):
        verified(source, tmp_path, pool, (Parallelism(2), {"cp": 2}))


OF_GEMMA4 = [(kind, (EXPERT_WAYS if "moe" in kind else WAYS)[at % 6]) for at, (kind, _) in enumerate(GEMMA4)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "way"), OF_GEMMA4, ids=named)
def test_float64(sources: Sources, tmp_path: Path, pool: RankPool, kind: str, way: Way) -> None:
    check(kind, way, verified(sources[kind], tmp_path, pool, way, dtype="float64", tolerance=1e-7))


@pytest.mark.parametrize(
    ("kind", "way"),
    some_slow([("gqa", WAYS[0]), ("mixtral", EXPERT_WAYS[0]), ("gemma4_text-e2b", WAYS[2]), ("gemma3", WAYS[6])], 1),
    ids=named,
)
def test_bfloat16(sources: Sources, tmp_path: Path, pool: RankPool, kind: str, way: Way) -> None:
    check(kind, way, verified(sources[kind], tmp_path, pool, way, dtype="bfloat16"))


def test_the_ways_cover_every_pair() -> None:
    def features(way: Way) -> set[str]:
        grid, how = way
        sizes = {"tp": grid.tp > 1, "pp": grid.pp > 1, "vpp": grid.vpp > 1, "ep": grid.ep > 1}
        sizes |= {f"cp{how['cp']}": True}
        options = {name: given for name, given in how.items() if name not in ("cp", "capacity")}
        return {name for name, given in {**sizes, **options}.items() if given}

    together = {frozenset(pair) for way in [*WAYS, *EXPERT_WAYS] for pair in itertools.combinations(features(way), 2)}
    names = ("tp", "pp", "vpp", "dp", "ep", "sequence_parallel", "packed", "recompute")
    assert {frozenset(("cp2", name)) for name in names} <= together
    # Four ranks have room for four context parallel ones and for experts on the same ones.
    assert {frozenset(("cp4", name)) for name in ("ep", "packed")} <= together


def test_rows_by_default_are_longer_than_every_window(tmp_path: Path, pool: RankPool) -> None:
    """Without --cp they are as long as always, and a message says that windows hide nothing."""
    source = save_model(tmp_path / "hf", "mistral", sliding_window=64, num_hidden_layers=1)
    convert(source, tmp_path / "meg", to="torch", spec="local")
    cut, plain = (verify(source, tmp_path / "meg", pool=pool, device=DEVICE, cp=cp).levels[-1] for cp in (2, 1))
    assert cut.passed and plain.passed
    lengths = [{len(row) for row in level.details["rows"]} for level in (cut, plain)]
    assert min(lengths[0]) > 64 + 8 and lengths[1] == {48 + 8}
    said = [any("sliding window" in line for line in level.messages) for level in (cut, plain)]
    assert said == [False, True]


@pytest.mark.slow
def test_value_models(tmp_path: Path, pool: RankPool) -> None:
    source = save_model(tmp_path / "lm", "gemma3_text")
    convert(source, tmp_path / "hf", to="hf", head="value", head_init="normal")
    convert(tmp_path / "hf", tmp_path / "meg", to="torch", grid=Parallelism(2), spec="local")
    how = {"cp": 2, "sequence_parallel": True, "packed": True, "tokens": rows(), "tolerance": EXACT, "device": DEVICE}
    report = verify(tmp_path / "hf", tmp_path / "meg", pool=pool, **how)
    assert report.passed, report.levels[-1].summary


@pytest.mark.slow
def test_adapters(tmp_path: Path, pool: RankPool) -> None:
    """Of experts and their router, too."""
    base = save_model(tmp_path / "base", "qwen3_moe")
    adapter = save_adapter(tmp_path / "adapter", base, **QUIET)
    convert(adapter, tmp_path / "meg", to="torch", grid=Parallelism(ep=2), hf_reference=base)
    report = verify_adapter(base, tmp_path / "meg", adapter, pool=pool, device=DEVICE, cp=2, packed=True)
    assert report.passed, report.levels[-1].summary
    assert report.levels[-1].details["candidate_ran"]["context_parallel"] == 2


@pytest.mark.slow
def test_replicas_by_fsdp2(sources: Sources, tmp_path: Path, pool: RankPool) -> None:
    way: Way = (Parallelism(), {"cp": 2, "dp": 2, "dp_kind": "fsdp2"})
    report = verified(sources["mistral"], tmp_path, pool, way, level="logits")
    assert report.passed, report.levels[-1].summary


@pytest.mark.slow
def test_steps_of_training(sources: Sources, tmp_path: Path, pool: RankPool) -> None:
    way: Way = (Parallelism(2), {"cp": 2, **SP, **PACKED})
    report = verified(sources["gemma3_text"], tmp_path, pool, way, level="training", train_steps=2, tolerance=1e-4)
    assert report.passed, report.levels[-1].summary


def own_positions(path: str, **options: Any) -> Any:
    """Latent attention on ranks that count positions from their own first token."""

    def stand_in(original: Any) -> Any:
        from ckptkit.megatron.latent_attention import _Rotary
        from ckptkit.megatron.stand_ins import replaced

        right = _Rotary.get_rotary_seq_len

        def counted(self: Any, *args: Any) -> Any:
            self.plan = None
            return right(self, *args)

        class Training(original):  # type: ignore[misc]
            def run(self, *args: Any, **options: Any) -> Any:
                with replaced([(_Rotary, "get_rotary_seq_len", counted)]):
                    return super().run(*args, **options)

        return Training

    in_this_job("Training", stand_in)
    return open_checkpoint(path, **options)


def test_positions_of_latent_attention(sources: Sources, tmp_path: Path, pool: RankPool) -> None:
    convert(sources["glm4_moe_lite"], tmp_path / "meg", to="torch", spec="local")
    sides = Side(sources["glm4_moe_lite"], "hf"), Side(tmp_path / "meg", "megatron")
    opener = f"{__name__}:{own_positions.__name__}"
    answer = verify_gradients(*sides, tokens=rows(), pool=pool, device=DEVICE, cp=2, opener=opener)
    assert not answer.passed
    assert {"loss", "gradients"} <= {check.name for check in answer.checks if not check.passed}
