"""Measures `ckptkit delta make` and `delta apply` against copying and compressing the new weights.

    python -m benchmarks.deltas                            1 GB in RAM, three runs of everything
    python -m benchmarks.deltas --size-gb 6 --dir /var/tmp

OLD is a synthetic Llama in bfloat16 (normal weights, standard deviation 0.02), and NEW the same after a change:

- `step`: a normal step of 1e-6 (standard deviation) of weights that a trainer keeps in float32: a few percent of them
  move in bfloat16, mostly to a neighbour, as after a few steps of reinforcement learning;
- `all`: a step of 1e-4: most elements move a little;
- `layer`: one layer gets other weights, everything else stays.

Weights before the step are those in bfloat16 plus an even rest within their rounding. The others are `cp` of NEW, `zstd
-3` and `gzip -1` of its files, and `zstd --patch-from` with the same file of OLD; zstd uses all cores (-T0). Every
command runs as a process of its own; figures are medians. `make` and `apply` end durable and hash both models; the
others do neither. What `apply` gives is compared with NEW, byte for byte.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import report
from benchmarks.measure import Summary, cp_command, remove, run, settle
from benchmarks.model import SHAPES, Model, shape_for, write_model
from ckptkit.formats.safetensors import read_header

CHANGES = ("step", "all", "layer")
STEPS = {"step": 1e-6, "all": 1e-4}
BLOCK = 1 << 22
Bits = NDArray[np.uint16]


@dataclass(frozen=True)
class Measured:
    """One way to publish NEW.

    Attributes:
        change: Which change NEW is.
        way: What was run.
        seconds: Median of the clock.
        cores: Median of the cores' time.
        anonymous: Peak of anonymous memory, bytes.
        nbytes: Bytes that are published; None where nothing is.
    """

    change: str
    way: str
    seconds: float
    cores: float
    anonymous: int
    nbytes: int | None = None


def main() -> int:
    """Measures and prints the table."""
    options = _options()
    print("\n".join(f"{key}: {value}" for key, value in report.machine(options.dir).items()), flush=True)
    found: list[Measured] = []
    with tempfile.TemporaryDirectory(prefix="ckptkit-bench-", dir=options.dir) as folder:
        place = Path(folder)
        shape = SHAPES[options.shape] if options.shape else shape_for(options.size_gb)
        old = write_model(place / "old", int(options.size_gb * 1e9), shape)
        _spread(old.path)
        for change in options.changes:
            new = place / "new"
            _write_new(old, new, change)
            found += _ways(place, change, options.repeat)
            remove(new)
    print(f"\n{shape.name} shapes, {old.nbytes / 1e9:.2f} GB\n\n{_table(found, old.nbytes)}")
    print("load average after: " + " ".join(f"{value:.2f}" for value in os.getloadavg()))
    if options.json:
        options.json.write_text(json.dumps([asdict(item) for item in found], indent=2) + "\n", encoding="utf-8")
    return 0


def _ways(place: Path, change: str, repeat: int) -> Iterator[Measured]:
    """`cp`, then ours, then the compressors."""
    old, new, delta, out = (place / name for name in ("old", "new", "delta", "out"))
    make, apply = ([sys.executable, "-m", "ckptkit", "delta", name] for name in ("make", "apply"))
    make += [str(old), str(new), "-o", str(delta)]
    apply += [str(old), str(delta), "-o", str(out)]
    yield _measure(change, "cp", cp_command(new, out, sync=False), out, repeat)
    yield _measure(change, "delta make", make, delta, repeat, keep=True)
    applied = _measure(change, "delta apply", apply, out, repeat, keep=True)
    names = [path.name for path in new.iterdir()]
    if filecmp.cmpfiles(new, out, names, shallow=False)[0] != names:
        raise SystemExit(f"{change}: what `delta apply` gave is not NEW")
    yield replace(applied, nbytes=None)
    remove(delta)
    remove(out)
    for way, line in _compressors().items():
        if shutil.which(way.split()[0]):
            script = f'mkdir "$3"; for f in "$2"/*.safetensors; do {line}; done'
            yield _measure(change, way, ["sh", "-ec", script, "sh", str(old), str(new), str(out)], out, repeat)


def _compressors() -> dict[str, str]:
    """Name -> what is run for each file `$f` of NEW; `$1` is OLD and `$3` the output."""
    to = '"$3/$(basename "$f")"'
    return {
        "zstd -3": f'zstd -q -T0 -3 "$f" -o {to}',
        "gzip -1": f'gzip -1 -c "$f" > {to}',
        "zstd --patch-from": f'zstd -q -T0 -3 --long=31 --patch-from="$1/$(basename "$f")" "$f" -o {to}',
    }


def _measure(change: str, way: str, command: list[str], out: Path, repeat: int, *, keep: bool = False) -> Measured:
    print(f"... {change}: {way}", file=sys.stderr, flush=True)
    runs = []
    for _ in range(repeat):
        remove(out)
        settle(None, cold=False)
        runs.append(run(command))
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if not keep:
        remove(out)
    summary = Summary(runs)
    return Measured(change, way, summary.median, summary.cores, summary.anonymous, size)


def _table(found: list[Measured], size: int) -> str:
    rows = []
    for item in found:
        cp = next(other.seconds for other in found if (other.change, other.way) == (item.change, "cp"))
        published = "" if item.nbytes is None else f"{item.nbytes / 1e6:,.1f} MB"
        share = "" if item.nbytes is None else f"{item.nbytes / size:.2%}"
        memory = f"{item.anonymous / report.MIB:.0f} MiB" if item.way.startswith("delta") else ""
        clock = f"{item.seconds:.2f} s"
        times = clock, f"{item.seconds / cp:.1f}", f"{item.cores:.1f} s"
        rows.append((item.change, item.way, published, share, *times, memory))
    headers = ("Change", "Way", "Published", "Of NEW", "Time", "x cp", "Cores", "Memory")
    return report.table(headers, rows)


def _spread(path: Path) -> None:
    """Gives OLD weights that do not repeat."""
    for number, (_, bits) in enumerate(_tensors(path)):
        _in_blocks(bits, partial(_drawn, np.random.default_rng(number)))


def _write_new(old: Model, path: Path, change: str) -> None:
    shutil.copytree(old.path, path)
    for number, (name, bits) in enumerate(_tensors(path)):
        random = np.random.default_rng((1, number))
        if change != "layer":
            _in_blocks(bits, partial(_stepped, random, STEPS[change]))
        elif name.startswith("model.layers.1."):
            _in_blocks(bits, partial(_drawn, random))


def _in_blocks(bits: Bits, make: Callable[[Bits], Bits]) -> None:
    for start in range(0, len(bits), BLOCK):
        bits[start : start + BLOCK] = make(bits[start : start + BLOCK])


def _drawn(random: np.random.Generator, bits: Bits) -> Bits:
    """New weights, as many as there were."""
    return _bf16(random.standard_normal(len(bits), np.float32) * np.float32(0.02))


def _stepped(random: np.random.Generator, step: float, bits: Bits) -> Bits:
    """Weights in bfloat16 after a step of the float32 weights that they were rounded from."""
    rest = random.integers(-0x7FFF, 0x8000, len(bits), np.int32)
    full = ((bits.astype(np.int32) << 16) + rest).view(np.float32)
    return _bf16(full + random.standard_normal(len(bits), np.float32) * np.float32(step))


def _bf16(values: NDArray[np.float32]) -> Bits:
    from ckptkit.dtypes import rounded_to_bf16

    return rounded_to_bf16(values.view(np.uint32)).astype(np.uint16)


def _tensors(path: Path) -> Iterator[tuple[str, Bits]]:
    """Every tensor of a directory, mapped so that writing to it changes the file."""
    for file in sorted(path.glob("*.safetensors")):
        header = read_header(file)
        data = np.memmap(file, np.uint8, "r+")
        for name, entry in header.entries.items():
            yield name, data[len(header.raw) + entry.start : len(header.raw) + entry.stop].view(np.uint16)
        data.flush()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.deltas", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size-gb", type=float, default=1.0, help="size of the models in 10^9 bytes (default 1)")
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"), help="where to work (default /dev/shm)")
    parser.add_argument("--repeat", type=int, default=3, help="runs of every command (default 3)")
    parser.add_argument("--shape", choices=SHAPES, help="layers of this model (default: by size)")
    parser.add_argument("--changes", type=lambda text: text.split(","), default=CHANGES, help="some of step,all,layer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
