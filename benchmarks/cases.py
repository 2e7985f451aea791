"""The conversions and alternatives that are measured, each in turns with `cp` of the same source."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.alternatives import ALTERNATIVES, installed
from benchmarks.measure import Run, Summary, available_memory, cp_command, is_memory, remove, run, settle
from benchmarks.model import Qwen, Shape, write_model

MARGIN = 1 << 30


@dataclass(frozen=True)
class Case:
    """A conversion: its name, the kind of source, and the options of `ckptkit convert`."""

    name: str
    source: str
    options: tuple[str, ...]


LLAMA = ("TP2 x PP2", ("--tp", "2", "--pp", "2"))
EXPERTS = ("TP2 x EP4", ("--tp", "2", "--ep", "4"))
Grid = tuple[str, tuple[str, ...]]


def grid_of(shape: Shape) -> Grid:
    """The grid on which models of a shape are measured: its name and its options."""
    return EXPERTS if isinstance(shape, Qwen) else LLAMA


def cases_of(shape: Shape) -> list[Case]:
    """What is measured with models of a shape."""
    grid, options = grid_of(shape)
    torch, distributed = ("--to", "torch", *options), ("--to", "torch_dist", *options)
    there = [
        Case(f"hf -> torch {grid}", "hf", torch),
        Case("hf -> packed", "hf", ("--to", "packed")),
        Case("hf -> hf", "hf", ("--to", "hf")),
        Case(f"hf -> torch {grid} --hash", "hf", (*torch, "--hash")),
        Case(f"hf -> torch_dist {grid}", "hf", distributed),
    ]
    back = [Case(f"{kind} {grid} -> hf", kind, ("--to", "hf")) for kind in ("torch", "torch_dist")]
    back.append(Case("packed -> hf", "packed", ("--to", "hf")))
    if isinstance(shape, Qwen):
        return [*there, *back]
    other = ("--to", "torch", "--pp", "2")
    return [
        *there,
        *back,
        *(Case(f"{kind} {grid} -> torch TP1 x PP2", kind, other) for kind in ("torch", "torch_dist")),
        Case(f"hf F32 -> torch {grid} --dtype bfloat16", "hf-f32", (*torch, "--dtype", "bfloat16")),
    ]


@dataclass(frozen=True)
class Result:
    """What was measured. Bytes and seconds.

    Attributes:
        name: Of the case.
        source_bytes: Size of the source.
        output_bytes: Size of what was written.
        cp: `cp` of the source, in turns with `whole`.
        whole: The whole command.
        moving: The copying alone: writing and syncing the files of the same plan.
        phases: Medians by phase of the process in which the copying alone was measured.
    """

    name: str
    source_bytes: int
    output_bytes: int
    cp: Summary
    whole: Summary
    moving: list[float] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "name": self.name,
            "source_bytes": self.source_bytes,
            "output_bytes": self.output_bytes,
            "cp_seconds": [item.clock for item in self.cp.runs],
            "whole_seconds": [item.clock for item in self.whole.runs],
            "moving_seconds": self.moving,
            "cp_core_seconds": self.cp.cores,
            "core_seconds": self.whole.cores,
            "peak_anonymous_bytes": self.whole.anonymous,
            "peak_resident_bytes": self.whole.resident,
            "phases": self.phases,
        }


@dataclass(frozen=True)
class Bench:
    """Where and how often to measure.

    Attributes:
        place: A directory of ours; sources and outputs go there.
        shape: Of the synthetic model.
        size: Of the source, in bytes.
        repeat: Runs of every command.
        cold: Drop the source from the page cache before every run.
        say: Told what is being done.
    """

    place: Path
    shape: Shape
    size: int
    repeat: int
    cold: bool
    say: Callable[[str], None]

    @property
    def out(self) -> Path:
        """The one output that exists at a time."""
        return self.place / "out"

    def conversions(self, cases: Sequence[Case]) -> Iterator[Result]:
        """Measures cases, grouped by source so that one source exists at a time."""
        for kind in dict.fromkeys(case.source for case in cases):
            source = self._source(kind)
            yield from (self.conversion(case, source) for case in cases if case.source == kind)
            remove(source)

    def conversion(self, case: Case, source: Path) -> Result:
        """Measures one case: `cp`, the whole command, the copying alone, and again."""
        self.say(case.name)
        convert = [sys.executable, "-m", "ckptkit", "convert", str(source), str(self.out), *case.options, "--json"]
        phases = [sys.executable, "-m", "benchmarks.phases", str(source), str(self.out), *case.options]
        copies, wholes, parts = [], [], []
        for _ in range(self.repeat):
            copies.append(self._run(self._cp(source), source))
            wholes.append(self._run(convert, source))
            parts.append(json.loads(self._run(phases, source).output))
        times = {name: sorted(part["seconds"][name] for part in parts)[len(parts) // 2] for name in parts[0]["seconds"]}
        return Result(
            case.name,
            _size(source),
            parts[0]["bytes"],
            Summary(copies),
            Summary(wholes),
            [part["seconds"]["move"] for part in parts],
            times,
        )

    def alternatives(self) -> Iterator[Result | tuple[str, str]]:
        """Measures what people do today; (name, reason) for what cannot be run here."""
        source = self._source("hf")
        for name, function in ALTERNATIVES.items():
            title = f"{name}: {str(function.__doc__).splitlines()[0].rstrip('.')}"
            if not installed(name):
                yield title, "not installed"
            elif not self._has_room_for(source):
                yield title, "not run: it needs the memory of the whole model"
            else:
                yield self._alternative(name, title, source)
        remove(source)

    def _alternative(self, name: str, title: str, source: Path) -> Result:
        self.say(title)
        command = [sys.executable, "-m", "benchmarks.alternatives", name, str(source), str(self.out)]
        copies, wholes, written = [], [], 0
        for _ in range(self.repeat):
            copies.append(self._run(self._cp(source, sync=False), source))
            settle(source, cold=self.cold)
            try:
                wholes.append(run(command))
                written = _size(self.out)
            finally:
                remove(self.out)
        return Result(title, _size(source), written, Summary(copies), Summary(wholes))

    def _has_room_for(self, source: Path) -> bool:
        """Whether a model fits into memory, with its output where that is in memory, too."""
        return available_memory() > _size(source) * (2 if is_memory(self.place) else 1) + MARGIN

    def _cp(self, source: Path, *, sync: bool = True) -> list[str]:
        return cp_command(source, self.out, sync=sync and not is_memory(self.place))

    def _run(self, command: list[str], source: Path) -> Run:
        settle(source, cold=self.cold)
        try:
            return run(command)
        finally:
            remove(self.out)

    def _source(self, kind: str) -> Path:
        """Makes a source; a sharded one is converted from a Hugging Face one that is deleted then."""
        self.say(f"making the source ({kind}, {self.size / 1e9:g} GB)")
        path = self.place / kind
        write_model(self.place / "model", self.size, self.shape, "F32" if kind == "hf-f32" else "BF16")
        if not kind.startswith("hf"):
            grid = () if kind == "packed" else grid_of(self.shape)[1]
            convert = [sys.executable, "-m", "ckptkit", "convert", str(self.place / "model"), str(path)]
            run([*convert, "--to", kind, *grid])
            remove(self.place / "model")
        else:
            (self.place / "model").rename(path)
        settle(None, cold=False)
        return path


def _size(directory: Path) -> int:
    return sum(item.stat().st_size for item in directory.rglob("*") if item.is_file())
