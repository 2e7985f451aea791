"""Running a command and measuring it: time by the clock, time of the cores, and the peak of its memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

INTERVAL = 0.005


class AnonymousMemory:
    """Samples RssAnon of a process every 5 ms: what it allocated, and not what it mapped or the page cache holds."""

    def __init__(self, pid: int | str = "self") -> None:
        self._status = f"/proc/{pid}/status"
        self.first = self.peak_bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> AnonymousMemory:
        """Starts sampling."""
        self.first = self.peak_bytes = self._now()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stops sampling."""
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(INTERVAL):
            self.peak_bytes = max(self.peak_bytes, self._now())

    def _now(self) -> int:
        try:
            with open(self._status) as status:
                return next((int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon")), 0)
        except (FileNotFoundError, ProcessLookupError):
            return 0


@dataclass(frozen=True)
class Run:
    """One run of a command. Seconds, and bytes.

    Attributes:
        clock: From start to end, the interpreter's start and imports included.
        cores: User and system time.
        anonymous: Peak of RssAnon.
        resident: Peak resident set, mapped files included.
        output: What it printed on stdout.
    """

    clock: float
    cores: float
    anonymous: int
    resident: int
    output: str


class CommandError(Exception):
    """A measured command failed; the message has the end of what it said."""


def run(command: list[str], environment: dict[str, str] | None = None, codes: Sequence[int] = (0,)) -> Run:
    """Runs a command to its end.

    Args:
        command: Program and arguments.
        environment: Variables to set.
        codes: Exit codes that are no failure.

    Raises:
        CommandError: It exited with another code.
    """
    started = time.perf_counter()
    # Files, not pipes: nobody reads while the command runs, and a full pipe would stop it.
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env={**os.environ, **(environment or {})})
        try:
            with AnonymousMemory(process.pid) as memory:
                _, status, usage = os.wait4(process.pid, 0)
                clock = time.perf_counter() - started
        except BaseException:
            process.kill()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
        stdout.seek(0)
        stderr.seek(0)
        output, errors = stdout.read(), stderr.read()
    if process.returncode not in codes:
        raise CommandError(f"exit {process.returncode}: {' '.join(command)}\n{errors[-2000:]}")
    cores = usage.ru_utime + usage.ru_stime
    return Run(clock, cores, memory.peak_bytes, usage.ru_maxrss << 10, output)


@dataclass(frozen=True)
class Summary:
    """Several runs of one command."""

    runs: list[Run]

    @property
    def median(self) -> float:
        """Median of the clock, seconds."""
        return median(run.clock for run in self.runs)

    @property
    def best(self) -> float:
        """Shortest clock, seconds."""
        return min(run.clock for run in self.runs)

    @property
    def cores(self) -> float:
        """Median of the cores' time, seconds."""
        return median(run.cores for run in self.runs)

    @property
    def anonymous(self) -> int:
        """Largest peak of RssAnon, bytes."""
        return max(run.anonymous for run in self.runs)

    @property
    def resident(self) -> int:
        """Largest resident set, bytes."""
        return max(run.resident for run in self.runs)


def cp_command(source: Path, out: Path, *, sync: bool) -> list[str]:
    """`cp` of a directory without sharing blocks; with `sync` durable, as our output always is."""
    copy = ["cp", "-r", "--reflink=never", str(source), str(out)]
    if not sync:
        return copy
    return ["sh", "-c", '"$@" && find "$0" -exec sync {} +', str(out), *copy]


def is_memory(path: Path) -> bool:
    """Whether a path lies in RAM, where there is nothing to sync."""
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(path)], capture_output=True, text=True, check=True)
    return kind.stdout.strip() in ("tmpfs", "ramfs")


def available_memory() -> int:
    """MemAvailable in bytes."""
    with open("/proc/meminfo") as info:
        return next(int(line.split()[1]) << 10 for line in info if line.startswith("MemAvailable"))


def settle(source: Path | None, *, cold: bool) -> None:
    """Ends the writes that an earlier run left to the kernel; `cold` also drops the source from the page cache."""
    os.sync()
    if source is None or not cold:
        return
    for file in (item for item in source.rglob("*") if item.is_file()):
        fd = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def remove(path: Path) -> None:
    """Deletes what a run wrote."""
    shutil.rmtree(path, ignore_errors=True)
