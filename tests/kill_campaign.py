"""Random SIGKILLs over conversions: `python -m tests.kill_campaign --kills 300 --seed 0 --json report.json`.

Each kill hits a fresh conversion at a random moment, and the resuming run as well in one case of three. After each, the
destination has to be absent or the old model (or the new one, where the kill came after the commit), never anything
between; the last run has to leave the very files of an undisturbed one, and nothing beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ckptkit.conversion.convert import convert
from ckptkit.sharding.grid import Parallelism
from tests.models import files_of, save_llama

ROOT = Path(__file__).resolve().parent.parent
KILLED = -9
ANY_TIME = 0.1
"""Share of kills that may also come while Python starts; the others come once something is written."""
AGAIN = 1 / 3
"""Share of kills after which the resuming run is killed as well."""
AND_A_LITTLE_LATER = 1.2
"""How far beyond the usual end of the writing kills go."""

Files = Mapping[str, bytes]
Command = Callable[[Path, bool], Sequence[str]]
"""The conversion into a destination, resuming or not."""


@dataclass(frozen=True)
class Case:
    """A conversion to be killed.

    Attributes:
        name: For the report.
        command: What to run.
        expected: What an undisturbed run leaves at the destination.
        old: What is there before, to be replaced; None is nothing.
    """

    name: str
    command: Command
    expected: Files
    old: Files | None = None


@dataclass
class Report:
    """What a campaign found.

    Attributes:
        kills: Processes that died of SIGKILL.
        found: Where they died: what lay around the destination -> how often.
        cases: Kills by case.
        losses: Kills after which the old model was gone and the new one not there.
        half_written: Kills after which the destination was neither absent, nor old, nor new.
        failed_resumes: Resumes that did not end with exit code 0.
        other_bytes: Resumes that left other files than an undisturbed run, or anything beside them.
        details: A sentence for each of the last four.
        seconds: Time of the campaign.
    """

    kills: int = 0
    found: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    cases: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    losses: int = 0
    half_written: int = 0
    failed_resumes: int = 0
    other_bytes: int = 0
    details: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def clean(self) -> bool:
        return not self.details

    def to_dict(self) -> dict[str, object]:
        """The report as JSON values, with what it comes to."""
        return {**vars(self), "found": dict(self.found), "cases": dict(self.cases), "clean": self.clean}


class Campaign:
    """Kills conversions at random until there were `kills` of them."""

    def __init__(self, cases: Sequence[Case], folder: Path, seed: int) -> None:
        self._cases = cases
        self._folder = folder
        self._random = random.Random(seed)
        self._spans = {case.name: self._measure(case) for case in cases}
        self.report = Report()

    def run(self, kills: int) -> Report:
        started = time.monotonic()
        number = 0
        while self.report.kills < kills:
            self._trial(self._cases[number % len(self._cases)])
            number += 1
            if number % 20 == 0:
                print(f"{self.report.kills} kills, {len(self.report.details)} findings", file=sys.stderr, flush=True)
        self.report.seconds = time.monotonic() - started
        return self.report

    def _measure(self, case: Case) -> tuple[float, float]:
        """Seconds until a run first writes something, and from there until only the destination is left."""
        target = self._prepare(case)
        started = time.monotonic()
        process = self._start(case, target, resume=False)
        first = self._wait_for_writes(process, target)
        while process.poll() is None and os.listdir(target.parent) != [target.name]:
            time.sleep(0.0005)
        last = time.monotonic()
        assert process.wait() == 0, f"{case.name} fails undisturbed"
        return first - started, last - first

    def _prepare(self, case: Case) -> Path:
        """A fresh directory with what is to be replaced in it; returns the destination."""
        shutil.rmtree(self._folder, ignore_errors=True)
        target = self._folder / "model"
        self._folder.mkdir(parents=True)
        for name, data in (case.old or {}).items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(data)
        return target

    def _start(self, case: Case, target: Path, *, resume: bool) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            case.command(target, resume), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def _wait_for_writes(self, process: subprocess.Popen[bytes], target: Path) -> float:
        before = set(os.listdir(target.parent))
        while process.poll() is None and set(os.listdir(target.parent)) == before:
            time.sleep(0.0005)
        return time.monotonic()

    def _trial(self, case: Case) -> None:
        target, resume = self._prepare(case), False
        while self._kill(case, target, resume=resume):
            self._look(case, target)
            resume = True
            if self._random.random() > AGAIN:
                break
        if not resume:
            return  # it was faster than the kill
        if code := self._start(case, target, resume=True).wait():
            self.report.failed_resumes += 1
            self.report.details.append(f"{case.name}: the resume after kill {self.report.kills} ended with {code}")
        elif files_of(target.parent) != {f"model/{name}": data for name, data in case.expected.items()}:
            self.report.other_bytes += 1
            self.report.details.append(f"{case.name}: other files after kill {self.report.kills} and its resume")

    def _kill(self, case: Case, target: Path, *, resume: bool) -> bool:
        """Starts a run and kills it; False if it ended by itself before."""
        start, writing = self._spans[case.name]
        process = self._start(case, target, resume=resume)
        if self._random.random() < ANY_TIME:
            time.sleep(self._random.uniform(0, start + writing))
        else:
            if not resume:  # what a killed run left is there already
                self._wait_for_writes(process, target)
            else:
                time.sleep(start * self._random.uniform(0.8, 1.0))
            time.sleep(self._random.uniform(0, AND_A_LITTLE_LATER * writing))
        process.kill()
        return process.wait() == KILLED

    def _look(self, case: Case, target: Path) -> None:
        report = self.report
        report.kills += 1
        report.cases[case.name] += 1
        report.found[phase(target)] += 1
        there = files_of(target) if target.exists() else None
        if there in (case.old, case.expected):
            return
        lost = there is None
        report.losses += lost
        report.half_written += not lost
        what = "the old model is gone" if lost else "the destination is half-written"
        report.details.append(f"{case.name}: {what} after kill {report.kills}")


def phase(target: Path) -> str:
    """What a killed run was about, by what it left."""
    partial = target.parent / f".{target.name}.ckptkit-partial"
    if not partial.exists():
        lock = target.parent / f".{target.name}.ckptkit-lock"
        return "at the lock" if lock.exists() else "before the lock, or after the clean-up"
    if (partial / "journal.jsonl").exists():
        return "sealing" if (partial / "sealed.json").exists() else "writing"
    return "committing or cleaning up" if (partial / "sealed.json").exists() else "preparing or cleaning up"


def conversions(hf: Path, folder: Path) -> list[Case]:
    """A model to Megatron-LM's and Megatron-Core's formats and back, into nothing and over an old model.

    Args:
        hf: Its Hugging Face directory.
        folder: Where its other formats are to be.
    """
    convert(hf, folder / "torch", to="torch", grid=Parallelism(2, 2))
    convert(hf, folder / "torch_dist", to="torch_dist", grid=Parallelism(2, 1))
    ways = {
        "hf -> torch": (hf, folder / "torch", "--to torch --tp 2 --pp 2"),
        "hf -> torch_dist": (hf, folder / "torch_dist", "--to torch_dist --tp 2"),
        "torch -> hf": (folder / "torch", hf, "--to hf"),
    }
    cases = []
    for name, (source, result, options) in ways.items():
        expected = files_of(result)
        old = {"precious": b"the old model", **{path: bytes(len(data)) for path, data in expected.items()}}
        cases.append(Case(name, _command(source, options), expected))
        cases.append(Case(f"{name}, --overwrite", _command(source, f"{options} --overwrite"), expected, old))
    return cases


def _command(source: Path, options: str) -> Command:
    def command(target: Path, resume: bool) -> Sequence[str]:
        words = [sys.executable, "-m", "ckptkit", "convert", str(source), str(target), *options.split()]
        return [*words, "--resume"] if resume else words

    return command


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill conversions at random moments and resume them.")
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the report")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        hf = save_llama(Path(folder, "hf"), shard="300KB")
        campaign = Campaign(conversions(hf, Path(folder, "others")), Path(folder, "work"), arguments.seed)
        report = campaign.run(arguments.kills)
    text = json.dumps({"seed": arguments.seed, **report.to_dict()}, indent=2)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    sys.exit(0 if report.clean else 1)


if __name__ == "__main__":
    main()
