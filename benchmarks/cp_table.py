"""Reports of the tests of context parallelism as a Markdown table; of a case in several files, the last one counts.

CKPTKIT_CP_REPORT=cp.jsonl python -m pytest tests/verification/training/test_context_parallel.py
python -m benchmarks.cp_table cp.jsonl
"""

from __future__ import annotations

from benchmarks.gradient_table import Case, figure, read, versions, way

NAMED = 7
"""How many ways of one kind are named; more are counted."""


def main() -> None:
    """Prints one row for each kind of model: its runs, and the largest errors of logits and gradients."""
    cases = read()
    kinds: dict[str, list[Case]] = {}
    for key in sorted(cases):
        kinds.setdefault(key[0], []).append(cases[key])
    print("| model | runs | fp32: logits | gradients | fp64: logits | gradients | bf16: logits | gradients |")
    print("|---" * 8 + "|")
    for kind, runs in kinds.items():
        exact = [figure(runs, dtype, name, ".1e") for dtype in ("float32", "float64") for name in ("logits", "error")]
        low = [floor(runs), figure(runs, "bfloat16", "ratio", ".2f")]
        ways = list(dict.fromkeys(way(run) for run in runs))
        print(f"| {kind} | {', '.join(ways) if len(ways) <= NAMED else len(ways)} | {' | '.join([*exact, *low])} |")
    print(versions(cases))


def floor(runs: list[Case]) -> str:
    """Median and 99th percentile of the noise floor, each the largest over the runs in bfloat16."""
    found = [run["noise"] for run in runs if run["noise"]]
    return " / ".join(f"{max(noise[name] for noise in found):.2f}" for name in ("median", "p99")) if found else "-"


if __name__ == "__main__":
    main()
