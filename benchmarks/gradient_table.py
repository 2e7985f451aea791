"""Reports of the tests of gradients as a Markdown table; of a case that is in several files, the last one counts.

CKPTKIT_GRADIENT_REPORT=gradients.jsonl python -m pytest tests/verification/training/test_gradients.py
python -m benchmarks.gradient_table gradients.jsonl
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SHORT = {"sequence_parallel": "SP", "packed": "packed", "recompute": "recompute"}
Case = dict[str, Any]


def main() -> None:
    """Prints one row for each kind of model: where it ran, and the largest errors."""
    cases = read()
    kinds: dict[str, list[Case]] = {}
    for key in sorted(cases):
        kinds.setdefault(key[0], []).append(cases[key])
    print("| model | fp32: runs | largest error | its run | fp64: largest error | bf16: worst ratio |")
    print("|---|---|---|---|---|---|")
    for kind, runs in kinds.items():
        exact = [run for run in runs if run["dtype"] == "float32"]
        worst = max(exact, key=lambda run: run["error"], default=None)
        cells = [str(len(exact)), *(["-", "-"] if worst is None else [f"{worst['error']:.1e}", way(worst)])]
        cells += [figure(runs, "float64", "error", ".1e"), figure(runs, "bfloat16", "ratio", ".2f")]
        print(f"| {kind} | {' | '.join(cells)} |")
    print(versions(cases))


def read() -> dict[tuple[str, str, str], Case]:
    """The cases in the files that the command line names, by kind, way and dtype."""
    lines = [line for file in sys.argv[1:] for line in Path(file).read_text(encoding="utf-8").splitlines()]
    return {(case["kind"], way(case), case["dtype"]): case for case in map(json.loads, lines)}


def versions(cases: Mapping[tuple[str, str, str], Case]) -> str:
    """How many cases passed, and with which versions."""
    found = {", ".join(f"{name} {version}" for name, version in case["versions"].items()) for case in cases.values()}
    return f"\n{len(cases)} runs, {sum(case['passed'] for case in cases.values())} passed; {'; '.join(sorted(found))}"


def way(case: Case) -> str:
    """How a case ran: its grid without sizes of 1, and its options."""
    sizes = [size for size in case["grid"].split(" x ") if not size.endswith(("P1", " 1"))] or ["one rank"]
    options = [SHORT[name] for name in SHORT if case["how"].get(name)]
    options = [*["FSDP2"] * (case["how"].get("dp_kind") == "fsdp2"), *options]
    ranks = [f"{name.upper()}{case['how'][name]}" for name in ("cp", "dp") if case["how"].get(name, 1) > 1]
    if ranks and sizes == ["one rank"]:
        sizes = [ranks.pop(0)]
    return " ".join(["x".join(sizes), *ranks, *options])


def figure(runs: list[Case], dtype: str, name: str, form: str) -> str:
    """The largest of a figure over the runs in one type."""
    found = [run[name] for run in runs if run["dtype"] == dtype and run[name] is not None]
    return format(max(found), form) if found else "-"


if __name__ == "__main__":
    main()
