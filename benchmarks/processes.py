"""A conversion by 1 to 8 processes, and what it costs beyond, computed from stated numbers.

    python -m benchmarks.processes --dir /dev/shm --size-gb 4
    python -m benchmarks.processes --dir /var/tmp --size-gb 4 --processes 1,2,4,8 --threads 4
    python -m benchmarks.processes --computed

Every process is `ckptkit convert` with the variables that torchrun sets, so that a figure holds the start of the
interpreter, the planning of every rank, the meeting and the commit. Everything is done once before it is timed. The
best of --repeat runs counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import remove
from benchmarks.model import SHAPES, write_model
from benchmarks.report import machine, table

CONVERSIONS = {
    "hf -> hf": ("--to", "hf"),
    "hf -> torch TP2 x PP2": ("--to", "torch", "--tp", "2", "--pp", "2"),
    "hf -> torch_dist TP2 x PP2": ("--to", "torch_dist", "--tp", "2", "--pp", "2"),
    "the same --hash": ("--to", "torch_dist", "--tp", "2", "--pp", "2", "--hash"),
}


@dataclass(frozen=True)
class Case:
    """A conversion whose time is computed.

    Attributes:
        name: The model.
        terabytes: Bytes written, in units of 10^12.
        planning: Seconds until bytes move: start, headers and plan, on every rank at once.
    """

    name: str
    terabytes: float
    planning: float


CASES = (Case("Llama-3.1-405B", 0.81, 2.0), Case("DeepSeek-V3", 1.34, 20.0), Case("Kimi-K2", 2.06, 35.0))
NODES = (1, 4, 16, 64)
PER_NODE, FILE_SYSTEM = 3.0, 100.0
"""Gigabytes per second that one node writes, and that the file system takes in all, while as many are read."""
MEETING = 2.0
"""Seconds to meet, to join what ranks report and to commit, at 64 ranks: two looks at each other's files."""


def seconds(case: Case, nodes: int, per_node: float, file_system: float) -> float:
    """The computed time of a conversion."""
    return case.planning + case.terabytes * 1000 / min(nodes * per_node, file_system) + (MEETING if nodes > 1 else 0)


def computed(per_node: float, file_system: float) -> str:
    """The computed times as a table."""
    rows = [
        [case.name, f"{case.terabytes:.2f}", *(f"{seconds(case, n, per_node, file_system):,.0f}" for n in NODES)]
        for case in CASES
    ]
    return table(("model", "TB written", *(f"{n} node{'s' * (n > 1)}, s" for n in NODES)), rows)


def main() -> None:
    """Measures or computes, and prints a table."""
    options = _options()
    if options.computed:
        print(computed(options.per_node, options.file_system))
        return
    about = machine(options.dir, "benchmarks.processes")
    with tempfile.TemporaryDirectory(prefix="ckptkit-processes-", dir=options.dir) as place:
        source, out = Path(place, "hf"), Path(place, "out")
        model = write_model(source, int(options.size_gb * 1e9), SHAPES[options.shape], shards=options.shards)
        print(f"{model.nbytes / 1e9:.2f} GB with the shapes of {model.shape.name}\n", flush=True)
        rows = []
        for name, how in CONVERSIONS.items():
            convert(source, out, 1, how, options.threads)  # touches all memory, and the sources
            for count in options.processes:
                times, shares = [], 1.0
                for _ in range(options.repeat):
                    taken, result = convert(source, out, count, how, options.threads)
                    written = [rank["bytes_written"] for rank in result["ranks"]]
                    shares = max(shares, max(written) * count / sum(written))
                    times.append(taken)
                speed = result["bytes_total"] / min(times) / 1e9
                rows.append([name, str(count), f"{min(times):.2f}", f"{speed:.2f}", f"{shares:.3f}"])
                print(f"... {rows[-1]}", file=sys.stderr, flush=True)
        headings = ("conversion", "processes", "whole command, s", "GB/s", "largest share x mean")
        print(table(headings, rows), flush=True)
    print("\n" + "\n".join(f"{key}: {value}" for key, value in about.items()))


def convert(source: Path, out: Path, count: int, how: tuple[str, ...], threads: int) -> tuple[float, dict[str, Any]]:
    """Seconds of a conversion by a number of processes, and its result; the output is deleted."""
    command = [sys.executable, "-m", "ckptkit", "convert", str(source), str(out), *how, "--json"]
    started = time.perf_counter()
    ranks = [
        subprocess.Popen(
            [*command, "--threads", str(threads)],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(count)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    outputs = [rank.communicate()[0] for rank in ranks]
    taken = time.perf_counter() - started
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"a rank failed: {[rank.returncode for rank in ranks]}")
    remove(out)
    return taken, json.loads(outputs[0])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"), help="where to work")
    parser.add_argument("--size-gb", type=float, default=4.0)
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--shards", type=int, default=16, help="files of the source")
    parser.add_argument("--processes", type=_numbers, default=[1, 2, 4, 8])
    parser.add_argument("--threads", type=int, default=4, help="of each process")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--computed", action="store_true", help="only compute times of many nodes")
    parser.add_argument("--per-node", type=float, default=PER_NODE, help="GB/s that a node writes")
    parser.add_argument("--file-system", type=float, default=FILE_SYSTEM, help="GB/s that the file system takes")
    return parser.parse_args()


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
