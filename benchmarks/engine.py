"""Moving bytes against `cp -r --reflink=never`: time, and the peak of anonymous memory.

    python benchmarks/engine.py [--gigabytes 2] [--place /dev/shm] [--threads 2] [--repeat 3]

Three plans over the same source files, which hold decoder layers in the shapes of an 8B Llama:

    copy     every file passes through whole
    tp2      two tensor-parallel ranks: QKV interleaved by query group, gate and up fused, the others by column
    tp2+crc  the same with a CRC-32 per tensor, as a zip archive has
    join     the row-parallel weights of two ranks, put together again

Each figure is the best of `--repeat` runs, taken in turns with `cp`; a destination is removed before the
next is made, so at most twice the size of the source is in use. `moving` makes the files durable, which `cp`
does not; `whole` is with checks, journal and commit, too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ckptkit.dtypes import DTYPES
from ckptkit.io.commit import Destination
from ckptkit.io.engine import run
from ckptkit.io.plan import OutputFile, Plan
from ckptkit.io.schedule import Limits
from ckptkit.io.segments import Checksum, Segment
from ckptkit.tensors import Tensor, hstack, vstack

BF16 = DTYPES["BF16"]
HIDDEN, FFN, GROUPS, HEAD = 4096, 14336, 8, 128
SHAPES = {
    "q": (HIDDEN, HIDDEN),
    "k": (GROUPS * HEAD, HIDDEN),
    "v": (GROUPS * HEAD, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate": (FFN, HIDDEN),
    "up": (FFN, HIDDEN),
    "down": (HIDDEN, FFN),
}
Layer = dict[str, Tensor]


def make_sources(directory: Path, size: int) -> list[Layer]:
    """Files of one layer each, together about `size` bytes."""
    directory.mkdir()
    block = np.random.default_rng(0).bytes(8 << 20)
    layer_size = sum(2 * rows * width for rows, width in SHAPES.values())
    layers = []
    for index in range(max(1, size // layer_size)):
        path, offset, layer = directory / f"layer{index}", 0, {}
        with open(path, "wb") as file:
            for start in range(0, layer_size, len(block)):
                file.write(block[: layer_size - start])
        for name, shape in SHAPES.items():
            layer[name] = Tensor.from_file(str(path), offset, BF16, shape)
            offset += layer[name].nbytes
        layers.append(layer)
    return layers


def copy_plan(layers: list[Layer]) -> Plan:
    """Every file as it is."""
    sizes = {next(iter(sources(layer))): sum(t.nbytes for t in layer.values()) for layer in layers}
    return Plan(tuple(OutputFile.copy(Path(path).name, path, size) for path, size in sizes.items()))


def sources(layer: Layer) -> set[str]:
    """The file of a layer."""
    return Plan((OutputFile("x", layer["q"].nbytes, (Segment(0, layer["q"]),)),)).sources()


def tp2_plan(layers: list[Layer], checksums: bool = False) -> Plan:
    """The shards of two tensor-parallel ranks."""
    return Plan(tuple(lay_out(f"rank{rank}", shards(layers, rank), checksums) for rank in range(2)))


def shards(layers: list[Layer], rank: int) -> Iterator[Tensor]:
    """The tensors of one rank of two."""
    for layer in layers:
        heads = HIDDEN // GROUPS
        parts = [(layer["q"], heads), (layer["k"], HEAD), (layer["v"], HEAD)]
        groups = range(rank * GROUPS // 2, (rank + 1) * GROUPS // 2)
        yield vstack([tensor.rows(g * rows, (g + 1) * rows) for g in groups for tensor, rows in parts])
        yield layer["o"].cols(rank * HIDDEN // 2, (rank + 1) * HIDDEN // 2)
        yield vstack([layer[name].rows(rank * FFN // 2, (rank + 1) * FFN // 2) for name in ("gate", "up")])
        yield layer["down"].cols(rank * FFN // 2, (rank + 1) * FFN // 2)


def join_plan(layers: list[Layer]) -> Plan:
    """Weights put together from left and right halves."""
    halves = [(layer["gate"], layer["up"]) for layer in layers]
    return Plan(tuple(lay_out(f"layer{i}", iter([hstack(pair)]), False) for i, pair in enumerate(halves)))


def lay_out(path: str, tensors: Iterator[Tensor], checksums: bool) -> OutputFile:
    """Tensors one after the other, 64 bytes before each."""
    segments, sums, offset = [], [], 0
    for tensor in tensors:
        segments.append(Segment(offset + 64, tensor))
        sums.append(Checksum(offset + 64, offset + 64 + tensor.nbytes, (offset,)))
        offset += 64 + tensor.nbytes
    return OutputFile(path, offset, tuple(segments), tuple(sums) if checksums else ())


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds that `work` takes by the clock, and seconds of all cores: the latter hold on a busy machine, too."""
    clock, cores = time.perf_counter(), sum(os.times()[:4])
    work()
    return time.perf_counter() - clock, sum(os.times()[:4]) - cores


