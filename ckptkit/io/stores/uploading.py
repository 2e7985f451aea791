"""Fills the parts of files in memory and uploads each when it is whole.

Units of work are handed out in the order of `ckptkit.io.schedule.in_order`. Whoever takes one has the memory for its
parts before the next is handed out. A part that is not whole therefore waits only for units that were handed out
before, or for the ones that come next, and memory for these is kept free (`ckptkit.io.stores.parts`). So the run cannot
stand still, however little memory there is.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from queue import SimpleQueue
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ckptkit.io.casts import convert
from ckptkit.io.checksums import Checksums, Sum
from ckptkit.io.cores import moving_threads
from ckptkit.io.crew import Crew, attend
from ckptkit.io.engine import Stop
from ckptkit.io.gather import Gatherer
from ckptkit.io.plan import Comparison, OutputFile, Plan
from ckptkit.io.reading import compare
from ckptkit.io.schedule import Limits, Unit, Write, in_order
from ckptkit.io.source import Sources
from ckptkit.io.stores.parts import SMALLEST, Layout
from ckptkit.io.system import give_back
from ckptkit.io.twice import keep_what_is_read_twice

_LARGE = 1 << 30
UPLOADS = 8
"""Parts on their way at a time."""


class Sink(Protocol):
    """Where whole parts go. Any thread calls."""

    def part(self, file: int, number: int, data: bytearray, sums: Sequence[Sum]) -> None:
        """Takes a part of a file; returns once it is durable.

        Args:
            file: Index among the files of the plan.
            number: Of the part, from 1.
            data: Its bytes, which change after the call.
            sums: What the checksums of the file need to know of them.
        """


@dataclass(frozen=True)
class Present:
    """Parts of a file that an earlier run uploaded.

    Attributes:
        numbers: Their numbers.
        sums: What the checksums of the file need to know of them.
    """

    numbers: frozenset[int] = frozenset()
    sums: Sequence[Sum] = ()


@dataclass(frozen=True)
class Uploaded:
    """The outcome of a run.

    Attributes:
        held: Index of a file -> its bytes, for the files that have no parts.
        written: Bytes that were uploaded.
        seconds: Time of the run.
    """

    held: Mapping[int, bytearray]
    written: int
    seconds: float


class Memory:
    """Buffers for parts, of a bounded number of bytes in all. Buffers are used again.

    Whoever will give a buffer back, or has others do so, says that with `begin` and `end`. Where nobody does, waiting
    would be for ever, and the limit gives way.

    Attributes:
        most: Bytes that there were at the most.
    """

    def __init__(self, limit: int, stop: Stop) -> None:
        self._limit = limit
        self._stop = stop
        self._used = 0
        self._busy = 0
        self.most = 0
        self._free: list[bytearray] = []
        self._change = threading.Condition()

    def take(self, size: int) -> bytearray:
        """A buffer; waits until there is room for one.

        Raises:
            _EndedError: The run has ended meanwhile.
        """
        with self._change:
            while True:
                if self._stop.is_set():
                    raise _EndedError
                if (buffer := self._taken(size)) is not None:
                    return buffer
                self._change.wait(0.5)

    def begin(self) -> None:
        """Somebody begins what may set a buffer free."""
        with self._change:
            self._busy += 1

    def end(self) -> None:
        """Somebody has done it."""
        with self._change:
            self._busy -= 1
            self._change.notify_all()

    def give(self, buffer: bytearray) -> None:
        """Gives a buffer back."""
        with self._change:
            self._free.append(buffer)
            self._change.notify_all()

    def _taken(self, size: int) -> bytearray | None:
        for number, buffer in enumerate(self._free):
            if len(buffer) == size:
                return self._free.pop(number)
        while self._free and self._used + size > self._limit:
            self._used -= len(self._free.pop())
        if self._used + size > self._limit and self._busy:
            return None
        self._used += size
        self.most = max(self.most, self._used)
        return bytearray(size)


class _EndedError(Exception):
    """The run has ended, so this thread ends."""


@dataclass
class _Part:
    """A part that is being filled.

    Attributes:
        number: From 1; 0 is a file that has no parts.
        start: Its first byte in the file.
        data: Its bytes.
        missing: Bytes that are not there yet.
        waits: Checksums that are not known yet, and that it holds.
        sums: What the checksums of the file need to know of it, once its bytes are there.
    """

    number: int
    start: int
    data: bytearray
    missing: int
    waits: set[int]
    sums: Sequence[Sum] | None = None
    array: NDArray[np.uint8] = field(init=False)

    def __post_init__(self) -> None:
        self.array = np.frombuffer(self.data, np.uint8)

    @property
    def stop(self) -> int:
        """The byte of the file after its last."""
        return self.start + len(self.data)


class _File:
    """A file whose parts are being filled. Whoever calls holds the lock of the run."""

    def __init__(self, spec: OutputFile, size: int, present: Present) -> None:
        self.spec = spec
        self.size = size
        self.present = present.numbers
        self.parts: dict[int, _Part] = {}
        self.checksums = Checksums(spec.checksums)
        self._left = [checksum.stop - checksum.start for checksum in spec.checksums]
        self.values: dict[int, bytes] = {}
        self._places = sorted((at, number) for number, item in enumerate(spec.checksums) for at in item.at)
        self._note(present.sums)
        self._settle(number for number, left in enumerate(self._left) if not left)

    def numbers(self, start: int, stop: int) -> range:
        """The parts in which bytes `start:stop` lie."""
        return range(start // self.size + 1, (stop - 1) // self.size + 2) if stop > start else range(0)

    def span(self, number: int) -> tuple[int, int]:
        """First byte and end of a part."""
        return (number - 1) * self.size, min(number * self.size, self.spec.size)

    def open(self, number: int, data: bytearray) -> None:
        """Begins to fill a part."""
        start, _ = self.span(number)
        waits = {item for _, item in self._within(start, start + len(data))} - self.values.keys()
        self.parts[number] = _Part(number, start, data, len(data), waits)

    def sums_of(self, part: _Part) -> list[Sum]:
        """The checksums of a part whose bytes are all there, as far as they are known."""
        sums = Checksums(self.spec.checksums)
        sums.add(part.array.data, part.start)
        return sums.parts()

    def whole(self, part: _Part, sums: Sequence[Sum]) -> list[_Part]:
        """Notes that all bytes of a part are there, and gives the parts that are ready now."""
        part.sums = sums
        fresh = self._note(sums)
        for other in self.parts.values():
            other.waits.difference_update(fresh)
        ready = [other for other in self.parts.values() if other.sums is not None and not other.waits]
        for other in ready:
            self._fill_in(other)
            del self.parts[other.number]
        return ready

    def _note(self, sums: Iterable[Sum]) -> list[int]:
        known = list(sums)
        self.checksums.join(known)
        fresh = []
        for item in known:
            self._left[item.number] -= item.size
            if not self._left[item.number]:
                fresh.append(item.number)
        self._settle(fresh)
        return fresh

    def _settle(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self.values[number] = self.checksums.value(number)

    def _within(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """(place, checksum) of the checksums that some of the bytes `start:stop` hold."""
        for at, number in self._places[bisect_left(self._places, (start - 3, 0)) :]:
            if at >= stop:
                break
            yield at, number

    def _fill_in(self, part: _Part) -> None:
        for at, number in self._within(part.start, part.stop):
            first, last = max(at, part.start), min(at + 4, part.stop)
            part.data[first - part.start : last - part.start] = self.values[number][first - at : last - at]


class Uploading:
    """One run: it carries out a plan, as far as parts are not present."""

    def __init__(
        self,
        plan: Plan,
        layout: Layout,
        sink: Sink,
        *,
        chosen: Iterable[int],
        present: Mapping[int, Present],
        comparisons: Sequence[Comparison],
        threads: int | None,
        stop: Stop,
    ) -> None:
        """Prepares a run.

        Args:
            plan: The plan.
            layout: The parts of its files.
            sink: Takes whole parts.
            chosen: Indices of the files to write.
            present: Index of a file -> its parts that need not be uploaded.
            comparisons: The comparisons to make before.
            threads: Threads that move bytes; None for as many as the engine takes.
            stop: Ends the run from outside.
        """
        keep_what_is_read_twice(plan)
        self._plan = plan
        self._sink = sink
        self._stop = stop
        self._count = threads or moving_threads()
        self._limits = _limits(self._count, min((group.part for group in layout.groups), default=_LARGE))
        wanted = set(chosen)
        self._groups = [
            *[(index,) for index in layout.held if index in wanted],
            *[live for group in layout.groups if (live := tuple([one for one in group.files if one in wanted]))],
        ]
        sizes = {index: group.part for group in layout.groups for index in group.files}
        self._held = {index for index in layout.held if index in wanted}
        self._files = {
            index: _File(
                plan.files[index], sizes.get(index, max(plan.files[index].size, 1)), present.get(index, Present())
            )
            for index in sorted(wanted)
        }
        self._units = self._all_units()
        self._comparisons = deque(comparisons)
        self.memory = Memory(layout.memory, stop)
        self._order = threading.Lock()
        self._lock = threading.Lock()
        self._mailbox: SimpleQueue[int | None] = SimpleQueue()
        self._written = 0
        self._kept: dict[int, bytearray] = {index: bytearray() for index in self._held}
        self._crew: Crew | None = None

    def run(self, progress: Callable[[int], None]) -> Uploaded:
        """Carries it out.

        Args:
            progress: Called in this thread with the bytes that were uploaded since the last call.

        Raises:
            InputError: A source is gone or ends early, or two tensors that must be equal differ.
            StorageError: The store does not take a part.
        """
        started = time.monotonic()
        give_back(SMALLEST)
        self._crew = Crew(UPLOADS, "ckptkit-upload")
        try:
            attend([self._work] * self._count, self._mailbox, progress, self._stop.set)
        finally:
            self._crew.close()
        if self._stop.error is not None:
            raise self._stop.error
        while not self._mailbox.empty():
            progress(self._mailbox.get() or 0)
        return Uploaded(self._kept, self._written, time.monotonic() - started)

    def _all_units(self) -> Iterator[Unit]:
        for group in self._groups:
            yield from in_order(self._plan.files, group, self._limits)

    def _work(self) -> None:
        try:
            while not self._stop.is_set() and (comparison := self._next_comparison()) is not None:
                compare(comparison, limits=self._limits)
            with Sources() as sources:
                mover = _Mover(self._files, sources, self._limits)
                while not self._stop.is_set() and (unit := self._next()) is not None:
                    try:
                        for index, part, size in mover.move(unit):
                            self._settle(index, part, size)
                    finally:
                        self.memory.end()
        except _EndedError:
            pass
        except BaseException as error:
            self._stop.set(error)
        finally:
            self._mailbox.put(None)

    def _next_comparison(self) -> Comparison | None:
        try:
            return self._comparisons.popleft()
        except IndexError:
            return None

    def _next(self) -> Unit | None:
        """The next unit of which bytes are wanted. Its parts have their memory."""
        with self._order:
            for unit in self._units:
                if self._open(unit):
                    self.memory.begin()
                    return unit
            return None

    def _open(self, unit: Unit) -> bool:
        wanted = False
        for write in unit.writes:
            file = self._files[write.file]
            for number in file.numbers(write.offset, write.offset + unit.written(write)):
                if number in file.present:
                    continue
                wanted = True
                if number in file.parts:
                    continue
                start, stop = file.span(number)
                held = write.file in self._held
                data = bytearray(stop - start) if held else self.memory.take(stop - start)
                with self._lock:
                    file.open(number, data)
        return wanted

    def _settle(self, index: int, part: _Part, size: int) -> None:
        """Counts bytes of a part as there. With the last of them, parts may be ready."""
        file = self._files[index]
        with self._lock:
            part.missing -= size
            last = not part.missing
        if not last:
            return
        sums = file.sums_of(part) if file.spec.checksums else ()
        with self._lock:
            ready = file.whole(part, sums)
        assert self._crew is not None
        for one in ready:
            if index in self._held:
                self._kept[index] = one.data
                self._mailbox.put(len(one.data))
            else:
                self.memory.begin()
                self._crew.submit(partial(self._upload, index, one))

    def _upload(self, index: int, part: _Part) -> None:
        try:
            if not self._stop.is_set():
                self._sink.part(index, part.number, part.data, part.sums or ())
                size = len(part.data)
                del part.array
                self.memory.give(part.data)
                with self._lock:
                    self._written += size
                self._mailbox.put(size)
        except BaseException as error:
            self._stop.set(error)
        finally:
            self.memory.end()


def _limits(count: int, part: int) -> Limits:
    """Sizes of buffers: a unit of work is at most as large as a part, so that it lies in two of them or in one."""
    usual = Limits.of(count)
    return replace(usual, staging=min(usual.staging, part & -8), casting=min(usual.casting, part & -8))


class _Mover:
    """Moves bytes in one thread, with the buffers of that thread."""

    def __init__(self, files: Mapping[int, _File], sources: Sources, limits: Limits) -> None:
        self._files = files
        self._gatherer = Gatherer(sources, limits.scratch)
        self._staging = np.empty(limits.staging, np.uint8)

    def move(self, unit: Unit) -> list[tuple[int, _Part, int]]:
        """Brings the bytes of a unit into their parts: (file, part, bytes)."""
        if (found := self._straight(unit)) is not None:
            return [found]
        self._gatherer.fill(unit.placements, self._staging[: unit.size])
        return [item for write in unit.writes for item in self._spread(unit, write)]

    def _straight(self, unit: Unit) -> tuple[int, _Part, int] | None:
        """Gathers a unit where its bytes belong, if they all belong to one part."""
        if unit.cast is not None or len(unit.writes) > 1:
            return None
        write = unit.writes[0]
        file = self._files[write.file]
        numbers = file.numbers(write.offset, write.offset + unit.size)
        if len(numbers) > 1:
            return None
        part = file.parts[numbers[0]]
        first = write.offset - part.start
        self._gatherer.fill(unit.placements, part.array[first : first + unit.size])
        return write.file, part, unit.size

    def _spread(self, unit: Unit, write: Write) -> Iterator[tuple[int, _Part, int]]:
        data = self._staging[write.start : write.stop]
        if unit.cast is not None:
            data = convert(data, *unit.cast)
        file = self._files[write.file]
        for number in file.numbers(write.offset, write.offset + len(data)):
            if number in file.present:
                continue
            part = file.parts[number]
            first, last = max(write.offset, part.start), min(write.offset + len(data), part.stop)
            part.array[first - part.start : last - part.start] = data[first - write.offset : last - write.offset]
            yield write.file, part, last - first
