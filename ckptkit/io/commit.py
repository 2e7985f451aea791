"""All or nothing: the destination changes in one step, after everything is written, checked and durable.

Beside a destination `NAME` lie, while a run lives or after it was killed:

    .NAME.ckptkit-lock              held (flock) by the run that writes
    .NAME.ckptkit-partial/
        journal.jsonl               the plan, and the files that are durable
        sealed.json                 the plan and the finished directory, once it is about to become NAME
        output/                     what becomes NAME
    .NAME.ckptkit-old/              only where the system cannot exchange two directories

A killed run leaves the destination as it was. It leaves its partial directory too, from which
`resume` goes on. A run killed after that one step has done its work, and `resume` only cleans up: it sees that by
the seal, or where that is gone too, by comparing every byte of the destination with what the plan gives.
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
from ckptkit.io.engine import hash_file, run
from ckptkit.io.journal import FileJournal, Finished, read_journal
from ckptkit.io.leftovers import remove_strangers, still_finished, strangers
from ckptkit.io.plan import Plan
from ckptkit.io.present import holds, resembles
from ckptkit.io.regular import read_bounded
from ckptkit.io.room import Room, entries_of
from ckptkit.io.source import Fingerprint, Seen, TouchedError, fingerprints
from ckptkit.io.system import exchange, storage_error, sync_directory, sync_file, write_all
from ckptkit.sizes import human_size

_SEAL = "sealed.json"
_JOURNAL = "journal.jsonl"
_LARGEST_SEAL = 1 << 26  # it says something of each source
_OWN_ENTRIES = 4  # lock, partial directory, journal and seal


class Destination:
    """A directory to be made from a plan.

    Nothing is touched before the context is entered, and only `commit` touches the destination itself:
    leaving the context, with or without an exception, never does.

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
            plan: What it will hold.
            sources: Directories or files that the user named as input.
            seen: What these were like before they were read.
            overwrite: Replace what is there.
            resume: Go on from what a killed run left.

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
        self._journal: FileJournal | None = None
        self._lock = -1
        self._in_place = False
        self._sealed: int | None = None
        self._check_overlap(sources)
        with _storage(self.path):
            # By names and sizes for now; `__enter__` looks closer, once nobody else can write there.
            self._done = resume and (self._is_sealed() or (not self._unfinished() and resembles(plan, self.path)))
            self._check_place()
        self.free = self._free()
        if not self._done:
            self._check_room()

    @property
    def directory(self) -> Path:
        """Where the files are to be written."""
        return self._partial / "output"

    @property
    def journal(self) -> FileJournal:
        """The journal of this run; there is one inside the context only."""
        if self._journal is None:
            raise RuntimeError("the destination is not open")
        return self._journal

    @property
    def resume_hint(self) -> str | None:
        """What to tell a user whose run was stopped, or None if nothing is left of it."""
        if self._in_place or not self._partial.is_dir():
            return None
        if (stands := self._what_stands()) is not None:
            return stands
        return f"{self._partial} keeps what is written: run again with --resume to go on, or remove it"

    def write(
        self,
        *,
        threads: int | None = None,
        hash: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, str]:
        """Carries out the plan and commits it.

        Args:
            threads: As for `ckptkit.io.engine.run`.
            hash: Also compute the SHA-256 of every file.
            progress: Called with (bytes done, bytes in all).

        Returns:
            SHA-256 by output path, if asked for.

        Raises:
            UsageError: Another run writes to this destination, or somebody has filled it meanwhile.
            InputError: A source is gone, damaged or changed, or two tensors that must be equal differ.
            StorageError: The disk is full or answers with an error.
        """
        done = 0

        def count(size: int) -> None:
            nonlocal done
            done += size
            if progress is not None:
                progress(done, self._plan.nbytes)

        with self._resumable(), self:
            if self._done:
                self._in_place = True
                self._clean_up()
                count(self._plan.nbytes)
                return {file.path: hash_file(self.path / file.path) for file in self._plan.files} if hash else {}
            result = run(self._plan, self.directory, threads=threads, progress=count, journal=self.journal, hash=hash)
            self.commit()
        return result.hashes

    @contextmanager
    def _resumable(self) -> Iterator[None]:
        """Adds to an error of the storage how to go on once it is mended."""
        try:
            yield
        except StorageError as error:
            hints = [hint for hint in (error.hint, self.resume_hint) if hint]
            raise StorageError(error.what, where=error.where, hint="; ".join(hints) or None) from error

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
        """Lets go of the lock; what is not committed stays in the partial directory.

        Unless the sources are at fault: a run over better ones is another run, which could not go on from there.
        """
        if isinstance(error, InputError) and not isinstance(error, TouchedError):
            with suppress(OSError):
                shutil.rmtree(self._partial)
        if error is not None and (stands := self._what_stands()) is not None:
            error.add_note(stands)
        self._release()

    def commit(self) -> None:
        """Puts the finished output in its place, in one step, and makes that durable.

        Raises:
            InputError: A source changed while it was read.
            UsageError: Somebody has filled the destination meanwhile.
            StorageError: A file is missing or has another size, or the disk answers with an error.
        """
        self._check_complete()
        with _storage(self._partial):
            faults.step("sync")
            _sync_tree(self.directory)
        for fingerprint in self._fingerprints:
            fingerprint.check()
        with _storage(self.path):
            self._check_place()
            self._seal()
            # Without its journal, a partial directory is never taken for a resumable one: after the
            # exchange it holds the old files, and some may have the sizes of the new.
            faults.step("drop-journal")
            self.journal.close()
            self.journal.path.unlink()
            sync_directory(self._partial)
            self._put_in_place()
            faults.step("clean-up")
        self._in_place = True
        self._clean_up()

    def _what_stands(self) -> str | None:
        """Which model is at the destination, if the run ends once its output was about to go there; else None.

        It asks the file system: a signal may arrive between a rename and the next line of Python.
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
        """Notes which directory is about to become the destination: renaming keeps its number."""
        self._sealed = self.directory.stat().st_ino
        seal = self._seal_of(self._fingerprints, self._sealed)
        path = self._partial / _SEAL
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            write_all(fd, json.dumps(seal).encode(), path)
            os.fsync(fd)
        finally:
            os.close(fd)

    def _seal_of(self, sources: Iterable[Fingerprint], number: int) -> dict[str, object]:
        """What is noted of the directory of this inode, which holds what the plan gives from these sources."""
        known = list(sources)
        versions = [list(source.version) for source in known]
        return {"plan": self._plan.digest(known), "sources": versions, "output": number}

    def _is_sealed(self) -> bool:
        """Whether the destination is what an earlier run of this very plan put there, whole."""
        try:
            seal = json.loads(read_bounded(self._partial / _SEAL, _LARGEST_SEAL, follow=False))
            number = self.path.stat().st_ino
            sizes = [(self.path / file.path).stat().st_size for file in self._plan.files]
        except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError, InputError):
            return False
        if sizes != [file.size for file in self._plan.files]:
            return False
        return bool(seal == self._seal_of(fingerprints(self._plan.sources()), number))

    def _unfinished(self) -> bool:
        """Whether an earlier run left something to go on with: after a commit there is no journal any more."""
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
        """For systems that cannot exchange: between the two renames there is no model at the destination.

        A run killed there leaves the old one under a name that the next run moves back.
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
                f"the output is complete, but what it replaced could not be removed ({cause})",
                where=self._partial,
                hint="remove it by hand",
            ) from error

    def _beside(self, kind: str) -> Path:
        return self.path.parent / f".{self.path.name}.ckptkit-{kind}"

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
        """What is free, with what an earlier run left: that is used again or removed."""
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
        """Takes the lock; a lock file without a living owner is no lock."""
        path = self._beside("lock")
        while self._lock < 0:
            with _storage(path):
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    # The owner before us may have removed the file between our open and our lock.
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
        """Undoes a replacement in two steps that was killed half way."""
        old = self._beside("old")
        if not old.is_dir():
            return
        if self._occupied():
            shutil.rmtree(old)  # the second rename was made, too
            return
        with suppress(FileNotFoundError):
            os.rmdir(self.path)  # somebody made an empty one meanwhile; the model is the old one
        os.rename(old, self.path)

    def _prepare(self) -> None:
        sources = self._plan.sources()
        for seen in self._seen:
            seen.check(sources)
        self._fingerprints = fingerprints(sources)
        digest = self._plan.digest(self._fingerprints)
        resumable = self._resume and self._unfinished()
        self._refuse_links(resumable)
        kept = self._kept(digest) if resumable else None
        if kept is None and self._partial.is_dir():
            shutil.rmtree(self._partial)
        self.directory.mkdir(parents=True, exist_ok=True)
        remove_strangers(self.directory, {file.path for file in kept or ()})
        journal = self._partial / _JOURNAL
        self._journal = FileJournal(journal, self.directory, digest, self._fingerprints, kept or ())

    def _kept(self, digest: str) -> list[Finished] | None:
        """What an earlier run finished and still counts, or None where it left nothing to go on with."""
        recorded = read_journal(self._partial / _JOURNAL)
        if recorded is None or not self.directory.is_dir():
            return None
        touched = recorded.touched(digest, self._fingerprints, self._partial)
        remove_strangers(self.directory, {file.path for file in self._plan.files} & recorded.files.keys())
        return still_finished(self._plan, self.directory, recorded.files, touched)

    def _refuse_links(self, resumable: bool) -> None:
        """What is written through a link would land in a place that nobody named."""
        inside = os.walk(self._partial) if resumable else ()
        names = (Path(folder, name) for folder, folders, files in inside for name in (*folders, *files))
        for place in (self._partial, *names):
            if place.is_symlink():
                raise InputError("a symbolic link in place of what an earlier run left", where=place, hint="remove it")

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
            raise StorageError("something that this conversion did not write", where=found, hint=hint)


@contextmanager
def _storage(where: Path) -> Iterator[None]:
    """Turns what the operating system answers into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise StorageError(
                "the file system has no locks", where=where, hint="choose another place, or mount it with flock"
            ) from error
        raise storage_error(error, error.filename or where) from error


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
