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
from ckptkit.io.checksums import Sum
from ckptkit.io.cores import MOST_MOVERS, moving_threads
from ckptkit.io.crew import Crew, attend
from ckptkit.io.gather import Gatherer
from ckptkit.io.output import Output
from ckptkit.io.plan import Comparison, Plan
from ckptkit.io.reading import compare, first_difference, hash_file, hash_tensor, read_tensor
from ckptkit.io.schedule import Limits, Schedule, Unit, Write
from ckptkit.io.shares import Share, Window, whole
from ckptkit.io.source import Sources
from ckptkit.io.twice import keep_what_is_read_twice
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


class Parts(Protocol):
    """A record of parts of files, where several processes write one file."""

    def part(self, file: int, window: Window, sums: Sequence[Sum]) -> None:
        """Records a part. The engine calls it once these bytes are durable, from any thread.

        Args:
            file: Index among the files of the plan.
            window: The bytes.
            sums: What the checksums of the file need to know of them.
        """


class Stop:
    """The end of a run before it is done: set by whoever sees that it cannot go on, from any thread."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self.error: BaseException | None = None

    def set(self, error: BaseException | None = None) -> None:
        """Has the run end; the first error is the one that it raises."""
        with self._lock:
            if self.error is None:
                self.error = error
        self._event.set()

    def is_set(self) -> bool:
        """Whether the run is to end."""
        return self._event.is_set()


@dataclass(frozen=True, slots=True)
class EngineResult:
    """The outcome of a run.

    Attributes:
        written: Bytes written, counted as they went into files.
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
    share: Share | None = None,
    parts: Parts | None = None,
    stop: Stop | None = None,
) -> EngineResult:
    """Makes the comparisons of a plan, then writes every file under `directory` and makes it durable.

    With a share it does that part of the work alone: a file of which it writes all is finished here, and of other files
    the bytes of the share become durable.

    Args:
        plan: The plan.
        directory: The folder to write into; sub-directories are created.
        threads: Threads that move bytes; by default as `ckptkit.io.cores.moving_threads` has it.
        progress: Called in this thread with the bytes finished since the last call. The sum is `plan.nbytes`, or the
            bytes of the share.
        journal: Names the files that are finished already, and records those that this run finishes.
        hash: Also compute the SHA-256 of every file.
        limits: Sizes of buffers, by default what suits the threads.
        share: The part of the plan to carry out; by default all of it that `journal` does not name.
        parts: Records the parts of files that the share does not write whole.
        stop: Ends the run from outside.

    Raises:
        InputError: A source is gone or ends early, or two tensors that must be equal differ.
        UnsupportedError: A cast that does not exist.
        StorageError: The disk is full or answers with an error.
    """
    plan.check()
    keep_what_is_read_twice(plan)
    started = time.monotonic()
    count = threads or moving_threads()
    tell = progress or (lambda count: None)
    kept, hashes = 0, {}
    if share is None:
        finished = kept_files(plan, directory, journal, hash)
        live = [index for index, file in enumerate(plan.files) if file.path not in finished]
        share = whole(plan, live)
        hashes = {path: sha256 for path, sha256 in finished.items() if sha256 is not None}
        kept = plan.nbytes - share.nbytes
        if kept:
            tell(kept)
    job = _Job(plan, directory, share, journal, parts, stop or Stop(), hash, limits or Limits.of(count))
    job.run(count, tell)
    compared = sum(comparison.left.nbytes for comparison in share.comparisons)
    return EngineResult(job.written, kept, compared, time.monotonic() - started, {**hashes, **job.hashes})