def copy(source: Path, out: Path, sync: bool = False) -> None:
    """What we are measured by; with `sync` it is durable, as our output always is."""
    subprocess.run(["cp", "-r", "--reflink=never", str(source), str(out)], check=True)
    if sync:
        subprocess.run(["sync", *map(str, out.iterdir())], check=True)


class AnonymousMemory:
    """Samples RssAnon every 10 ms: its peak over the value at the start, in MiB."""

    def __enter__(self) -> AnonymousMemory:
        """Starts sampling."""
        self._done = threading.Event()
        self._start = self._peak = self._now()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stops sampling."""
        self._done.set()
        self._thread.join()

    @property
    def peak(self) -> float:
        """MiB above the start."""
        return (self._peak - self._start) / 1024

    def _sample(self) -> None:
        while not self._done.wait(0.01):
            self._peak = max(self._peak, self._now())

    @staticmethod
    def _now() -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))


def measure(name: str, plan: Plan, source: Path, out: Path, options: argparse.Namespace) -> None:
    """Prints one line: the plan against `cp` of the same number of bytes."""
    limits = Limits(options.staging << 10, options.scratch << 10, options.direct << 10, options.extent << 10)
    best = {key: (float("inf"), float("inf")) for key in ("cp", "cp+sync", "moving", "whole")}

    def keep(key: str, work: Callable[[], object]) -> None:
        now = timed(work)
        best[key] = (min(best[key][0], now[0]), min(best[key][1], now[1]))
        shutil.rmtree(out)

    with AnonymousMemory() as memory:
        for _ in range(options.repeat):
            keep("cp", lambda: copy(source, out))
            keep("cp+sync", lambda: copy(source, out, sync=True))
            keep("moving", lambda: run(plan, out, threads=options.threads, limits=limits))
            keep("whole", lambda: Destination(out, plan).write(threads=options.threads))
    size = sum(file.stat().st_size for file in source.iterdir())
    gigabytes = plan.nbytes / 1e9
    clock, cores = (best["cp"][i] * plan.nbytes / size for i in range(2))
    synced = best["cp+sync"][0] * plan.nbytes / size
    print(f"{name:8} {gigabytes:5.2f} GB  cp {gigabytes / clock:5.2f} GB/s (synced {gigabytes / synced:4.2f})", end="")
    for key in ("moving", "whole"):
        ratios = f"{best[key][0] / clock:4.2f} x cp ({best[key][1] / cores:4.2f} x its CPU time)"
        print(f"  {key} {gigabytes / best[key][0]:5.2f} GB/s = {ratios}", end="")
    print(f"  anonymous {memory.peak:4.1f} MiB", flush=True)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--place", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--plans", default="copy,tp2,tp2+crc,join")
    for name, default in (("staging", Limits().staging), ("scratch", Limits().scratch)):
        parser.add_argument(f"--{name}", type=int, default=default >> 10, help="KiB")
    for name, default in (("direct", Limits().direct), ("extent", Limits().extent)):
        parser.add_argument(f"--{name}", type=int, default=default >> 10, help="KiB")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.place, prefix="ckptkit-bench-") as place:
        source, out = Path(place, "source"), Path(place, "out")
        layers = make_sources(source, int(options.gigabytes * 1e9))
        plans = {
            "copy": lambda: copy_plan(layers),
            "tp2": lambda: tp2_plan(layers),
            "tp2+crc": lambda: tp2_plan(layers, checksums=True),
            "join": lambda: join_plan(layers),
        }
        for name in options.plans.split(","):
            measure(name, plans[name](), source, out, options)


if __name__ == "__main__":
    main()
