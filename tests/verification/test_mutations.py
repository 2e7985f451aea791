"""Each fault is seen by the cheapest level that can see it; docs/verification.md has the table."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptkit import convert, verify
from ckptkit.verification.logits import Side, verify_logits
from ckptkit.verification.ranks.pool import RankPool
from ckptkit.verification.reports.report import LevelResult, LogitsReport
from ckptkit.verification.training.level import verify_gradients
from tests.models import LLAMAS, save_llama, save_model
from tests.precision import MANY_ROWS
from tests.verification.conftest import DEVICE
from tests.verification.mutants import FAULTS, OPENER, Fault, damage, sound
from tests.verification.training.conftest import VALUE

DOCUMENT = Path(__file__).parents[2] / "docs" / "verification.md"
BEGIN, END = "<!-- mutations: begin -->", "<!-- mutations: end -->"
UPDATE = "CKPTKIT_UPDATE_DOCS"
EXACT, EXACT_GRADIENT = 1e-5, 1e-4
SAMPLE = [
    "rotary base 20000 for 10000",
    "keys and values exchanged",
    "tied gradients of first and last stage not summed",
    "bias behind experts added by every rank",
    "parts of a DeltaNet's projection cut flat",
    "convolutions see the packed sequence before",
    "window one narrower at the edge of a chunk",
    "gradients of keys and values not summed over the cut",
    "gradients of FSDP2 averaged",
    "values learn from the tokens before them",
]
"""What `make test` runs; the rest is slow."""

Seen = dict[str, Any]


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    """Ranks of our own: some faults change their code."""
    with RankPool(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind -> a model of it, saved once."""
    return Models(tmp_path_factory)


class Models(dict[str, Path]):
    def __init__(self, folders: pytest.TempPathFactory) -> None:
        super().__init__()
        self.folders = folders

    def __missing__(self, kind: str) -> Path:
        path = self.folders.mktemp("hf") / kind
        if kind.endswith(VALUE):
            convert(self[kind.removesuffix(VALUE)], path, to="hf", head="value", head_init="normal")
        else:
            (save_llama if kind in LLAMAS else save_model)(path, kind)
        self[kind] = path
        return path


def logits_of(source: Path, candidate: Path, opener: str, fault: Fault, pool: RankPool, dtype: str) -> LogitsReport:
    sides = Side(source, "hf"), Side(candidate, "megatron")
    options: Any = {"packed": fault.packed, "tokens": None if dtype == "float32" else MANY_ROWS, **fault.run}
    return verify_logits(
        *sides, dtype=dtype, tolerance=EXACT, greedy=0, pool=pool, device=DEVICE, opener=opener, **options
    )


def gradients_of(source: Path, candidate: Path, opener: str, fault: Fault, pool: RankPool) -> LevelResult:
    sides = Side(source, "hf"), Side(candidate, "megatron")
    options: Any = {"packed": fault.packed, **fault.run}
    try:
        return verify_gradients(
            *sides, tolerance=EXACT_GRADIENT, pool=pool, device=DEVICE, opener=opener, dtype="float32", **options
        )
    finally:
        sound(str(candidate))  # takes back what the opener did to this process


