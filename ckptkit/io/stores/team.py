"""Many processes write to one store: rank 0 leads, the others upload their parts, and nobody waits for ever.

They say what they have to say in small objects beside the destination, since they may share nothing but the store:

    .NAME.ckptkit-partial/ranks/
        call.json               the run that rank 0 began; the next run has another number
        RUN/RANK/000000.json    what a rank says, an object for each message
        RUN/RANK/pulse          a count, and the bytes that the rank has uploaded

Every rank reads the headers and makes the same plan, which digests show. Rank 0 begins the uploads and says which parts
are to come; which of them are whose follows from that. A file that holds checksums of its own bytes is uploaded by one
rank. Parts of an earlier run's rank that still lives do no harm: under the id of an upload, they are the same bytes.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ckptkit.errors import CkptkitError, InputError, StorageError, UsageError
from ckptkit.io import faults
from ckptkit.io.checksums import Sum
from ckptkit.io.engine import Stop
from ckptkit.io.meeting import Message, hello
from ckptkit.io.plan import Plan
from ckptkit.io.source import Seen, fingerprints
from ckptkit.io.stores.address import Address
from ckptkit.io.stores.client import Bucket
from ckptkit.io.stores.journal import Begun, Sums
from ckptkit.io.stores.parts import Layout, Sizes, count_of, lay_out_parts
from ckptkit.io.stores.uploading import Present, Uploaded, Uploading
from ckptkit.io.team import Moved, is_end, raised, told
from ckptkit.io.world import World

_LARGEST, _MOST = 256 << 20, 1_000_000
_LARGEST_PULSE = 1 << 10
_LEAVING = 15.0  # seconds in which ranks may end after a failure

RANKS = "ranks"

Numbers = Mapping[int, frozenset[int]]
"""Index of a file -> numbers of parts."""


def pause(size: int) -> float:
    """Seconds between two looks at what others say: a look is a request, and so is a sign of life."""
    return max(1.0, 0.05 * size)


@dataclass
class _Rank:
    """Another rank, as far as it was heard.

    Attributes:
        number: Of the rank.
        heard: Messages so far.
        pulse: ETag of its last sign of life.
        since: When that came, by this process's clock.
        beats: Different signs of life so far.
        done: Bytes that it has uploaded.
        left: Whether it has ended.
    """

    number: int
    heard: int = 0
    pulse: str = ""
    since: float = field(default_factory=time.monotonic)
    beats: int = 0
    done: int = 0
    host: str = ""
    left: bool = False

    @property
    def name(self) -> str:
        """For messages."""
        return f"rank {self.number} on {self.host}" if self.host else f"rank {self.number}"


class Meeting:
    """What this rank says, and what others say, in one run."""

    def __init__(self, bucket: Bucket, folder: str, run: str, world: World) -> None:
        self._bucket = bucket
        self._base = f"{folder}/{run}"
        self._world = world
        self._said = self._beats = 0
        self._lock = threading.Lock()
        self.others = {rank: _Rank(rank) for rank in range(world.size) if rank != world.rank}

    def say(self, **message: object) -> None:
        """Adds a message.

        Raises:
            StorageError: The store does not take it.
        """
        with self._lock:
            key = f"{self._base}/{self._world.rank}/{self._said:06}.json"
            self._bucket.put(key, json.dumps(message).encode())
            self._said += 1

    def beat(self, done: int) -> None:
        """Gives a sign of life.

        Args:
            done: Bytes that this rank has uploaded.

        Raises:
            StorageError: The store does not take it.
        """
        self._beats += 1
        self._bucket.put(f"{self._base}/{self._world.rank}/pulse", json.dumps([self._beats, done]).encode())

    def listen(self, ranks: Iterable[int], *, progress: bool = False) -> Iterator[tuple[_Rank, Message]]:
        """What some ranks said since the last call.

        Args:
            ranks: Their numbers.
            progress: Also read how far they are.

        Raises:
            InputError: That is no message of ours.
            StorageError: The store does not answer.
        """
        wanted = set(ranks)
        prefix = f"{self._base}/{next(iter(wanted))}/" if len(wanted) == 1 else f"{self._base}/"
        for stored in self._bucket.objects(prefix, _MOST):
            number, _, name = stored.key.removeprefix(f"{self._base}/").partition("/")
            rank = self.others.get(int(number)) if number.isdecimal() and int(number) in wanted else None
            if rank is None:
                continue
            if name == "pulse" and stored.tag != rank.pulse:
                rank.pulse, rank.since, rank.beats = stored.tag, time.monotonic(), rank.beats + 1
                if progress:
                    rank.done = _done(self._bucket.get(stored.key, _LARGEST_PULSE))
            elif name == f"{rank.heard:06}.json":
                rank.heard += 1
                message = _message(self._bucket.get(stored.key, _LARGEST), self._bucket.url(stored.key))
                rank.host = str(message.get("host", rank.host))
                rank.left = rank.left or "bye" in message
                yield rank, message

    def death(self, rank: _Rank) -> str | None:
        """How it is known that a rank works no more; None if it may."""
        if rank.left:
            return "has ended"
        silent = time.monotonic() - rank.since
        return f"has given no sign of life for {silent:.0f} seconds" if silent > self._world.timeout else None


def call(bucket: Bucket, folder: str, world: World) -> Meeting:
    """Has the ranks of a world come to a new run; what an earlier run left here is removed.

    Raises:
        StorageError: The store does not take it.
    """
    bucket.delete([item.key for item in bucket.objects(f"{folder}/", _MOST)])
    run = os.urandom(8).hex()
    meeting = Meeting(bucket, folder, run, world)
    meeting.say(**hello())
    meeting.beat(0)
    bucket.put(f"{folder}/call.json", json.dumps({"run": run, "launch": world.launch, "size": world.size}).encode())
    return meeting


def called(bucket: Bucket, folder: str, world: World) -> str | None:
    """The run to which rank 0 of this launch calls, alive or dead; None while there is none."""
    data = bucket.get(f"{folder}/call.json", _LARGEST_PULSE)
    try:
        found = json.loads(data) if data is not None else None
    except (ValueError, RecursionError):
        return None
    match found:
        case {"run": str() as run, "launch": world.launch, "size": world.size} if run.isalnum():
            return run
    return None


def shares(plan: Plan, layout: Layout, live: Numbers, size: int) -> list[dict[int, frozenset[int]]]:
    """The parts of each rank; they depend on the arguments alone.

    Parts of files that are filled side by side stay together at each height. Files that hold checksums stay whole.

    Args:
        plan: The plan.
        layout: The parts of its files.
        live: Parts to upload.
        size: How many ranks there are.
    """
    cells: list[tuple[int, dict[int, set[int]]]] = []
    for group in layout.groups:
        files = [index for index in group.files if live.get(index)]
        if any(plan.files[index].checksums for index in files):
            cells += [(len(live[index]) * group.part, {index: set(live[index])}) for index in files]
            continue
        for number in sorted({number for index in files for number in live[index]}):
            cell = {index: {number} for index in files if number in live[index]}
            cells.append((len(cell) * group.part, cell))
    total = max(1, sum(weight for weight, _ in cells))
    found: list[dict[int, set[int]]] = [{} for _ in range(size)]
    done = 0
    for weight, cell in cells:
        mine = found[min((2 * done + weight) * size // (2 * total), size - 1)]
        for index, numbers in cell.items():
            mine.setdefault(index, set()).update(numbers)
        done += weight
    return [{index: frozenset(numbers) for index, numbers in one.items()} for one in found]


class PartSink:
    """Uploads parts and remembers their ETags; any thread may call.

    Attributes:
        tags: Index of a file -> number of a part -> its ETag.
    """

    def __init__(
        self, bucket: Bucket, plan: Plan, address: Address, partial: str, uploads: Mapping[int, Begun]
    ) -> None:
        self._bucket, self._plan, self._address = bucket, plan, address
        self._uploads = uploads
        self._sums = {index: Sums(bucket, partial, index) for index in uploads}
        self.tags: dict[int, dict[int, str]] = {index: {} for index in uploads}
        self.check: Callable[[], None] = lambda: None

    def part(self, file: int, number: int, data: bytearray, sums: Sequence[Sum]) -> None:
        """As of `ckptkit.io.stores.uploading.Sink`."""
        self.check()
        spec = self._plan.files[file]
        tag = self._bucket.part(self._address.key(spec.path), self._uploads[file].upload, number, data)
        if spec.checksums:
            self._sums[file].add(number, sums)
        self.tags[file][number] = tag


def numbers_of(plan: Plan, begun: Begun, index: int) -> frozenset[int]:
    """All parts of a file."""
    return frozenset(range(1, count_of(plan.files[index].size, begun.part) + 1))


def upload_share(
    plan: Plan,
    layout: Layout,
    sink: Any,
    mine: Numbers,
    uploads: Mapping[int, Begun],
    present: Mapping[int, Present],
    *,
    held: Sequence[int],
    world: World,
    threads: int | None,
    stop: Stop,
    count: Callable[[int], None],
) -> Uploaded:
    """Uploads the parts of one rank; errors as `Uploading.run`."""
    rest = {
        index: Present(
            numbers_of(plan, uploads[index], index) - numbers, present[index].sums if index in present else ()
        )
        for index, numbers in mine.items()
    }
    work = Uploading(
        plan,
        layout,
        sink,
        chosen=[*held, *mine],
        present=rest,
        comparisons=plan.comparisons[world.rank :: world.size],
        threads=threads,
        stop=stop,
    )
    return work.run(count)


class Leader:
    """Rank 0 among others: it calls them, hears what they did, and ends the run for all."""

    def __init__(self, bucket: Bucket, folder: str, world: World, terms: Message, stop: Stop) -> None:
        self._bucket, self._folder, self._world, self._terms, self._stop = bucket, folder, world, terms, stop
        self._meeting: Meeting | None = None
        self._over, self._complete = threading.Event(), threading.Event()
        self._watch: threading.Thread | None = None
        self._waiting = set(range(1, world.size))
        self._done = 0
        self.moved: list[Moved] = []
        self.tags: dict[int, dict[int, str]] = {}
        self._count: Callable[[int], None] = lambda size: None

    def gather(self) -> None:
        """Calls the ranks and waits until every one has come.

        Raises:
            UsageError: A rank has another plan.
            StorageError: A rank does not come.
        """
        self._meeting = meeting = call(self._bucket, self._folder, self._world)
        deadline = time.monotonic() + self._world.arrival
        missing = set(self._waiting)
        while missing:
            meeting.beat(0)
            for rank, message in meeting.listen(missing):
                self._check_failed(rank.name, message)
                if "terms" in message:
                    if message["terms"] != self._terms:
                        hint = "do all ranks see the same sources, under the same path, and run the same command?"
                        raise UsageError(f"{rank.name} has another plan than rank 0", where=self._folder, hint=hint)
                    missing.discard(rank.number)
            if missing and time.monotonic() > deadline:
                ranks = ", ".join(map(str, sorted(missing)[:8]))
                what = f"rank {ranks} of {self._world.size} did not come within {self._world.arrival:.0f} seconds"
                hint = "see what it says; a process that is alone: unset RANK and WORLD_SIZE"
                raise StorageError(what, where=self._bucket.url(self._folder), hint=hint)
            if missing:
                time.sleep(pause(1))

    def start(
        self,
        uploads: Mapping[int, Begun],
        live: Numbers,
        present: Mapping[int, Present],
        count: Callable[[int], None],
    ) -> None:
        """Has all ranks begin.

        Args:
            uploads: The uploads, by file.
            live: Parts to upload.
            present: What is known of the other parts.
            count: Called with the bytes that other ranks have uploaded since the last call, from a thread.
        """
        assert self._meeting is not None
        self._count = count
        self._meeting.say(
            start={
                "uploads": {str(index): [begun.upload, begun.part] for index, begun in uploads.items()},
                "live": {str(index): sorted(numbers) for index, numbers in live.items()},
                "sums": {str(index): [list(item) for item in found.sums] for index, found in present.items()},
            }
        )
        self._watch = threading.Thread(target=self._attend, name="ckptkit-ranks", daemon=True)
        self._watch.start()

    def wait(self) -> None:
        """Waits until all ranks have uploaded their parts.

        Raises:
            CkptkitError: What a rank raised; or it has died.
        """
        while not self._complete.wait(0.2):
            if self._stop.error is not None:
                raise self._stop.error
        if self._stop.error is not None:
            raise self._stop.error

    def end(self, error: BaseException | None) -> None:
        """Ends the run for all, and waits until they have heard it."""
        self._over.set()
        if self._watch is not None:
            self._watch.join()
        if (meeting := self._meeting) is None:
            return
        with suppress(CkptkitError):
            meeting.say(end=told(error) if error is not None else {})
            deadline = time.monotonic() + (_LEAVING if error is not None else self._world.timeout)
            while time.monotonic() < deadline:
                living = [rank.number for rank in meeting.others.values() if meeting.death(rank) is None]
                if not living:
                    break
                for _ in meeting.listen(living):
                    pass
                time.sleep(0.2)

    def _attend(self) -> None:
        meeting = self._meeting
        assert meeting is not None
        while not self._over.wait(pause(self._world.size)):
            try:
                meeting.beat(0)
                for rank, message in meeting.listen(meeting.others, progress=True):
                    self._check_failed(rank.name, message)
                    self._take_in(rank, message)
                for number in sorted(self._waiting):
                    if (death := meeting.death(meeting.others[number])) is not None:
                        hint = "run again with --resume"
                        raise StorageError(f"{meeting.others[number].name} {death}", where=self._folder, hint=hint)
                done = sum(rank.done for rank in meeting.others.values())
                self._count(done - self._done)
                self._done = done
                if not self._waiting:
                    self._complete.set()
            except BaseException as error:
                self._stop.set(error)
                return

    def _take_in(self, rank: _Rank, message: Message) -> None:
        if "done" not in message:
            return
        try:
            tags = {int(index): {int(n): str(tag) for n, tag in one.items()} for index, one in message["done"].items()}
            moved = Moved(rank.number, rank.host, int(message["bytes"]), float(message["seconds"]))
        except (AttributeError, KeyError, TypeError, ValueError):
            raise InputError(f"not what rank {rank.number} says", where=self._bucket.url(self._folder)) from None
        for index, found in tags.items():
            self.tags.setdefault(index, {}).update(found)
        self.moved.append(moved)
        self._waiting.discard(rank.number)

    def _check_failed(self, name: str, message: Message) -> None:
        if isinstance(failed := message.get("failed"), dict):
            raise raised(failed, name)


def terms_of(digest: str, layout: Layout, hash: bool) -> Message:
    """What must be equal on all ranks."""
    return {"plan": digest, "parts": [group.part for group in layout.groups], "hash": hash}


def take_part(
    address: Address,
    plan: Plan,
    world: World,
    *,
    seen: Iterable[Seen],
    threads: int | None,
    hash: bool,
    sizes: Sizes | None = None,
) -> None:
    """Does the share of a rank after the first, and waits for the end.

    Args:
        address: The destination.
        plan: The same plan.
        world: This rank.
        seen: Fingerprints of the sources from before they were read.
        threads: As for `StoreDestination.write`.
        hash: As rank 0 has it.
        sizes: Sizes of parts, by default those of the environment.

    Raises:
        CkptkitError: What any rank raised, or rank 0 does not come or has died.
    """
    plan.check()
    layout = lay_out_parts(plan.files, sizes or Sizes.of_environment())
    sources = plan.sources()
    for one in seen:
        one.check(sources)
    terms = terms_of(plan.digest(fingerprints(sources)), layout, hash)
    folder = f"{address.beside('ckptkit-partial')}/{RANKS}"
    _Follower(Bucket(address), address, folder, world).run(plan, layout, terms, threads)


class _Follower:
    """A rank after the first."""

    def __init__(self, bucket: Bucket, address: Address, folder: str, world: World) -> None:
        self._bucket, self._address, self._folder, self._world = bucket, address, folder, world
        self._stop = Stop()
        self._bucket.stopped = self._stop.is_set
        self._done = 0
        self._over, self._ended = threading.Event(), threading.Event()

    def run(self, plan: Plan, layout: Layout, terms: Message, threads: int | None) -> None:
        """Comes, uploads its parts, and waits for the end."""
        meeting = self._meet()
        watch: threading.Thread | None = None
        try:
            meeting.say(**hello(), terms=terms)
            start = self._started(meeting)
            watch = threading.Thread(target=self._attend, args=[meeting], name="ckptkit-ranks", daemon=True)
            watch.start()
            uploads, live, present = _read_start(start, plan, self._bucket.url(self._folder))
            mine = shares(plan, layout, live, self._world.size)[self._world.rank]
            faults.step("share")
            sink = PartSink(self._bucket, plan, self._address, self._folder.rpartition("/")[0], uploads)
            done = upload_share(
                plan,
                layout,
                sink,
                mine,
                uploads,
                present,
                held=(),
                world=self._world,
                threads=threads,
                stop=self._stop,
                count=self._count,
            )
            tags = {
                str(index): {str(n): tag for n, tag in found.items()} for index, found in sink.tags.items() if found
            }
            meeting.say(done=tags, bytes=done.written, seconds=done.seconds)
            while not self._ended.wait(0.2):
                if self._stop.error is not None:
                    raise self._stop.error
        except BaseException as error:
            self._bucket.stopped = threading.Event().is_set
            with suppress(CkptkitError):
                if not (isinstance(error, CkptkitError) and error.told):
                    meeting.say(failed=told(error))
            if isinstance(error, CkptkitError):
                error.told = True
            raise
        finally:
            self._over.set()
            if watch is not None:
                watch.join()
            with suppress(CkptkitError):
                meeting.say(bye=True)

    def _count(self, size: int) -> None:
        self._done += size

    def _meet(self) -> Meeting:
        """Waits for the call of a rank 0 that lives: an earlier run may have left its call."""
        deadline = time.monotonic() + self._world.arrival
        known: dict[str, tuple[Meeting, list[Message]]] = {}
        while time.monotonic() < deadline:
            if (run := called(self._bucket, self._folder, self._world)) is not None:
                if run not in known:
                    known[run] = Meeting(self._bucket, self._folder, run, self._world), []
                meeting, said = known[run]
                said += [message for _, message in meeting.listen([0])]
                if meeting.others[0].beats > 1:  # it changed while this rank looked
                    for message in said:
                        self._check_end(message)
                    return meeting
            time.sleep(pause(1))
        what = f"rank 0 did not come within {self._world.arrival:.0f} seconds"
        raise StorageError(what, where=self._address, hint="see what it says; all ranks need one command line")

    def _started(self, meeting: Meeting) -> Message:
        while True:
            meeting.beat(0)
            for _, message in meeting.listen([0]):
                self._check_end(message)
                if isinstance(start := message.get("start"), dict):
                    return start
            self._check_alive(meeting)
            time.sleep(pause(1))

    def _attend(self, meeting: Meeting) -> None:
        while not self._over.wait(pause(self._world.size)):
            try:
                meeting.beat(self._done)
                for _, message in meeting.listen([0]):
                    self._check_end(message)
                if not self._ended.is_set():
                    self._check_alive(meeting)
            except BaseException as error:
                self._stop.set(error)
                return

    def _check_alive(self, meeting: Meeting) -> None:
        if (death := meeting.death(meeting.others[0])) is not None:
            hint = "run again with --resume"
            raise StorageError(f"{meeting.others[0].name} {death}", where=self._address, hint=hint)

    def _check_end(self, message: Message) -> None:
        if is_end(message):
            self._ended.set()


def _read_start(
    start: Message, plan: Plan, where: str
) -> tuple[dict[int, Begun], dict[int, frozenset[int]], dict[int, Present]]:
    """What rank 0 says at the start: uploads, parts to come, and sums of parts that are there."""
    try:
        uploads = {int(key): Begun(str(upload), int(part)) for key, (upload, part) in start["uploads"].items()}
        live = {int(key): frozenset(map(int, numbers)) for key, numbers in start["live"].items()}
        sums = {int(key): [Sum(*map(int, item)) for item in found] for key, found in start["sums"].items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError("not what rank 0 says", where=where) from None
    known = set(range(len(plan.files)))
    if not (uploads.keys() <= known and live.keys() <= uploads.keys() and sums.keys() <= uploads.keys()):
        raise InputError("not what rank 0 says", where=where)
    if any(
        begun.part < 1 or not live.get(i, frozenset()) <= numbers_of(plan, begun, i) for i, begun in uploads.items()
    ):
        raise InputError("not what rank 0 says", where=where)
    return uploads, live, {index: Present(sums=found) for index, found in sums.items()}


def _message(data: bytes | None, where: str) -> Message:
    try:
        found = json.loads(data or b"")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InputError("not what a rank says", where=where, hint="does another program write there?")
    return found


def _done(data: bytes | None) -> int:
    try:
        match json.loads(data or b""):
            case [int(), int() as done] if done >= 0:
                return done
    except (ValueError, RecursionError):
        pass
    return 0
