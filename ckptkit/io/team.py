"""Carries out a plan with all processes of a world: rank 0 leads, others do their shares, and nobody waits for ever.

Every rank reads the headers and makes the same plan, which digests show. Rank 0 says which files are to be written. The
shares follow from that. A rank makes its bytes durable before it says so. Of a file that several ranks write, rank 0
joins what they know of its checksums, and has each write those that lie in its own bytes. Only then the file goes into
the journal.

One process alone is a world of one: it has the only share, and nobody to wait for.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ckptkit.errors import CkptkitError, InputError, StorageError, UnsupportedError, UsageError
from ckptkit.io.checksums import Checksums, Sum
from ckptkit.io.crew import Crew
from ckptkit.io.engine import EngineResult, Stop, kept_files, run
from ckptkit.io.journal import FileJournal
from ckptkit.io.meeting import Ear, Message, Voice, call, called, clear, hello, pause
from ckptkit.io.output import Output, create
from ckptkit.io.plan import Plan
from ckptkit.io.reading import hash_file
from ckptkit.io.shares import Share, Window, shares
from ckptkit.io.world import World

Progress = Callable[[int], None]

_ERRORS = {kind.exit_code: kind for kind in (UsageError, InputError, UnsupportedError, StorageError, CkptkitError)}
_INTERRUPTED = 128  # exit codes of signals are above
_LEAVING = 10.0  # seconds in which ranks may end after a failure


@dataclass(frozen=True, slots=True)
class Moved:
    """What one rank did.

    Attributes:
        rank: Its number.
        host: Its machine.
        bytes_written: Bytes that it wrote, as its engine counted them.
        seconds: The time of its share.
    """

    rank: int
    host: str
    bytes_written: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What all ranks did.

    Attributes:
        hashes: SHA-256 by output path, if asked for.
        ranks: One record for each rank.
    """

    hashes: dict[str, str] = field(default_factory=dict)
    ranks: list[Moved] = field(default_factory=list)


@dataclass(frozen=True)
class Work:
    """What is to be done, the same for all ranks.

    Attributes:
        plan: The plan.
        directory: Where the files are written.
        digest: `Plan.digest`; empty if the files are there already.
        threads: As for `ckptkit.io.engine.run`.
        hash: Also compute the SHA-256 of every file.
    """

    plan: Plan
    directory: Path
    digest: str
    threads: int | None = None
    hash: bool = False

    @property
    def terms(self) -> Message:
        """What must be equal on all ranks."""
        return {"plan": self.digest, "hash": self.hash}


class Alone:
    """A world of one process."""

    def __init__(self, work: Work, progress: Progress) -> None:
        self._work = work
        self._progress = progress

    def __enter__(self) -> Alone:
        return self

    def __exit__(self, *_: object) -> None:
        """Nobody else needs to know."""

    def run(self, journal: FileJournal) -> Outcome:
        """Carries the plan out; errors as `ckptkit.io.engine.run`."""
        work = self._work
        done = run(
            work.plan, work.directory, threads=work.threads, progress=self._progress, journal=journal, hash=work.hash
        )
        return Outcome(dict(sorted(done.hashes.items())), [Moved(0, str(hello()["host"]), done.written, done.seconds)])

    def end(self) -> None:
        """Nobody else needs to know."""


