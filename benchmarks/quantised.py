"""Dequantising and quantising beside `cp` of the model in bf16, which is the larger side of each.

    python -m benchmarks.quantised --size-gb 6 --dir /dev/shm
    python -m benchmarks.quantised --size-gb 1 --schemes int4 --repeat 1

A synthetic model of about that size in bf16 is quantised (`--quantise SCHEME`), read back as bf16, and written again
like the quantised one, where every tensor keeps its codes. Each command is a process of its own, in turns with `cp -r
--reflink=never` of the bf16 model; figures are the median of the runs. It prints a Markdown table; --json FILE has all
figures.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Run, Summary, cp_command, is_memory, remove, run, settle
from benchmarks.model import SHAPES, shape_for, write_model
from benchmarks.report import machine

SCHEMES = ("fp8-block", "int4")
CONVERT = (sys.executable, "-m", "ckptkit", "convert")


def main() -> int:
    """Runs what the options ask for."""
    options = _options()
    about = machine(options.dir, "benchmarks.quantised")
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="ckptkit-bench-") as place:
        rows = measure(Path(place), int(options.size_gb * 1e9), options.shape, options.schemes, options.repeat)
    about["load average after"] = " ".join(f"{value:.2f}" for value in os.getloadavg())
    print("| command | seconds | of `cp` | core seconds | memory |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['command']} | {row['seconds']:.2f} | {row['seconds'] / row['cp_seconds']:.2f} |"
            f" {row['core_seconds']:.2f} | {row['anonymous_bytes'] / 2**20:.0f} MiB |"
        )
    print("\n" + "\n".join(f"{key}: {value}" for key, value in about.items()))
    if options.json:
        options.json.write_text(json.dumps({"machine": about, "commands": rows}, indent=2) + "\n", encoding="utf-8")
    return 0


def measure(place: Path, size: int, shape: str | None, schemes: Sequence[str], repeat: int) -> list[dict[str, Any]]:
    """The figures of every command, with those of the `cp` that ran in turns with it."""
    plain, out, quantised = place / "plain", place / "out", place / "quantised"
    write_model(plain, size, SHAPES[shape] if shape else shape_for(size / 1e9))
    rows = []
    for scheme in schemes:
        run([*CONVERT, str(plain), str(quantised), "--to", "hf", "--quantise", scheme])
        numbers = place / "numbers"
        run([*CONVERT, str(quantised), str(numbers), "--to", "hf"])
        commands = {
            f"quantise, {scheme}": (plain, ["--quantise", scheme]),
            f"dequantise, {scheme}": (quantised, []),
            f"quantise like the original, {scheme}": (numbers, ["--quantise", f"like:{quantised}"]),
        }
        for name, (source, words) in commands.items():
            copies: list[Run] = []
            runs: list[Run] = []
            for _ in range(repeat):
                for command, found in (
                    (cp_command(plain, out, sync=not is_memory(place)), copies),
                    ([*CONVERT, str(source), str(out), "--to", "hf", *words], runs),
                ):
                    settle(None, cold=False)
                    found.append(run(command))
                    remove(out)
            cp, ours = Summary(copies), Summary(runs)
            rows.append(
                {
                    "command": name,
                    "seconds": ours.median,
                    "cp_seconds": cp.median,
                    "core_seconds": ours.cores,
                    "cp_core_seconds": cp.cores,
                    "anonymous_bytes": ours.anonymous,
                }
            )
        for folder in (numbers, quantised):
            remove(folder)
    return rows


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=1.0, help="size of the model in bf16")
    parser.add_argument("--shape", choices=SHAPES, help="the model; by default what suits the size")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--repeat", type=int, default=3, help="runs of every command")
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"), help="where the models go")
    parser.add_argument("--json", type=Path, help="file for all figures")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
