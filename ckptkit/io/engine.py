"""Carries out a plan with a few threads and reused buffers; reads and writes overlap.

Memory does not grow with the model. Each thread has one staging and one scratch buffer (and room for a cast), and units
of work are made one at a time.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol

import numpy as np

from ckptkit.io.castable import check_cast
from ckptkit.io.casts import convert
from ckptkit.io.cores import MOST_MOVERS, moving_threads
from ckptkit.io.crew import Crew, start_threads
from ckptkit.io.gather import Gatherer
from ckptkit.io.output import Output
from ckptkit.io.plan import Comparison, Plan
from ckptkit.io.reading import compare, first_difference, hash_file, hash_tensor, read_tensor
from ckptkit.io.schedule import Limits, Schedule, Unit
from ckptkit.io.source import Sources
from ckptkit.tensors import Region

__all__ = [
    "MEMORY_LIMIT",
    "EngineResult",
    "Journal",
    "check_cast",
    "compare",
    "first_difference",
    "hash_file",
    "hash_tensor",
    "read_tensor",
    "run",
]

MEMORY_LIMIT = 96 << 20
"""Upper bound of the anonymous memory that moving bytes takes, in bytes, at any size of model."""

_TELL = 0.05  # seconds between two reports of a thread on its progress


class Journal(Protocol):
    """A record of finished files."""

    def finished(self) -> Mapping[str, str | None]:
        """Paths of files that earlier runs finished -> their recorded SHA-256, or None."""

    def record(self, path: str, size: int, sha256: str | None) -> None:
        """Records a file. The engine calls it once the file is durable, from any thread."""


@dataclass(frozen=True, slots=True)
class EngineResult:
    """The outcome of a run.

    Attributes:
        written: Bytes written.
        kept: Bytes in files that an earlier run had finished.
        compared: Bytes compared; the two sides of a comparison count once.
        seconds: Time of the whole run.
        hashes: SHA-256 by output path, if asked for.
    """

    written: int
    kept: int
    compared: int
    seconds: float
    hashes: dict[str, str] = field(default_factory=dict)


def run(
    plan: Plan,
    directory: Path,
    *,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
    journal: Journal | None = None,
    hash: bool = False,
    limits: Limits | None = None,
) -> EngineResult:
    """Makes the comparisons of a plan, then writes every file under `directory` and makes it durable.

    Args:
        plan: The plan.
        directory: The folder to write into; sub-directories are created.
        threads: Threads that move bytes; by default as `ckptkit.io.cores.moving_threads` has it.
        progress: Called in this thread with the bytes finished since the last call. The sum is `plan.nbytes`.
        journal: Names the files that are finished already, and records those that this run finishes.
        hash: Also compute the SHA-256 of every file.
        limits: Sizes of buffers, by default what suits the threads.

    Raises:
        InputError: A source is gone or ends early, or two tensors that must be equal differ.
        UnsupportedError: A cast that does not exist.
        StorageError: The disk is full or answers with an error.
    """
    plan.check()
    started = time.monotonic()
    count = threads or moving_threads()
    job = _Job(plan, directory, journal, hash, limits or Limits.of(count))
    job.run(count, progress or (lambda count: None))
    written = plan.nbytes - job.kept
    compared = sum(comparison.left.nbytes for comparison in plan.comparisons)
    return EngineResult(written, job.kept, compared, time.monotonic() - started, job.hashes)


class _Background:
    """What runs beside the threads that move bytes, because it waits for the disk or for them.

    Attributes:
        send: Has the kernel begin to write; waits while the disk's queue is full.
        hash: Hashes what is written.
        sync: Finishes files.
    """

    def __init__(self, count: int, hash: bool) -> None:
        self.send = Crew(1, "ckptkit-send")
        self.hash = Crew(min(count, MOST_MOVERS) if hash else 0, "ckptkit-hash")
        self.sync = Crew(count, "ckptkit-sync")

    def close(self) -> None:
        """Waits until all is done."""
        for crew in (self.send, self.hash, self.sync):
            crew.close()


class _Job:
    """One run: its outputs, its threads, and the first error."""

    def __init__(self, plan: Plan, directory: Path, journal: Journal | None, hash: bool, limits: Limits) -> None:
        self._journal = journal
        self._hash = hash
        self._limits = limits
        self._comparisons = deque(plan.comparisons)
        self._outputs = [Output(file, directory / file.path, hash) for file in plan.files]
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._mailbox: SimpleQueue[int | None] = SimpleQueue()
        self.hashes: dict[str, str] = {}
        self.kept = 0

    def run(self, count: int, progress: Callable[[int], None]) -> None:
        """Carries everything out with `count` threads."""
        live = self._unfinished(progress)
        schedule = Schedule([output.spec for output in self._outputs], live, self._limits)
        background = _Background(count, self._hash)
        workers: list[threading.Thread] = []
        try:
            for index in live:
                if not self._outputs[index].spec.size:
                    background.sync.submit(partial(self._guard, partial(self._finish, self._outputs[index])))
            works = [partial(self._work, index, schedule, background) for index in range(count)]
            workers = start_threads(works, "ckptkit")
            if not workers:
                works[0]()  # the system allows no further thread, so this one does the work
            running = len(workers) or 1
            while running:
                message = self._mailbox.get()
                if message is None:
                    running -= 1
                else:
                    progress(message)
        except BaseException:
            self._stop.set()
            raise
        finally:
            for worker in workers:
                worker.join()
            background.close()
            for output in self._outputs:
                output.close()
        if self._error is not None:
            raise self._error

    def _unfinished(self, progress: Callable[[int], None]) -> list[int]:
        """Indices of the files to write; those that an earlier run finished are kept (and hashed)."""
        finished = self._journal.finished() if self._journal is not None else {}
        live: list[int] = []
        for index, output in enumerate(self._outputs):
            if output.spec.path in finished and self._is_kept(output, finished[output.spec.path]):
                self.kept += output.spec.size
                progress(output.spec.size)
            else:
                live.append(index)
        return live

    def _is_kept(self, output: Output, sha256: str | None) -> bool:
        try:
            if os.stat(output.path, follow_symlinks=False).st_size != output.spec.size:
                return False
        except OSError:
            return False
        if not self._hash:
            return True
        found = hash_file(output.path)
        if sha256 not in (None, found):
            return False
        self.hashes[output.spec.path] = found
        return True

    def _work(self, index: int, schedule: Schedule, background: _Background) -> None:
        done, told = 0, 0.0
        try:
            while not self._stop.is_set() and (comparison := self._next_comparison()) is not None:
                compare(comparison, limits=self._limits)
            with Sources() as sources:
                mover = _Mover(self._outputs, sources, self._limits)
                while not self._stop.is_set() and (unit := schedule.next(index)) is not None:
                    mover.move(unit)
                    done += self._settle(unit, background)
                    # Not after every unit: whoever is told takes Python's lock from a thread that moves bytes.
                    if (now := time.monotonic()) - told >= _TELL:
                        self._mailbox.put(done)
                        done, told = 0, now
        except BaseException as error:
            self._fail(error)
        finally:
            self._mailbox.put(done)
            self._mailbox.put(None)

    def _next_comparison(self) -> Comparison | None:
        try:
            return self._comparisons.popleft()
        except IndexError:
            return None

    def _settle(self, unit: Unit, background: _Background) -> int:
        """Has done what follows the writes of a unit, and gives their bytes."""
        written = 0
        for write in unit.writes:
            output, size = self._outputs[write.file], unit.written(write)
            if output.follower is not None and output.follower.written(write.offset, write.offset + size):
                background.hash.submit(partial(self._guard, output.follower.advance))
            last, unsent = output.settle(size)
            if last:
                background.sync.submit(partial(self._guard, partial(self._finish, output)))
            elif unsent:
                background.send.submit(partial(self._guard, output.send))
            written += size
        return written

    def _guard(self, work: Callable[[], None]) -> None:
        """Does some work in the background, unless the run has failed."""
        try:
            if not self._stop.is_set():
                work()
        except BaseException as error:
            self._fail(error)

    def _finish(self, output: Output) -> None:
        """Completes a file and makes it durable; only then it counts as finished."""
        output.complete()
        # Hashed before the sync, because the disk writes in the meantime.
        sha256 = output.follower.finish() if output.follower is not None else None
        output.sync()
        if sha256 is not None:
            self.hashes[output.spec.path] = sha256
        if self._journal is not None:
            self._journal.record(output.spec.path, output.spec.size, sha256)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            if self._error is None:
                self._error = error
        self._stop.set()


class _Mover:
    """Moves bytes in one thread, with the buffers of that thread."""

    def __init__(self, outputs: Sequence[Output], sources: Sources, limits: Limits) -> None:
        self._outputs = outputs
        self._sources = sources
        self._gatherer = Gatherer(sources, limits.scratch)
        self._staging = np.empty(limits.staging, np.uint8)
        self._kernel_copies = True

    def move(self, unit: Unit) -> None:
        """Reads the pieces of a unit and makes its writes."""
        if unit.direct:
            self._pass_through(unit)
            return
        self._gatherer.fill(unit.placements, self._staging[: unit.size])
        for write in unit.writes:
            data = self._staging[write.start : write.stop]
            if unit.cast is not None:
                data = convert(data, *unit.cast)
            self._outputs[write.file].write(data, write.offset)

    def _pass_through(self, unit: Unit) -> None:
        region, write = unit.placements[0].piece, unit.writes[0]
        assert isinstance(region, Region)
        output, done = self._outputs[write.file], 0
        if self._kernel_copies:
            done = output.copy(self._sources.fd(region.file), region.offset, unit.size, write.offset)
            self._kernel_copies = done == unit.size
        while done < unit.size:
            data = self._staging[: unit.size - done]
            self._sources.read(region.file, data.data, region.offset + done)
            output.write(data, write.offset + done)
            done += len(data)