class _Rank:
    """What leading and following have in common: a voice, a pulse, and work that others ask for."""

    def __init__(self, world: World, folder: Path, work: Work, progress: Progress) -> None:
        self._world, self._folder, self._work, self._progress = world, folder, work, progress
        self._stop = Stop()
        self._voice: Voice | None = None
        self._share = Share({})
        self._moved = 0
        self._helper = Crew(1, "ckptkit-duties")
        self._over = threading.Event()
        self._watch: threading.Thread | None = None

    @property
    def voice(self) -> Voice:
        """The voice of this rank; it exists once the rank has its place."""
        if self._voice is None:
            raise RuntimeError("this rank has no voice yet")
        return self._voice

    def _attend(self, look: Callable[[], None]) -> None:
        """Gives signs of life and calls `look`, in a thread, until all is over. An error ends the run."""

        def attend() -> None:
            while not self._over.wait(pause(self._world.size)):
                try:
                    self.voice.beat(self._moved)
                    look()
                except BaseException as error:
                    self._stop.set(error)
                    if not isinstance(error, CkptkitError):
                        return

        self._watch = threading.Thread(target=attend, name="ckptkit-ranks", daemon=True)
        self._watch.start()

    def _count(self, size: int) -> None:
        self._moved += size

    def _engine(self, journal: object) -> EngineResult:
        work = self._work
        return run(
            work.plan,
            work.directory,
            threads=work.threads,
            progress=self._count,
            journal=journal,  # type: ignore[arg-type]  # both kinds of rank are a journal
            parts=journal,  # type: ignore[arg-type]
            hash=work.hash,
            share=self._share,
            stop=self._stop,
        )

    def _duty(self, message: Message, answer: Callable[[Message], None]) -> None:
        """Does what rank 0 asks for, in the background: checksums of a file, or its hash."""

        def do() -> None:
            try:
                if not self._stop.is_set():
                    answer(self._done(message))
            except BaseException as error:
                self._stop.set(error)

        self._helper.submit(do)

    def _done(self, message: Message) -> Message:
        match message:
            case {"fill_in": int() as index, "values": [*values]}:
                file = self._work.plan.files[index]
                output = Output(file, self._work.directory / file.path, window=self._share.windows[index])
                try:
                    output.fill_in([bytes.fromhex(value) for value in values])
                    output.sync()
                finally:
                    output.close()
                return {"filled_in": index}
            case {"hash": int() as index}:
                return {"hashed": index, "sha256": hash_file(self._work.directory / self._work.plan.files[index].path)}
        raise InputError("not what rank 0 says", where=self._folder)

    def _close(self) -> None:
        self._over.set()
        if self._watch is not None:
            self._watch.join()
        self._helper.close()
        if self._voice is not None:
            self._voice.close()


@dataclass
class _Joint:
    """A file that several ranks write.

    Attributes:
        checksums: What is known of them.
        waiting: The ranks whose bytes, or whose checksums, are not durable yet.
        filled: Whether the checksums are being written.
    """

    checksums: Checksums
    waiting: set[int]
    filled: bool = False


