"""Copying with 1 to 16 threads, against as many copies of `cp` at a time: gigabytes per second.

    python -m benchmarks.cores --dir /dev/shm --size-gb 4
    python -m benchmarks.cores --dir /var/tmp --size-gb 4 --threads 1,2,4,8,16

The source is a synthetic model with experts in many files. `xargs -P N cp` copies it file by file, and on a disk syncs
every file; ckptkit carries out a plan in this process, so that neither column holds the start of a program or the
planning. Everything is done once before it is timed: then all memory in use has been touched, which costs more than
the copying where a virtual machine is given its memory page by page. A figure is the best of --repeat runs, per second
and byte written; an output is deleted before the next one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import is_memory, remove
from benchmarks.model import SHAPES, write_model
from benchmarks.report import machine, table
from ckptkit.checkpoints.opening import open_checkpoint
from ckptkit.conversion.options import Options
from ckptkit.conversion.planning import make_plan
from ckptkit.io.engine import run
from ckptkit.io.plan import Plan
from ckptkit.sharding.grid import Parallelism

GRID = Parallelism(tp=2, ep=4)
Work = Callable[[int], int]


def main() -> None:
    """Measures and prints a table."""
    options = _options()
    about = machine(options.dir, "benchmarks.cores")
    with tempfile.TemporaryDirectory(prefix="ckptkit-cores-", dir=options.dir) as place:
        source, sharded, out = (Path(place, name) for name in ("hf", "sharded", "out"))
        write_model(source, int(options.size_gb * 1e9), SHAPES[options.shape], shards=options.shards)
        run(_plan(source, "torch_dist"), sharded)
        works: dict[str, Work] = {
            "`xargs -P N cp`": lambda count: _cp(source, out, count),
            "hf -> hf": _moving(_plan(source, "hf"), out),
            "hf -> torch_dist TP2 x EP4": _moving(_plan(source, "torch_dist"), out),
            "the same --hash": _moving(_plan(source, "torch_dist"), out, hash=True),
            "torch_dist TP2 x EP4 -> hf": _moving(_plan(sharded, "hf"), out),
        }
        print(table(("threads", *works), _rows(works, out, options)), flush=True)
    print("\n" + "\n".join(f"{key}: {value}" for key, value in about.items()))


def _rows(works: dict[str, Work], out: Path, options: argparse.Namespace) -> list[list[str]]:
    best: dict[tuple[int, str], float] = {}
    for number in range(options.repeat + 1):
        for count in options.threads if number else options.threads[-1:]:
            for name, work in works.items():
                os.sync()
                started = time.perf_counter()
                size = work(count)
                speed = size / (time.perf_counter() - started) / 1e9
                remove(out)
                if number:
                    best[count, name] = max(best.get((count, name), 0.0), speed)
                print(f"... {count} {name}: {speed:.2f} GB/s", file=sys.stderr, flush=True)
    return [[str(count), *(f"{best[count, name]:.2f}" for name in works)] for count in options.threads]


def _plan(source: Path, to: str) -> Plan:
    grid = GRID if to == "torch_dist" else Parallelism()
    return make_plan(open_checkpoint(source), to, Options(grid=grid))


def _moving(plan: Plan, out: Path, *, hash: bool = False) -> Work:
    def work(count: int) -> int:
        return run(plan, out, threads=count, hash=hash).written

    return work


def _cp(source: Path, out: Path, count: int) -> int:
    out.mkdir()
    files = sorted(file for file in source.iterdir() if file.is_file())
    copy = "cp --reflink=never" if is_memory(source) else 'sh -c \'cp --reflink=never "$@" && sync "$2"/"${1##*/}"\' -'
    command = f"xargs -0 -P {count} -I FILE {copy} FILE {out}"
    subprocess.run(["sh", "-c", command], input="\0".join(map(str, files)), text=True, check=True)
    return sum(file.stat().st_size for file in files)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cores", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size-gb", type=float, default=4.0, help="size of the source in 10^9 bytes (default 4)")
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"), help="where to work (default /dev/shm)")
    parser.add_argument("--shape", choices=SHAPES, default="30b-a3b", help="layers of this model (default 30b-a3b)")
    parser.add_argument("--shards", type=int, default=32, help="files of the source (default 32)")
    parser.add_argument("--repeat", type=int, default=2, help="runs of everything (default 2)")
    parser.add_argument(
        "--threads",
        type=lambda text: [int(item) for item in text.split(",")],
        default=[1, 2, 4, 8, 16],
        metavar="N,N,...",
        help="numbers of threads (default 1,2,4,8,16)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
