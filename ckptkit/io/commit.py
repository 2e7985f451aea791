"""All or nothing: the destination changes in one step, after everything is written, checked and durable.

During a run, and after a killed one, these lie beside a destination `NAME`:

    .NAME.ckptkit-lock              held (flock) by the run that writes
    .NAME.ckptkit-partial/
        journal.jsonl               digest of the plan, and the files that are durable
        sealed.json                 digest of the plan, and inode of `output` just before it becomes NAME
        ranks/                      what the processes say to each other, where several carry out the plan
        output/                     the directory that becomes NAME
    .NAME.ckptkit-old/              only where the system cannot exchange two directories

A killed run leaves the destination as it was. Its partial directory stays, and `resume` continues from there. A run
that was killed after the one step has done its work, and `resume` only cleans up. It recognises this case by the seal.
If the seal is gone, too, it compares every byte of the destination with the plan.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ckptkit.errors import InputError, StorageError, UsageError
from ckptkit.io import faults
from ckptkit.io.engine import hash_file
from ckptkit.io.journal import FileJournal, Finished, read_journal
from ckptkit.io.leftovers import remove_strangers, still_finished, strangers
from ckptkit.io.meeting import clear
from ckptkit.io.plan import Plan
from ckptkit.io.present import holds, resembles
from ckptkit.io.regular import read_bounded
from ckptkit.io.room import Room, entries_of
from ckptkit.io.source import Fingerprint, Seen, TouchedError, fingerprints
from ckptkit.io.system import exchange, storage_error, sync_directory, sync_file, write_all
from ckptkit.io.team import Alone, Follower, Leader, Outcome, Work
from ckptkit.io.world import ALONE, World
from ckptkit.sizes import human_size

_SEAL = "sealed.json"
_JOURNAL = "journal.jsonl"
_RANKS, _OUTPUT = "ranks", "output"
_LARGEST_SEAL = 1 << 26  # it has an entry for each source
_OWN_ENTRIES = 4  # lock, partial directory, journal and seal


class Destination:
    """A directory to be made from a plan.

    Nothing is written before the context is entered. Only `commit` changes the destination itself; leaving the context,
    with or without an exception, does not.

        destination = Destination(path, plan, sources=[source])
        with destination:
            run(plan, destination.directory, journal=destination.journal)
            destination.commit()

    Attributes:
        path: The destination, absolute, symbolic links resolved.
        free: Bytes that the file system has for it.
    """

    def __init__(
        self,
        path: str | Path,
        plan: Plan,
        *,
        sources: Iterable[Path] = (),
        seen: Iterable[Seen] = (),
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        """Checks the plan and the place; changes nothing.

        Args:
            path: The destination: absent, or an empty directory, or any with `overwrite`.
            plan: Its content.
            sources: Directories or files that the user named as input.
            seen: Fingerprints of the sources from before they were read.
            overwrite: Replace an existing directory.
            resume: Continue a killed run from its partial directory.

        Raises:
            UsageError: The destination is in use for something else, or overlaps a source.
            InputError: A source is gone, or the plan names an impossible file.
            UnsupportedError: A cast that does not exist.
            StorageError: The place cannot be written, or has no room.
        """
        plan.check()
        if not str(path):
            raise UsageError("the destination is empty", hint="name a directory (is a variable of the shell unset?)")
        self.path = Path(os.path.realpath(path))
        self._plan = plan
        self._seen = tuple(seen)
        self._overwrite = overwrite
        self._resume = resume
        self._partial = self._beside("partial")
        self._fingerprints: tuple[Fingerprint, ...] = ()
        self._digest = ""
        self._journal: FileJournal | None = None
        self._alone = True
        self._lock = -1
        self._in_place = False
        self._sealed: int | None = None
        self._check_overlap(sources)
        with _storage(self.path):
            # By names and sizes for now; `__enter__` looks closer, under the lock.
            self._done = resume and (self._is_sealed() or (not self._unfinished() and resembles(plan, self.path)))
            self._check_place()
        self.free = self._free()
        if not self._done:
            self._check_room()

    @property
    def directory(self) -> Path:
        """Where the files are to be written."""
        return self._partial / _OUTPUT

    @property
    def journal(self) -> FileJournal:
        """The journal of this run. It exists inside the context only."""
        if self._journal is None:
            raise RuntimeError("the destination is not open")
        return self._journal

    @property
    def resume_hint(self) -> str | None:
        """A hint for the user of a stopped run, or None if the run left nothing."""
        if self._in_place or not self._partial.is_dir():
            return None
        if (stands := self._what_stands()) is not None:
            return stands
        return f"{self._partial} keeps the finished files: run again with --resume to continue, or remove it"

    def write(
        self,
        *,
        threads: int | None = None,
        hash: bool = False,
        progress: Callable[[int, int], None] | None = None,
        check: Callable[[Path], None] | None = None,
        world: World = ALONE,
    ) -> Outcome:
        """Carries out the plan, with the other ranks of the world, and commits it.

        Args:
            threads: As for `ckptkit.io.engine.run`.
            hash: Also compute the SHA-256 of every file.
            progress: Called with (bytes done, bytes in all).
            check: Called with the directory of the finished files before they are committed; an error stops that.
            world: The processes that carry out the plan; this one is rank 0. The others call `take_part`.

        Raises:
            UsageError: Another run writes to this destination, or another program has filled it meanwhile.
            InputError: A source is gone, damaged or changed, or two tensors that must be equal differ.
            StorageError: The disk is full or answers with an error, or another rank does not come, or dies.
        """
        done = 0

        def count(size: int) -> None:
            nonlocal done
            done += size
            if progress is not None:
                progress(done, self._plan.nbytes)

        with resumable(lambda: self.resume_hint), self:
            work = Work(self._plan, self.directory, self._digest, threads, hash)
            self._alone = world.size == 1
            with Alone(work, count) if self._alone else Leader(world, self._partial / _RANKS, work, count) as team:
                if self._done:
                    outcome = Outcome(self._hashes() if hash else {})
                    self._in_place = True
                    count(self._plan.nbytes)
                else:
                    outcome = team.run(self.journal)
                    if check is not None:
                        check(self.directory)
                    self._commit()
                team.end()
            self._clean_up()
        return outcome

    def _hashes(self) -> dict[str, str]:
        return {file.path: hash_file(self.path / file.path) for file in self._plan.files}

    def __enter__(self) -> Destination:
        """Takes the lock and prepares the partial directory."""
        self._take_lock()
        try:
            with _storage(self._partial):
                self._recover()
                self._done = self._done and (self._is_sealed() or holds(self._plan, self.path))
                self._check_place()
                if not self._done:
                    self._check_room()
                    self._prepare()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Releases the lock. Finished files that are not committed stay in the partial directory.

        After an InputError the partial directory is removed: a corrected source makes a different plan, so nothing
        could be resumed. With several ranks it stays: the error may be of one machine alone, and a rank that does not
        answer may still write there, which its lock in that directory shows.
        """
        if isinstance(error, InputError) and not isinstance(error, TouchedError) and self._alone:
            with suppress(OSError):
                shutil.rmtree(self._partial)
        if error is not None and (stands := self._what_stands()) is not None:
            error.add_note(stands)
        self._release()

    def commit(self) -> None:
        """Moves the finished output to the destination in one step, and makes that durable.

        Raises:
            InputError: A source changed while it was read.
            UsageError: Another program has filled the destination meanwhile.
            StorageError: A file is missing or has another size, or the disk answers with an error.
        """
        self._commit()
        self._clean_up()

    def _commit(self) -> None:
        """The one step; what it leaves beside the destination may stay for a while."""
        self._check_complete()
        with _storage(self._partial):
            faults.step("sync")
            _sync_tree(self.directory)
        for fingerprint in self._fingerprints:
            fingerprint.check()
        with _storage(self.path):
            self._check_place()
            self._seal()
            # Without a journal, a partial directory is not resumable. After the exchange it holds the old files, and
            # some of them may have the sizes of the new ones.
            faults.step("drop-journal")
            self.journal.close()
            self.journal.path.unlink()
            sync_directory(self._partial)
            self._put_in_place()
            faults.step("clean-up")
        self._in_place = True

    def _what_stands(self) -> str | None:
        """A sentence about the model at the destination, for a run that ends during or after the one step; else None.

        The answer comes from the file system, because a signal may arrive between a rename and the next line of Python.
        """
        if self._sealed is None:
            return None
        try:
            there = self.path.stat().st_ino
        except FileNotFoundError:
            if not self._beside("old").is_dir():
                return None
            return f"nothing is at {self.path} for now; run again with --resume, which moves the old model back first"
        except OSError:
            return f"whether the new model is at {self.path} could not be seen; run again with --resume"
        if there != self._sealed:
            return None
        rest = f"; run again with --resume, or remove {self._partial}" if self._partial.is_dir() else ""
        return f"the new model is complete at {self.path}{rest}"

    def _seal(self) -> None:
        """Records the inode of the directory that is about to become the destination. A rename keeps it."""
        self._sealed = self.directory.stat().st_ino
        seal = _seal_of(self._digest, self._fingerprints, self._sealed)
        path = self._partial / _SEAL
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            write_all(fd, json.dumps(seal).encode(), path)
            os.fsync(fd)
        finally:
            os.close(fd)

    def _is_sealed(self) -> bool:
        """Whether the destination is the complete output of an earlier run of this very plan."""
        try:
            seal = json.loads(read_bounded(self._partial / _SEAL, _LARGEST_SEAL, follow=False))
            number = self.path.stat().st_ino
            sizes = [(self.path / file.path).stat().st_size for file in self._plan.files]
        except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError, InputError):
            return False
        if sizes != [file.size for file in self._plan.files]:
            return False
        sources = fingerprints(self._plan.sources())
        return bool(seal == _seal_of(self._plan.digest(sources), sources, number))

    def _unfinished(self) -> bool:
        """Whether there is a partial directory to resume from. `commit` removes its journal."""
        return (self._partial / _JOURNAL).is_file()

    def _put_in_place(self) -> None:
        faults.step("rename")
        if not self._occupied():
            os.rename(self.directory, self.path)
        elif not exchange(self.directory, self.path):
            self._replace_in_two_steps()
        sync_directory(self.path.parent)
        sync_directory(self._partial)

    def _replace_in_two_steps(self) -> None:
        """The replacement on systems that cannot exchange two directories.

        Between the two renames there is no model at the destination. A run killed there leaves the old model under
        another name, and the next run moves it back.
        """
        old = self._beside("old")
        os.rename(self.path, old)
        faults.step("between-renames")
        os.rename(self.directory, self.path)
        sync_directory(self.path.parent)
        os.rename(old, self.directory)

    def _clean_up(self) -> None:
        try:
            if self._partial.exists():
                shutil.rmtree(self._partial)
        except OSError as error:
            cause = error.strerror or str(error)
            raise StorageError(
                f"the output is complete, but the replaced directory could not be removed ({cause})",
                where=self._partial,
                hint="remove it by hand",
            ) from error

    def _beside(self, kind: str) -> Path:
        return _beside(self.path, kind)

    def _occupied(self) -> bool:
        """Whether something other than an empty directory is there."""
        try:
            with os.scandir(self.path) as entries:
                return next(entries, None) is not None
        except FileNotFoundError:
            return False

    def _check_overlap(self, sources: Iterable[Path]) -> None:
        given = {Path(os.path.realpath(source)) for source in sources}
        read = {Path(os.path.realpath(file)) for file in self._plan.sources()}
        for source in sorted(given | read):
            if self.path == source or self.path in source.parents:
                raise UsageError("the destination holds the source", where=self.path, hint="choose another directory")
        for source in sorted(given & set(self.path.parents)):
            raise UsageError(f"the destination lies inside the source {source}", where=self.path, hint="move it out")

    def _check_place(self) -> None:
        parent = self.path.parent
        if not parent.is_dir():
            raise StorageError("the parent directory does not exist", where=self.path, hint=f"mkdir -p {parent}")
        if self.path == parent or os.path.ismount(self.path):
            raise UsageError("the destination is a mount point", where=self.path, hint="name a directory below it")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise StorageError("the parent directory cannot be written", where=parent, hint="choose another place")
        if not os.path.lexists(self.path):
            return
        if not self.path.is_dir():
            raise UsageError("the destination is a file", where=self.path, hint="name a directory")
        occupied = self._occupied()
        if occupied and not (self._overwrite or self._done):
            raise UsageError("the destination exists", where=self.path, hint="choose another, or pass --overwrite")
        for place in (Path(os.path.expanduser("~")), _current()):
            if occupied and self.path in (place, *place.parents):
                raise UsageError("the destination holds the home or the current directory", where=self.path)

    def _free(self) -> int:
        """Free bytes. The partial directory of an earlier run counts as free: it is used again or removed."""
        with _storage(self.path.parent):
            self._room = Room.of(self.path.parent, self._partial)
        return self._room.nbytes

    def _check_room(self) -> None:
        entries = entries_of(self._plan.files) + _OWN_ENTRIES
        if self._room.counts_entries and entries > self._room.entries:
            raise StorageError(
                f"not enough inodes: the output has {entries:,} files and folders, {self._room.entries:,} are free",
                where=self.path.parent,
                hint="remove some files or choose another disk",
            )
        size = self._room.blocks_of(self._plan.files)
        if self._room.counts_bytes and size > self.free:
            raise StorageError(
                f"not enough space: the output needs {human_size(size)}, {human_size(self.free)} are free",
                where=self.path.parent,
                hint="free some space or choose another disk",
            )

    def _take_lock(self) -> None:
        """Takes the lock. A lock file without a living owner does not count."""
        path = self._beside("lock")
        while self._lock < 0:
            with _storage(path):
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    # The previous owner may have removed the file between our open and our lock.
                    with suppress(FileNotFoundError):
                        if os.stat(path).st_ino == os.fstat(fd).st_ino:
                            self._lock = fd
                except BlockingIOError:
                    raise UsageError(
                        "another conversion is writing to this destination", where=self.path, hint="wait for it"
                    ) from None
                finally:
                    if self._lock != fd:
                        os.close(fd)

    def _release(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        if self._lock >= 0:
            with suppress(OSError):
                self._beside("lock").unlink()
            os.close(self._lock)
            self._lock = -1

    def _recover(self) -> None:
        """Undoes a replacement in two steps that was killed between its renames."""
        old = self._beside("old")
        if not old.is_dir():
            return
        if self._occupied():
            shutil.rmtree(old)  # the second rename was made, too
            return
        with suppress(FileNotFoundError):
            os.rmdir(self.path)  # an empty directory, made meanwhile by another program
        os.rename(old, self.path)

    def _prepare(self) -> None:
        sources = self._plan.sources()
        for seen in self._seen:
            seen.check(sources)
        self._fingerprints = fingerprints(sources)
        self._digest = self._plan.digest(self._fingerprints)
        resumable = self._resume and self._unfinished()
        self._refuse_links(resumable)
        clear(self._partial / _RANKS)
        kept = self._kept() if resumable else None
        if kept is None and self._partial.is_dir():
            shutil.rmtree(self._partial)
        self.directory.mkdir(parents=True, exist_ok=True)
        remove_strangers(self.directory, {file.path for file in kept or ()})
        journal = self._partial / _JOURNAL
        self._journal = FileJournal(journal, self.directory, self._digest, self._fingerprints, kept or ())

    def _kept(self) -> list[Finished] | None:
        """Files of an earlier run that still count, or None if there is nothing to resume from."""
        recorded = read_journal(self._partial / _JOURNAL)
        if recorded is None or not self.directory.is_dir():
            return None
        touched = recorded.touched(self._digest, self._fingerprints, self._partial)
        remove_strangers(self.directory, {file.path for file in self._plan.files} & recorded.files.keys())
        return still_finished(self._plan, self.directory, recorded.files, touched)

    def _refuse_links(self, resumable: bool) -> None:
        """Refuses symbolic links in the partial directory: files written through them would land elsewhere."""
        inside = os.walk(self._partial) if resumable else ()
        names = (Path(folder, name) for folder, folders, files in inside for name in (*folders, *files))
        for place in (self._partial, *names):
            if place.is_symlink():
                raise InputError("a symbolic link among the files of an earlier run", where=place, hint="remove it")

    def _check_complete(self) -> None:
        finished = self.journal.finished()
        for file in self._plan.files:
            place = self.directory / file.path
            size = place.stat().st_size if file.path in finished and place.is_file() else None
            if size != file.size:
                raise StorageError("the file is not complete", where=place, hint="run again with --resume")
        with _storage(self.directory):
            found = next(strangers(self.directory, {file.path for file in self._plan.files}), None)
        if found is not None:
            hint = "run again with --resume, which removes it"
            raise StorageError("an entry that this conversion did not write", where=found, hint=hint)


def take_part(
    path: str | Path, plan: Plan, world: World, *, seen: Iterable[Seen], threads: int | None, hash: bool
) -> None:
    """Does the share of a rank after the first in `Destination.write`, and waits for the end.

    Args:
        path: The destination.
        plan: The same plan.
        world: This rank.
        seen: Fingerprints of the sources from before they were read.
        threads: As for `ckptkit.io.engine.run`.
        hash: As rank 0 has it.

    Raises:
        CkptkitError: What any rank raised, or rank 0 does not come or has died.
    """
    plan.check()
    partial = _beside(Path(os.path.realpath(path)), "partial")
    sources = plan.sources()
    for one in seen:
        one.check(sources)
    work = Work(plan, partial / _OUTPUT, plan.digest(fingerprints(sources)), threads, hash)
    with Follower(world, partial / _RANKS, work) as rank:
        rank.run()


@contextmanager
def resumable(resume_hint: Callable[[], str | None]) -> Iterator[None]:
    """Adds the way to continue, if there is one by then, to a storage error."""
    try:
        yield
    except StorageError as error:
        hints = [hint for hint in (error.hint, resume_hint()) if hint]
        raise StorageError(error.what, where=error.where, hint="; ".join(hints) or None) from error


def _beside(path: Path, kind: str) -> Path:
    return path.parent / f".{path.name}.ckptkit-{kind}"


@contextmanager
def _storage(where: Path) -> Iterator[None]:
    """Turns an error of the operating system into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise StorageError(
                "the file system has no locks", where=where, hint="choose another place, or mount it with flock"
            ) from error
        raise storage_error(error, error.filename or where) from error


def _seal_of(digest: str, sources: Iterable[Fingerprint], number: int) -> dict[str, object]:
    """The content of the seal: a plan, the sources that it was made from, and the inode of the output."""
    return {"plan": digest, "sources": [list(source.version) for source in sources], "output": number}


def _current() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError:
        return Path("/")


def _sync_tree(top: Path) -> None:
    for directory, _, files in os.walk(top, topdown=False):
        for name in files:
            sync_file(Path(directory, name))
        sync_directory(Path(directory))