class Leader(_Rank):
    """Rank 0: it calls the others, joins what they did, and ends the run for all."""

    def __init__(self, world: World, folder: Path, work: Work, progress: Progress) -> None:
        super().__init__(world, folder, work, progress)
        self._run = os.urandom(8).hex()
        self._ears = [Ear(folder, self._run, rank, world.timeout) for rank in range(1, world.size)]
        self._shares: Sequence[Share] = ()
        self._joint: dict[int, _Joint] = {}
        self._lock = threading.RLock()
        self._journal: FileJournal | None = None
        self._left: set[str] = set()
        self._results: dict[int, Moved] = {}
        self._hashes: dict[str, str] = {}
        self._told = 0
        self._started = False
        self._complete = threading.Event()

    def __enter__(self) -> Leader:
        """Calls the ranks together.

        Raises:
            UsageError: A rank has another plan, or one of an earlier run still lives.
            StorageError: A rank does not come.
        """
        try:
            clear(self._folder)
            self._folder.mkdir(parents=True)
            self._voice = Voice(self._folder, self._run, 0)
            self.voice.say(**hello())
            self.voice.beat(0)
            call(self._folder, self._world, self._run)
            self._gather()
            self._attend(self._look)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """After an error: tells the ranks, and waits until they have ended."""
        if error is not None and self._voice is not None:
            try:
                self.voice.say(end=told(error))
                self._see_off(_LEAVING)
            except CkptkitError:
                pass  # the first error is the one to report
        self._close()

    def run(self, journal: FileJournal) -> Outcome:
        """Carries the plan out with all ranks.

        Raises:
            CkptkitError: As `ckptkit.io.engine.run`, on whatever rank; or a rank has died.
        """
        work = self._work
        kept = kept_files(work.plan, work.directory, journal, work.hash)
        live = [index for index, file in enumerate(work.plan.files) if file.path not in kept]
        self._hashes.update({path: sha256 for path, sha256 in kept.items() if sha256 is not None})
        self._journal = journal
        self._shares = shares(work.plan, live, self._world.size)
        self._share = self._shares[0]
        self._left = {work.plan.files[index].path for index in live}
        self._progress(work.plan.nbytes - self._to_move)
        self._join_files()
        self.voice.say(start={"live": live})
        self._started = True
        done = self._engine(self)
        with self._lock:
            self._results[0] = Moved(0, str(hello()["host"]), done.written, done.seconds)
            self._hashes.update(done.hashes)
            self._check_complete()
        while not self._complete.wait(pause(1)):
            if self._stop.error is not None:
                raise self._stop.error
        if self._stop.error is not None:
            raise self._stop.error
        self._tell()
        return Outcome(dict(sorted(self._hashes.items())), [self._results[rank] for rank in sorted(self._results)])

    def end(self) -> None:
        """Tells the ranks that the output is in place, and waits until they have heard it."""
        if not self._started:
            self.voice.say(start={"live": None})
        self.voice.say(end={})
        self._see_off(self._world.timeout)

    # what the engine of this rank tells

    def finished(self) -> Mapping[str, str | None]:
        """As of `ckptkit.io.engine.Journal`; shares hold unfinished files only."""
        return {}

    def record(self, path: str, size: int, sha256: str | None) -> None:
        """A file is durable and complete."""
        assert self._journal is not None
        self._journal.record(path, size, sha256)
        with self._lock:
            if sha256 is not None:
                self._hashes[path] = sha256
            self._left.discard(path)
            self._check_complete()

    def part(self, file: int, window: Window, sums: Sequence[Sum]) -> None:
        """The bytes of a rank in a file are durable."""
        self._heard(0, {"part": file, "sums": [list(item) for item in sums]})

    # what other ranks tell

    @property
    def _to_move(self) -> int:
        return sum(share.nbytes for share in self._shares)

    def _gather(self) -> None:
        """Waits until every rank has introduced itself."""
        deadline = time.monotonic() + self._world.arrival
        missing = list(self._ears)
        while missing:
            self.voice.beat(0)
            names = set(os.listdir(self._folder))
            for ear in [ear for ear in missing if f"{self._run}-{ear.rank}.jsonl" in names]:
                for message in ear.messages():
                    self._check_terms(ear, message)
                    self._check_failed(ear, message)
                    if ear in missing and "plan" in message:
                        missing.remove(ear)
            if missing and time.monotonic() > deadline:
                ranks = ", ".join(str(ear.rank) for ear in missing[:8])
                raise StorageError(
                    f"rank {ranks} of {self._world.size} did not come within {self._world.arrival:.0f} seconds",
                    where=self._folder,
                    hint="see what it says; all ranks need one file system and one command line (a process that is"
                    " alone: unset RANK and WORLD_SIZE)",
                )
            if missing:
                time.sleep(pause(1))

    def _check_terms(self, ear: Ear, message: Message) -> None:
        if "plan" not in message or not self._work.digest:
            return
        if {key: message.get(key) for key in self._work.terms} != self._work.terms:
            raise UsageError(
                f"{ear.name} has another plan than rank 0",
                where=self._folder.parent,
                hint="do all ranks see the same sources, under the same path, and run the same command?",
            )

    def _check_failed(self, ear: Ear, message: Message) -> None:
        if (failed := message.get("failed")) is not None:
            raise raised(failed, ear.name)

    def _join_files(self) -> None:
        """Makes the files that several ranks write, at their full size."""
        plan = self._work.plan
        for index in sorted({index for share in self._shares for index in share.windows}):
            owners = {rank for rank, share in enumerate(self._shares) if index in share.windows}
            if len(owners) > 1:
                file = plan.files[index]
                create(self._work.directory / file.path, file.size)
                self._joint[index] = _Joint(Checksums(file.checksums), owners)

    def _look(self) -> None:
        for ear in self._ears:
            for message in ear.messages():
                self._check_failed(ear, message)
                self._heard(ear.rank, message)
            if not self._complete.is_set() and (death := ear.death()) is not None:
                # What it said last may have come after the first look.
                for message in ear.messages():
                    self._check_failed(ear, message)
                raise StorageError(f"{ear.name} {death}", where=self._folder.parent)
        self._tell()

    def _tell(self) -> None:
        with self._lock:
            done = min(self._moved + sum(ear.done for ear in self._ears), self._to_move)
            if self._complete.is_set():
                done = self._to_move
            self._progress(done - self._told)
            self._told = done

    def _heard(self, rank: int, message: Message) -> None:
        try:
            self._take_in(rank, message)
        except (LookupError, TypeError, ValueError, OverflowError):
            raise InputError(f"not what rank {rank} says", where=self._folder) from None

    def _take_in(self, rank: int, message: Message) -> None:
        with self._lock:
            match message:
                case {"part": int() as index, "sums": [*sums]}:
                    self._joint[index].checksums.join(Sum(*item) for item in sums)
                    self._durable(rank, index)
                case {"filled_in": int() as index}:
                    self._durable(rank, index)
                case {"hashed": int() as index, "sha256": str() as sha256}:
                    file = self._work.plan.files[index]
                    self.record(file.path, file.size, sha256)
                case {"whole": int() as index, "sha256": None | str() as sha256}:
                    file = self._work.plan.files[index]
                    self.record(file.path, file.size, sha256)
                case {"result": [int() as written, float() as seconds], "host": str() as host}:
                    self._results[rank] = Moved(rank, host, written, seconds)
                    self._check_complete()

    def _durable(self, rank: int, index: int) -> None:
        """Bytes of a rank in a joint file are durable; the next step follows when those of all are."""
        joint, file = self._joint[index], self._work.plan.files[index]
        joint.waiting.discard(rank)
        if joint.waiting:
            return
        if file.checksums and not joint.filled:
            joint.filled = True
            joint.waiting = {rank for rank in range(self._world.size) if self._has_checksums(rank, index)}
            values = [joint.checksums.value(number).hex() for number in range(len(file.checksums))]
            self._ask(joint.waiting, {"fill_in": index, "values": values})
        elif self._work.hash:
            owners = {rank for rank, share in enumerate(self._shares) if index in share.windows}
            self._ask({min(owners)}, {"hash": index})
        else:
            self.record(file.path, file.size, None)

    def _has_checksums(self, rank: int, index: int) -> bool:
        """Whether a checksum of a file lies in the bytes of a rank."""
        window = self._shares[rank].windows.get(index)
        places = (at for checksum in self._work.plan.files[index].checksums for at in checksum.at)
        return window is not None and any(at < window.stop and window.start < at + 4 for at in places)

    def _ask(self, ranks: set[int], message: Message) -> None:
        if ranks - {0}:
            self.voice.say(ask=sorted(ranks - {0}), **message)
        if 0 in ranks:
            self._duty(message, partial(self._heard, 0))

    def _check_complete(self) -> None:
        if not self._left and len(self._results) == self._world.size:
            self._complete.set()

    def _see_off(self, seconds: float) -> None:
        """Waits until no rank works any more."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for ear in self._ears:
                ear.messages()
            if all(ear.left() for ear in self._ears):
                return
            self.voice.beat(self._moved)
            time.sleep(pause(1))


class Follower(_Rank):
    """Another rank: it does its share, and what rank 0 asks for, until that says how it ended."""

    def __init__(self, world: World, folder: Path, work: Work) -> None:
        super().__init__(world, folder, work, lambda size: None)
        self._ear: Ear | None = None
        self._indices: dict[str, int] = {}
        self._ended = threading.Event()

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """After an error: tells rank 0."""
        if self._voice is not None:
            try:
                if error is not None and not getattr(error, "told", False):
                    self.voice.say(failed=told(error))
                self.voice.say(bye=True)
            except CkptkitError:
                pass  # the run is over, or its disk is; rank 0 sees that this rank has ended
        self._close()

    def run(self) -> None:
        """Does the share of this rank, and stays until all is done.

        Raises:
            CkptkitError: As `ckptkit.io.engine.run`, on whatever rank; or rank 0 does not come, or has died.
        """
        live = self._join()
        if live is not None:
            self._share = shares(self._work.plan, live, self._world.size)[self._world.rank]
            self._indices = {self._work.plan.files[index].path: index for index in self._share.windows}
        self._attend(self._look)
        if live is not None:
            done = self._engine(self)
            self.voice.say(result=[done.written, done.seconds], **hello())
        while not self._ended.wait(pause(1)):
            if self._stop.error is not None:
                raise self._stop.error
        if self._stop.error is not None:
            raise self._stop.error

    def finished(self) -> Mapping[str, str | None]:
        """As of `ckptkit.io.engine.Journal`; shares hold unfinished files only."""
        return {}

    def record(self, path: str, size: int, sha256: str | None) -> None:
        """A file is durable and complete."""
        self.voice.say(whole=self._indices[path], sha256=sha256)

    def part(self, file: int, window: Window, sums: Sequence[Sum]) -> None:
        """The bytes of this rank in a file are durable."""
        self.voice.say(part=file, sums=[list(item) for item in sums])

    def _join(self) -> list[int] | None:
        """Comes to the run that rank 0 calls to, and waits for its start: the files to write; None if all is done.

        An earlier run may have left its call. So only a rank 0 that gives signs of life is answered.
        """
        deadline = time.monotonic() + self._world.arrival
        heard: dict[str, Ear] = {}
        while True:
            if self._voice is None and (run := called(self._folder, self._world)) is not None:
                ear = heard.setdefault(run, Ear(self._folder, run, 0, self._world.timeout))
                ear.messages()
                if ear.host and ear.lives():
                    self._answer(run, ear)
            if self._voice is not None and self._ear is not None:
                self.voice.beat(0)
                start = None
                for message in self._ear.messages():
                    self._check_end(message)
                    start = message.get("start", start)
                if start is not None:
                    return self._live(start)
                self._check_alive()
                deadline = time.monotonic() + self._world.arrival  # rank 0 waits for others, and not for ever
            if time.monotonic() > deadline:
                raise StorageError(
                    f"rank 0 did not come within {self._world.arrival:.0f} seconds",
                    where=self._folder.parent,
                    hint="see what it says; all ranks need one file system and one command line",
                )
            time.sleep(pause(1))

    def _live(self, start: object) -> list[int] | None:
        """The indices in what rank 0 says; None if there is nothing to do."""
        match start:
            case {"live": None}:
                return None
            case {"live": [*live]} if all(type(index) is int for index in live):
                if set(live) <= set(range(len(self._work.plan.files))) and len(set(live)) == len(live):
                    return live
        raise InputError("not what rank 0 says", where=self._folder)

    def _answer(self, run: str, ear: Ear) -> None:
        try:
            self._voice = Voice(self._folder, run, self._world.rank)
            self.voice.say(**hello(), **self._work.terms)
        except (FileNotFoundError, StorageError):
            if self._voice is not None:
                self._voice.close()
            self._voice = None
            if called(self._folder, self._world) == run:
                raise  # else a newer rank 0 has removed the folder
        else:
            self._ear = ear

    def _look(self) -> None:
        assert self._ear is not None
        if self._ended.is_set():
            return
        for message in self._ear.messages():
            self._check_end(message)
            if self._world.rank in message.get("ask", ()):
                self._duty(message, lambda answer: self.voice.say(**answer))
        self._check_alive()

    def _check_alive(self) -> None:
        """Whether rank 0 may be at work, unless it has ended the run."""
        assert self._ear is not None
        if self._ended.is_set() or (death := self._ear.death()) is None:
            return
        for message in self._ear.messages():  # what it said last may have come after the first look
            self._check_end(message)
        if not self._ended.is_set():
            hint = "run again with --resume"
            raise StorageError(f"{self._ear.name} {death}", where=self._folder.parent, hint=hint)

    def _check_end(self, message: Message) -> None:
        if is_end(message):
            self._ended.set()


def is_end(message: Message) -> bool:
    """Whether a message of rank 0 says that the run has ended; raises what ended it, if that was an error."""
    end = message.get("end")
    if isinstance(end, dict) and end:
        error = raised(end, "")
        error.told = True
        raise error
    return end is not None


def told(error: BaseException) -> Message:
    """An error as a message."""
    if isinstance(error, CkptkitError):
        return {"code": error.exit_code, "what": error.what, "where": error.where, "hint": error.hint}
    code = getattr(error, "exit_code", None)
    if isinstance(code, int) and code > _INTERRUPTED:
        return {"code": StorageError.exit_code, "what": f"stopped by {error}", "where": None, "hint": None}
    return {"code": 70, "what": f"internal error: {type(error).__name__}: {error}", "where": None, "hint": None}


def raised(message: Message, who: str) -> CkptkitError:
    """The error in a message, said by `who`."""
    kind = _ERRORS.get(message.get("code", 0), CkptkitError)
    where, hint = (value if isinstance(value := message.get(key), str) else None for key in ("where", "hint"))
    place = ": ".join(part for part in (who, where) if part) or None
    return kind(str(message.get("what")), where=place, hint=hint)
