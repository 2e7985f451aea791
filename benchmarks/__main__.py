"""Measures whole conversions of a synthetic model against `cp -r --reflink=never` and what people do today.

    make bench                                             1 GB in RAM, three runs of everything
    python -m benchmarks --size-gb 6                       6 GB in RAM
    python -m benchmarks --size-gb 12 --dir /var/tmp       12 GB on a disk, both sides synced
    python -m benchmarks --size-gb 6 --shape 30b-a3b       6 GB with the experts of Qwen3-30B-A3B
    python -m benchmarks --growth 1,2,4,8 --plot docs/growth.svg

Every command runs as a process of its own, in turns with `cp` of the same source; figures are median / best of the
runs, the interpreter's start and imports included. An output is deleted before the next run, so at most twice the
size is in use (the F32 source of the cast as large as the others). On a disk `cp` is followed by a sync of its files,
as ckptkit's output is always synced; today's alternatives are not synced, and neither is their `cp`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from benchmarks import report
from benchmarks.cases import MARGIN, Bench, Result, cases_of
from benchmarks.measure import CommandError, available_memory, is_memory
from benchmarks.model import SHAPES, shape_for
from benchmarks.plot import Chart, Points, draw

ROOM = 2.5
BUDGET_MIB = 256


def main() -> int:
    """Runs what the options ask for."""
    options = _options()
    # A killed benchmark must not leave gigabytes in RAM.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sizes = [int(size * 1e9) for size in options.growth or [options.size_gb]]
    refusal = _no_room(options.dir, max(sizes))
    if refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 5
    about = report.machine(options.dir)
    try:
        with _workplace(options.dir) as place:
            bench = Bench(place, SHAPES["tiny"], 0, options.repeat, options.cold, _say)
            document = _growth(bench, sizes, options) if options.growth else _standard(bench, sizes[0], options)
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    about["load average after"] = " ".join(f"{value:.2f}" for value in os.getloadavg())
    print("\n" + "\n".join(f"{key}: {value}" for key, value in about.items()))
    if options.json:
        options.json.write_text(json.dumps({"machine": about, **document}, indent=2) + "\n", encoding="utf-8")
    return 0


def _standard(bench: Bench, size: int, options: argparse.Namespace) -> dict[str, object]:
    """Every conversion, then today's ways, at one size."""
    shape = SHAPES[options.shape] if options.shape else shape_for(size / 1e9)
    bench = replace(bench, size=size, shape=shape)
    cases = [case for case in cases_of(shape) if options.only is None or options.only in case.name]
    results = list(bench.conversions(cases))
    print(f"\n{shape.name} shapes\n\n" + report.conversions_table(results, sync=not is_memory(bench.place)), flush=True)
    print("\nwhere the time goes\n\n" + report.phases_table(results), flush=True)
    others = [] if options.no_alternatives else list(bench.alternatives())
    if others:
        print("\n" + report.alternatives_table(others))
    documents = [item.to_dict() if isinstance(item, Result) else {"name": item[0], "why": item[1]} for item in others]
    return {"shape": shape.name, "conversions": [item.to_dict() for item in results], "alternatives": documents}


def _growth(bench: Bench, sizes: list[int], options: argparse.Namespace) -> dict[str, object]:
    """One conversion over sizes, with layers of one shape."""
    shape = SHAPES[options.shape or "1.1b"]
    results: list[Result] = []
    for size in sizes:
        results += replace(bench, size=size, shape=shape).conversions(cases_of(shape)[:1])
    sync = not is_memory(bench.place)
    print(f"\n{shape.name} shapes\n\n" + report.conversions_table(results, sync=sync))
    if options.plot:
        options.plot.write_text(draw(_charts(results, sync)), encoding="utf-8")
    return {"shape": shape.name, "growth": [result.to_dict() for result in results]}


def _charts(results: list[Result], sync: bool) -> list[Chart]:
    sizes = [result.source_bytes / 1e9 for result in results]
    times: dict[str, Points] = {
        "cp + sync" if sync else "cp": [(x, result.cp.median) for x, result in zip(sizes, results, strict=True)],
        "ckptkit": [(x, result.whole.median) for x, result in zip(sizes, results, strict=True)],
    }
    memory = [(x, result.whole.anonymous / report.MIB) for x, result in zip(sizes, results, strict=True)]
    where = "on a disk" if sync else "in RAM"
    return [
        Chart(f"Seconds, {results[0].name}, {where}", "GB", times),
        Chart("Peak anonymous memory, MiB", "GB", {"ckptkit": memory}, (f"budget: {BUDGET_MIB} MiB", BUDGET_MIB)),
    ]


def _no_room(directory: Path, size: int) -> str | None:
    """Why the measurements cannot be made there, or None."""
    if not directory.is_dir():
        return f"{directory}: no such directory"
    needed = int(size * ROOM)
    free = shutil.disk_usage(directory).free
    if is_memory(directory):
        needed, free = needed + MARGIN, min(free, available_memory())
    if free < needed:
        return f"{directory}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; choose --size-gb or --dir"
    return None


@contextmanager
def _workplace(directory: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ckptkit-bench-", dir=directory) as place:
        yield Path(place)


def _say(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size-gb", type=float, default=1.0, help="size of the source in 10^9 bytes (default 1)")
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"), help="where to work (default /dev/shm)")
    parser.add_argument("--repeat", type=int, default=3, help="runs of every command (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure as JSON")
    parser.add_argument("--shape", choices=SHAPES, help="layers of this model (default: by size)")
    parser.add_argument("--only", metavar="TEXT", help="only conversions with this in their name")
    parser.add_argument("--no-alternatives", action="store_true", help="leave out what people do today")
    parser.add_argument("--cold", action="store_true", help="drop the source from the page cache before every run")
    parser.add_argument(
        "--growth",
        type=lambda text: [float(item) for item in text.split(",")],
        metavar="GB,GB,...",
        help="measure hf -> torch over several sizes instead",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="with --growth: write the curves as SVG")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