def observe(source: Path, candidate: Path, name: str, pool: RankPool) -> Seen:
    """What the levels say of a fault: the cheapest one that fails, and what the logits say by themselves."""
    fault = FAULTS[name]
    opener = OPENER + (name if fault.sits == "reading" else "sound")
    cheap = verify(source, candidate, level="weights")
    exact = logits_of(source, candidate, opener, fault, pool, "float32")
    low = logits_of(source, candidate, opener, fault, pool, "bfloat16")
    failed = [level.name for level in cheap.levels if not level.passed]
    failed += ["logits"] * (not exact.passed)
    place = exact.location.place if exact.location is not None else None
    if not failed:
        backwards = gradients_of(source, candidate, opener, fault, pool)
        failed += ["gradients"] * (not backwards.passed)
        named = [name for kind in ("differing", "missing", "surplus") for name in backwards.details[kind]]
        place = fault.place if fault.place in named else str(named)
    return {"cheapest": failed[0] if failed else None, "fp32": not exact.passed, "bf16": not low.passed, "place": place}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in FAULTS]
)
def test_a_fault_is_seen(models: dict[str, Path], tmp_path: Path, ranks: RankPool, name: str) -> None:
    fault = FAULTS[name]
    source = models[fault.kind]
    convert(source, tmp_path / "meg", to="torch", spec="local", grid=fault.grid)
    damage(tmp_path / "meg", fault)
    expected = {"cheapest": fault.cheapest, "fp32": fault.fp32, "bf16": fault.bf16, "place": fault.place}
    assert observe(source, tmp_path / "meg", name, ranks) == expected


KINDS = sorted({(fault.kind, fault.grid, fault.packed, tuple(fault.run.items())) for fault in FAULTS.values()}, key=str)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "grid", "packed", "run"), KINDS, ids=str)
def test_without_a_fault_nothing_is_seen(
    models: dict[str, Path], tmp_path: Path, ranks: RankPool, kind: str, grid: Any, packed: bool, run: Any
) -> None:
    source, none = models[kind], Fault(kind, "", None, packed=packed, run=dict(run))
    convert(source, tmp_path / "meg", to="torch", spec="local", grid=grid)
    assert verify(source, tmp_path / "meg", level="weights").passed
    for dtype in ("float32", "bfloat16"):
        report = logits_of(source, tmp_path / "meg", f"{OPENER}sound", none, ranks, dtype)
        assert report.passed, report.summary
    backwards = gradients_of(source, tmp_path / "meg", f"{OPENER}sound", none, ranks)
    assert backwards.passed, backwards.summary


def test_there_are_enough_faults_of_every_kind() -> None:
    assert len(FAULTS) >= 25
    assert {fault.sits for fault in FAULTS.values()} == {"file", "claim", "reading"}
    assert {fault.cheapest for fault in FAULTS.values()} == {"structure", "weights", "logits", "gradients"}
    assert any(not fault.bf16 for fault in FAULTS.values()) and any(fault.packed for fault in FAULTS.values())


def table() -> str:
    """The faults and who sees them, as Markdown."""
    cheapest = {"structure": 0, "weights": 1, "logits": 2, "gradients": 3}
    lines = ["| fault | model | sits in the | cheapest level | logits, fp32 | logits, bf16 | located at |"]
    lines.append("|---" * 7 + "|")
    for name, fault in sorted(FAULTS.items(), key=lambda item: cheapest[item[1].cheapest]):
        sees = ["yes" if seen else "**no**" for seen in (fault.fp32, fault.bf16)]
        cells = [name, fault.kind, fault.sits, fault.cheapest, *sees, fault.place or "-"]
        lines.append(f"| {' | '.join(cells)} |")
    blind = [name for name, fault in FAULTS.items() if fault.fp32 and not fault.bf16]
    counts = {level: sum(fault.cheapest == level for fault in FAULTS.values()) for level in cheapest}
    caught = ", ".join(f"{count} by {level}" for level, count in counts.items())
    return "\n".join(
        [
            f"{len(FAULTS)} faults, each caught by the cheapest level that can see it: {caught}.",
            f"What fp32 sees and bf16 cannot: {'; '.join(blind)}.",
            "",
            *lines,
        ]
    )


def test_the_documentation_has_this_table() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    found, after = rest.split(END)
    expected = f"\n\n{table()}\n\n"
    if os.environ.get(UPDATE):
        DOCUMENT.write_text(f"{before}{BEGIN}{expected}{END}{after}", encoding="utf-8")
    elif found != expected:
        pytest.fail(f"the table in {DOCUMENT.name} is out of date; run this test with {UPDATE}=1")