def kept_files(plan: Plan, directory: Path, journal: Journal | None, hash: bool) -> dict[str, str | None]:
    """The files that an earlier run finished and that have their size -> their SHA-256, if asked for.

    Args:
        plan: The plan.
        directory: The folder of the files.
        journal: Names the files that are finished.
        hash: Compute the SHA-256; a file with another one than was recorded is not kept.

    Raises:
        StorageError: A file cannot be read.
    """
    finished = journal.finished() if journal is not None else {}
    kept: dict[str, str | None] = {}
    for file in plan.files:
        if file.path not in finished:
            continue
        try:
            if os.stat(directory / file.path, follow_symlinks=False).st_size != file.size:
                continue
        except OSError:
            continue
        found = hash_file(directory / file.path) if hash else None
        if found is None or finished[file.path] in (None, found):
            kept[file.path] = found
    return kept


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

    def __init__(
        self,
        plan: Plan,
        directory: Path,
        share: Share,
        journal: Journal | None,
        parts: Parts | None,
        stop: Stop,
        hash: bool,
        limits: Limits,
    ) -> None:
        self._journal = journal
        self._parts = parts
        self._hash = hash
        self._limits = limits
        self._comparisons = deque(share.comparisons)
        self._files = plan.files
        self._outputs = {
            index: Output(plan.files[index], directory / plan.files[index].path, hash, window)
            for index, window in sorted(share.windows.items())
        }
        self._stop = stop
        self._lock = threading.Lock()
        self._mailbox: SimpleQueue[int | None] = SimpleQueue()
        self.hashes: dict[str, str] = {}
        self.written = 0

    def run(self, count: int, progress: Callable[[int], None]) -> None:
        """Carries everything out with `count` threads."""
        schedule = Schedule(self._files, self._outputs, self._limits)
        background = _Background(count, self._hash)
        try:
            for index, output in self._outputs.items():
                if not output.spec.size:
                    background.sync.submit(partial(self._guard, partial(self._finish, index)))
            works = [partial(self._work, index, schedule, background) for index in range(count)]
            attend(works, self._mailbox, progress, self._stop.set)
        finally:
            background.close()
            for output in self._outputs.values():
                output.close()
        if self._stop.error is not None:
            raise self._stop.error

    def _work(self, index: int, schedule: Schedule, background: _Background) -> None:
        done, told = 0, 0.0
        try:
            while not self._stop.is_set() and (comparison := self._next_comparison()) is not None:
                compare(comparison, limits=self._limits)
            with Sources() as sources:
                mover = _Mover(self._outputs, sources, self._limits)
                while not self._stop.is_set() and (unit := schedule.next(index)) is not None:
                    done += self._settle(mover.move(unit), background)
                    # Not after every unit: whoever is told takes Python's lock from a thread that moves bytes.
                    if (now := time.monotonic()) - told >= _TELL:
                        self._mailbox.put(done)
                        done, told = 0, now
        except BaseException as error:
            self._stop.set(error)
        finally:
            self._mailbox.put(done)
            self._mailbox.put(None)

    def _next_comparison(self) -> Comparison | None:
        try:
            return self._comparisons.popleft()
        except IndexError:
            return None

    def _settle(self, written: Sequence[tuple[int, int, int]], background: _Background) -> int:
        """Has done what follows the writes of a unit, (file, first byte, end), and gives their bytes."""
        total = 0
        for index, start, stop in written:
            output = self._outputs[index]
            if output.follower is not None and output.follower.written(start, stop):
                background.hash.submit(partial(self._guard, output.follower.advance))
            last, unsent = output.settle(stop - start)
            if last:
                background.sync.submit(partial(self._guard, partial(self._finish, index)))
            elif unsent:
                background.send.submit(partial(self._guard, output.send))
            total += stop - start
        with self._lock:
            self.written += total
        return total

    def _guard(self, work: Callable[[], None]) -> None:
        """Does some work in the background, unless the run has failed."""
        try:
            if not self._stop.is_set():
                work()
        except BaseException as error:
            self._stop.set(error)

    def _finish(self, index: int) -> None:
        """Completes a file, or a part of one, and makes it durable; only then it counts as finished."""
        output = self._outputs[index]
        if not output.whole:
            output.sync()
            if self._parts is not None:
                self._parts.part(index, output.window, output.sums)
            return
        output.complete()
        # Hashed before the sync, because the disk writes in the meantime.
        sha256 = output.follower.finish() if output.follower is not None else None
        output.sync()
        if sha256 is not None:
            self.hashes[output.spec.path] = sha256
        if self._journal is not None:
            self._journal.record(output.spec.path, output.spec.size, sha256)


class _Mover:
    """Moves bytes in one thread, with the buffers of that thread."""

    def __init__(self, outputs: Mapping[int, Output], sources: Sources, limits: Limits) -> None:
        self._outputs = outputs
        self._sources = sources
        self._gatherer = Gatherer(sources, limits.scratch)
        self._staging = np.empty(limits.staging, np.uint8)
        self._kernel_copies = True

    def move(self, unit: Unit) -> list[tuple[int, int, int]]:
        """Reads the pieces of a unit and makes those of its writes that this process makes: (file, first byte, end)."""
        wanted = [index for index, write in enumerate(unit.writes) if self._wants(unit, write)]
        if not wanted:
            return []
        if unit.direct:
            return [self._pass_through(unit)]
        few = len(wanted) < len(unit.writes)  # then each write has one placement: columns that go to several files
        placements = [unit.placements[index] for index in wanted] if few else unit.placements
        self._gatherer.fill(placements, self._staging[: unit.size])
        written = []
        for write in (unit.writes[index] for index in wanted):
            data = self._staging[write.start : write.stop]
            if unit.cast is not None:
                data = convert(data, *unit.cast)
            output = self._outputs[write.file]
            first, last = output.clip(write.offset, write.offset + len(data))
            output.write(data[first - write.offset : last - write.offset], first)
            written.append((write.file, first, last))
        return written

    def _wants(self, unit: Unit, write: Write) -> bool:
        first, last = self._outputs[write.file].clip(write.offset, write.offset + unit.written(write))
        return first < last

    def _pass_through(self, unit: Unit) -> tuple[int, int, int]:
        region, write = unit.placements[0].piece, unit.writes[0]
        assert isinstance(region, Region)
        output, done = self._outputs[write.file], 0
        first, last = output.clip(write.offset, write.offset + unit.size)
        size, start = last - first, region.offset + first - write.offset
        if self._kernel_copies and self._sources.remote(region.file) is None:
            done = output.copy(self._sources.fd(region.file), start, size, first)
            self._kernel_copies = done == size
        while done < size:
            data = self._staging[: size - done]
            self._sources.read(region.file, data.data, start + done)
            output.write(data, first + done)
            done += len(data)
        return write.file, first, last
