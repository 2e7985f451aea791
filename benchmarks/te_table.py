"""Reports of `make test-te` as Markdown tables; of a case that is in several files, the last one counts.

CKPTKIT_TE_REPORT=te.jsonl make test-te
python -m benchmarks.te_table te.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Prints a row for each kind of model, the other runs one by one, and the versions."""
    lines = [line for file in sys.argv[1:] for line in Path(file).read_text(encoding="utf-8").splitlines()]
    cases = {case["test"]: case for case in map(json.loads, lines)}
    loads = [case for case in cases.values() if "dtype" in case]
    print("| model | fp32: grids | largest error | bf16: grids | largest part of the noise | verdict |")
    print("| --- | --- | --- | --- | --- | --- |")
    for kind in dict.fromkeys(case["kind"] for case in loads):
        mine = [case for case in loads if case["kind"] == kind]
        verdict = "same" if all(case["passed"] for case in mine) else "differs"
        print(f"| {kind} | {_part(mine, 'fp32', 'max', '.1e')} | {_part(mine, 'bf16', 'floors', '.2f')} | {verdict} |")
    print("\n| run | figures |\n| --- | --- |")
    for name, case in cases.items():
        if case not in loads:
            figures = {key: value for key, value in case.items() if key not in ("test", "versions", "devices")}
            print(f"| {name} | {json.dumps(figures)} |")
    where = {(json.dumps(case["versions"]), ", ".join(case["devices"])) for case in cases.values()}
    for versions, devices in sorted(where):
        print(f"\n{devices}; {', '.join(f'{name} {version}' for name, version in json.loads(versions).items())}")


def _part(cases: list[dict[str, Any]], dtype: str, figure: str, spelling: str) -> str:
    """The grids of one dtype, with their formats, and the largest figure."""
    mine = [case for case in cases if case["dtype"] == dtype]
    formats: dict[str, dict[str, None]] = {}
    for case in mine:
        formats.setdefault(case["grid"], {})[case["to"]] = None
    grids = ", ".join(f"{grid} ({', '.join(names)})" for grid, names in formats.items()) or "-"
    return f"{grids} | {format(max(case[figure] for case in mine), spelling) if mine else '-'}"


if __name__ == "__main__":
    main()
