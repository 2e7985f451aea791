"""Converts, and if asked verifies, each iteration of a run when it is finished: one after another, the oldest first."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ckptkit.checkpoints.source_options import SourceOptions
from ckptkit.conversion import convert as conversion
from ckptkit.errors import CkptkitError, InputError, StorageError, UnsupportedError, UsageError, VerificationError
from ckptkit.io.stores.opening import must_be_on_disk
from ckptkit.io.system import write_text
from ckptkit.runs.iterations import Iterations
from ckptkit.runs.record import CONVERTED, DIFFERS, FAILED, REMOVED, SAME, SKIPPED, Entry, Record, held
from ckptkit.sizes import human_size
from ckptkit.verification import levels

SCHEMA = 1
"""Version of the JSON; it rises when a field goes away or changes its meaning."""
EVERY, SETTLE = 30.0, 60.0
"""Seconds between two looks; seconds without a change after which an iteration without a tracker is finished."""
REPORTS = "reports"
_DIFFERENCE = 1


@dataclass(frozen=True)
class Wanted:
    """What is made of a run.

    Attributes:
        run: The folder with the iterations.
        out: The folder that gets a folder for each.
        to: The format.
        options: Further arguments of `convert`: grid, dtype, ...
        source: Facts about the run's checkpoints.
        verify: Level of the verification; None for none.
        keep: Number of outputs that stay, the newest; None for all. Those that failed their verification stay, too.
        first: The first iteration that counts.
    """

    run: Path
    out: Path
    to: str
    options: dict[str, Any]
    source: SourceOptions = SourceOptions()  # noqa: RUF009  frozen
    verify: str | None = None
    keep: int | None = None
    first: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        """What the outputs depend on. Whether they are verified, and how many stay, may change."""
        return {
            "run": str(self.run.absolute()),
            "to": self.to,
            **{
                name: str(value)
                for name, value in self.options.items()
                if name != "threads" and value not in (None, False)  # what is not asked for is not recorded
            },
            **{name: str(value) for name, value in self.source.keywords().items()},
        }


@dataclass(frozen=True)
class Watched:
    """What became of a run's iterations.

    Attributes:
        run: The run.
        out: The folder with the outputs.
        iterations: Number -> what was made of it.
    """

    run: str
    out: str
    iterations: dict[int, Entry]

    @property
    def exit_code(self) -> int:
        """1 if a verification showed a difference, else the code of the first iteration that failed, else 0."""
        codes = [entry.code for entry in self.iterations.values() if entry.code]
        return _DIFFERENCE if _DIFFERENCE in codes else next(iter(codes), 0)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        found = [{"iteration": number, **asdict(entry)} for number, entry in sorted(self.iterations.items())]
        return {"schema": SCHEMA, "run": self.run, "out": self.out, "iterations": found}


def watch(
    wanted: Wanted,
    *,
    once: bool = False,
    until: int | None = None,
    every: float = EVERY,
    settle: float = SETTLE,
    tell: Callable[[str], None] = lambda text: None,
    wait: Callable[[float], None] = time.sleep,
) -> Watched:
    """Converts each iteration when it is finished.

    What was dealt with is recorded in OUT/watch.json: a command that was killed goes on there. An iteration that cannot
    be converted or verified is recorded and said, and the next one follows; without space, everything ends.

    Args:
        wanted: What is made.
        once: Whether to end after what is finished now.
        until: Number of an iteration; the command ends when it, or a later one, was dealt with.
        every: Seconds between two looks.
        settle: Seconds without a change after which an iteration of a run without a tracker file is finished.
        tell: Takes a line about each thing that was done.
        wait: Waits for some seconds.

    Raises:
        UsageError: The request makes no sense, or OUT is that of another one.
        InputError: There is no such run.
        StorageError: OUT cannot be written.
    """
    _check(wanted, once)
    with ExitStack() as stack:
        stack.enter_context(held(wanted.out))
        watcher = _Watcher(wanted, tell)
        looking = Iterations(wanted.run, 0.0 if once else settle)
        while True:
            watcher.look(looking.finished())
            done = max(watcher.record.entries, default=-1)
            if once or (until is not None and done >= until):
                return Watched(str(wanted.run), str(wanted.out), dict(watcher.record.entries))
            wait(every)


def _check(wanted: Wanted, once: bool) -> None:
    must_be_on_disk(wanted.run)
    if not wanted.run.is_dir() and (once or wanted.run.exists()):
        raise InputError("no such directory", where=wanted.run)
    if wanted.source.iteration is not None:
        raise UsageError("--iteration is about one iteration", hint="use --first, or ckptkit convert")
    run, out = wanted.run.resolve(), wanted.out.resolve()
    if out == run or out.is_relative_to(run) or run.is_relative_to(out):
        raise UsageError("OUT and RUN lie in each other", where=wanted.out, hint="choose a folder beside the run")
    if wanted.keep is not None and wanted.keep < 1:
        raise UsageError(f"{wanted.keep}", where="--keep", hint="at least 1 stays")


class _Watcher:
    """Deals with iterations, and records what it did."""

    def __init__(self, wanted: Wanted, tell: Callable[[str], None]) -> None:
        self._wanted, self._tell = wanted, tell
        self.record = Record(wanted.out, wanted.settings)

    def look(self, finished: dict[int, Path]) -> None:
        """Deals with all that are finished and were not dealt with."""
        numbers = [number for number in finished if number >= self._wanted.first]
        waiting = [number for number in numbers if number not in self.record.entries]
        for number in self._superfluous(waiting):
            self._put(number, Entry(SKIPPED, finished[number].name, "newer iterations were finished already"))
            waiting.remove(number)
        for number in waiting:
            self._convert(number, finished[number])
            self._verify(number, finished[number])
            self._remove_old()
        for number, entry in list(self.record.entries.items()):
            if entry.state == CONVERTED:  # a command was killed before it could verify, or none was asked for then
                self._verify(number, self._wanted.run / entry.folder)
        self._remove_old()

    def _superfluous(self, waiting: list[int]) -> list[int]:
        """Iterations whose outputs would be removed at once."""
        keep = self._wanted.keep
        return [] if keep is None else waiting[:-keep]

    def _convert(self, number: int, source: Path) -> None:
        wanted = self._wanted
        try:
            result = conversion.convert(
                wanted.run,
                wanted.out / source.name,
                to=wanted.to,
                iteration=number,
                resume=True,
                **wanted.options,
                **wanted.source.keywords(),
            )
        except CkptkitError as error:
            if not source.is_dir() and not isinstance(error, StorageError):
                self._put(number, Entry(SKIPPED, source.name, "the run removed it first"))
            elif isinstance(error, InputError | UnsupportedError):
                self._put(number, Entry(FAILED, source.name, str(error), code=error.exit_code))
            elif isinstance(error, UsageError) and os.path.lexists(wanted.out / source.name):
                said = f"{wanted.out / source.name} is there and was not made by this command"
                self._put(number, Entry(FAILED, source.name, said, code=error.exit_code))
            else:
                raise  # it would be the same for every iteration
            return
        said = f"{human_size(result.bytes_total)} in {result.seconds:.1f} s"
        self._put(number, Entry(CONVERTED, source.name, "; ".join([said, *result.lossy])))

    def _verify(self, number: int, source: Path) -> None:
        wanted, entry = self._wanted, self.record.entries[number]
        if wanted.verify is None or entry.state != CONVERTED:
            return
        reference = SourceOptions(**{**wanted.source.keywords(), "iteration": number})
        try:
            report = levels.verify(
                wanted.run, wanted.out / entry.folder, level=wanted.verify, reference_source=reference
            )
        except CkptkitError as error:
            gone = not source.is_dir()
            if isinstance(error, StorageError) or (isinstance(error, UsageError) and not gone):
                raise
            said = "the run removed it before it could be verified" if gone else str(error)
            self._put(number, Entry(FAILED, entry.folder, said, code=VerificationError.exit_code))
            return
        reports = wanted.out / REPORTS
        reports.mkdir(exist_ok=True)
        write_text(str(reports / f"{entry.folder}.json"), json.dumps(report.to_dict(), indent=2) + "\n")
        last = report.levels[-1]
        state, code = (SAME, 0) if report.passed else (DIFFERS, _DIFFERENCE)
        self._put(number, Entry(state, entry.folder, f"{last.name}: {last.summary}", code=code))

    def _remove_old(self) -> None:
        """Removes outputs beyond those that stay: only what is recorded as made here, and never a failed one."""
        if self._wanted.keep is None:
            return
        made = CONVERTED if self._wanted.verify is None else SAME
        there = sorted(number for number, entry in self.record.entries.items() if entry.state in (made, SAME))
        for number in there[: -self._wanted.keep]:
            folder = self._wanted.out / self.record.entries[number].folder
            doomed = folder.with_name(f".{folder.name}.removed")
            shutil.rmtree(doomed, ignore_errors=True)
            if folder.is_dir() and not folder.is_symlink():
                folder.rename(doomed)  # in one step: nobody reads half a model
                shutil.rmtree(doomed, ignore_errors=True)
            self._put(number, Entry(REMOVED, folder.name, f"{self._wanted.keep} newer ones stay"))

    def _put(self, number: int, entry: Entry) -> None:
        self.record.put(number, entry)
        self._tell(f"{entry.folder}: {entry.state}, {entry.said}")
