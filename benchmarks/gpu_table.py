"""Reports of `make test-gpu` as a Markdown table; of a case that is in several files, the last one counts.

CKPTKIT_GPU_REPORT=gpu.jsonl make test-gpu
python -m benchmarks.gpu_table gpu.jsonl
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Prints one row for each kind of model, and what was run on."""
    lines = [line for file in sys.argv[1:] for line in Path(file).read_text(encoding="utf-8").splitlines()]
    cases = {(case["kind"], case["grid"], case["dtype"]): case for case in map(json.loads, lines)}
    reports = [cases[key] for key in sorted(cases, key=_place)]
    kinds: dict[str, list[dict[str, Any]]] = {}
    for report in reports:
        kinds.setdefault(report["kind"].replace(" SP", ""), []).append(report)
    print("| model | fp32: grids | largest error | bf16: grids | median / p99 of the noise floor | verdict |")
    print("| --- | --- | --- | --- | --- | --- |")
    for kind, runs in kinds.items():
        print(f"| {kind} | {_fp32(runs)} | {_bf16(runs)} | {'same' if all(r['passed'] for r in runs) else 'differs'} |")
    versions = {", ".join(f"{name} {version}" for name, version in report["versions"].items()) for report in reports}
    print(f"\n{len(reports)} runs, {sum(r['passed'] for r in reports)} passed; {'; '.join(sorted(versions))}")


def _place(case: tuple[str, str, str]) -> tuple[bool, str, bool, int, str]:
    """Padded before packed, and grids from small to large, those with experts last."""
    kind, grid, _ = case
    return "packed" in kind, kind.replace(" SP", ""), "EP" in grid, sum(map(int, re.findall(r"\d", grid))), grid[::-1]


def _fp32(runs: list[dict[str, Any]]) -> str:
    mine = [run for run in runs if run["dtype"] == "float32"]
    worst = max((run["agreement"]["relative_error"] for run in mine), default=None)
    return f"{_grids(mine)} | {'-' if worst is None else f'{worst:.1e}'}"


def _bf16(runs: list[dict[str, Any]]) -> str:
    mine = [run for run in runs if run["dtype"] == "bfloat16"]
    floors = [run["noise"] for run in mine if run["noise"]]
    ratios = [f"{max(floor[name] for floor in floors):.2f}" for name in ("median", "p99")] if floors else ["-"]
    return f"{_grids(mine)} | {' / '.join(ratios)}"


def _grids(runs: list[dict[str, Any]]) -> str:
    """Sizes of 1 left out."""
    names = dict.fromkeys(run["grid"].replace("TP1 x ", "").replace(" x PP1", "").replace("PP1 x ", "") for run in runs)
    return ", ".join(name.replace(" x ", "x") for name in names) or "-"


if __name__ == "__main__":
    main()
