"""Reading source files: exact reads with few open files, and whether a file is still the same."""

from __future__ import annotations

import hashlib
import os
import random
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ckptkit.errors import CkptkitError, InputError
from ckptkit.io import faults
from ckptkit.io.regular import open_regular
from ckptkit.io.stores.answers import changed
from ckptkit.io.stores.mirror import MirroredFile, at_address, mirrored, name_of
from ckptkit.io.stores.objects import Object
from ckptkit.io.system import storage_error

_OPEN_FILES = 32
_PIECE = 4096
MOST_SAMPLES = 26
"""Pieces that are sampled from a file, unless there are many files."""
_FEWEST_SAMPLES, _SAMPLES_IN_ALL = 4, 4096


def _unreadable(error: OSError, path: str) -> CkptkitError:
    if isinstance(error, FileNotFoundError):
        return InputError("the source file is gone", where=path, hint="restore it and run again")
    return storage_error(error, path)


class TouchedError(InputError):
    """A source was replaced or written to, but its size, its time and its sampled bytes are the same."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The facts by which a change of a file is noticed.

    Attributes:
        path: Absolute, or the address in a store. A store gives no inode and no ctime; the ETag stands for both.
        size: Bytes.
        mtime_ns: Time of the last change, nanoseconds. Programs can set it back.
        ctime_ns: Time of the last change of content, name or mode, nanoseconds. Programs cannot set it.
        inode: File number on its device; a file replaced by a copy gets another one.
        device: The device.
        sample: SHA-256 of some of its bytes in hexadecimal, or empty if not requested.
    """

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int
    sample: str = field(default="", compare=False)

    @classmethod
    def of(cls, path: str, samples: int = 0) -> Fingerprint:
        """The fingerprint of a file as it is now.

        Args:
            path: The file.
            samples: How many pieces of it to hash.

        Raises:
            InputError: The file does not exist.
            StorageError: It cannot be looked at.
        """
        if (remote := mirrored(path)) is not None:
            return cls._in_store(remote.address, remote.about)
        try:
            status = os.stat(path)
            sample = sample_of(path, status.st_size, samples) if samples else ""
        except OSError as error:
            raise _unreadable(error, path) from error
        return cls(
            os.path.abspath(path),
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
            status.st_ino,
            status.st_dev,
            sample,
        )

    @classmethod
    def _in_store(cls, address: str, about: Object) -> Fingerprint:
        size, modified, tag = about.version
        return cls(address, size, modified, modified, tag, 0, about.etag)

    @property
    def identity(self) -> tuple[str, int, int, str]:
        """The facts that must be equal for a later run to resume an earlier one: path, size, time, sampled bytes."""
        return (self.path, self.size, self.mtime_ns, self.sample)

    @property
    def version(self) -> tuple[int, int]:
        """Inode and ctime, which show copies and writes that `identity` does not show.

        The device does not count: some file systems get another number with each mount.
        """
        return (self.inode, self.ctime_ns)

    def check(self) -> None:
        """Checks that the file is still the same.

        Raises:
            TouchedError: It was replaced or written to, and has the same size and time.
            InputError: It changed or is gone.
        """
        remote = at_address(self.path)
        now = Fingerprint.of(self.path) if remote is None else self._now(remote)
        if now == self:
            return
        if remote is not None or now is None:
            raise changed(self.path)
        what = "source changed while converting"
        if (now.size, now.mtime_ns) == (self.size, self.mtime_ns):
            hint = "run again with --resume: the tensors of this file are copied again"
            raise TouchedError(what, where=self.path, hint=hint)
        raise InputError(what, where=self.path, hint="run again once it is complete")

    def _now(self, remote: MirroredFile) -> Fingerprint | None:
        about = remote.now()
        return None if about is None else self._in_store(self.path, about)


def sample_of(path: str | Path, size: int, count: int) -> str:
    """SHA-256 of `count` pieces of a file: its start, its end, and pieces at places that depend on its size.

    Args:
        path: The file.
        size: Its size in bytes.
        count: How many pieces of 4 KiB to read, at least 2; a small file is read whole.

    Raises:
        InputError: It is no regular file.
        OSError: It cannot be read.
    """
    if size <= count * _PIECE:
        starts, length = [0], size
    else:
        place = random.Random(size)  # the same places in every run
        last, length = size - _PIECE, _PIECE
        starts = sorted({0, last, *(place.randrange(last + 1) for _ in range(count - 2))})
    digest = hashlib.sha256()
    fd = open_regular(path)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # otherwise much around each piece is read, too
        for start in starts:
            digest.update(os.pread(fd, length, start))
    finally:
        os.close(fd)
    return digest.hexdigest()


def fingerprints(paths: Iterable[str]) -> tuple[Fingerprint, ...]:
    """Fingerprints with samples, in the order of their absolute paths.

    Raises:
        InputError: A file does not exist.
        StorageError: A file cannot be looked at.
    """
    found = set(paths)
    samples = max(_FEWEST_SAMPLES, min(MOST_SAMPLES, _SAMPLES_IN_ALL // max(1, len(found))))
    return tuple(sorted((Fingerprint.of(path, samples) for path in found), key=lambda item: item.path))


@dataclass(frozen=True)
class Seen:
    """Files as they were before anything of them was read: headers that are kept must be those of the bytes.

    Attributes:
        folders: Where they are.
        files: Their fingerprints by absolute path, or by address.
    """

    folders: tuple[Path, ...] = ()
    files: dict[str, Fingerprint] = field(default_factory=dict)

    @classmethod
    def of(cls, *folders: Path) -> Seen:
        """All files below some directories; what cannot be looked at is left to whoever reads it."""
        found: dict[str, Fingerprint] = {}
        for folder in folders:
            for directory, _, names in os.walk(folder):
                for name in names:
                    with suppress(CkptkitError):
                        fingerprint = Fingerprint.of(os.path.join(directory, name))
                        found[fingerprint.path] = fingerprint
        return cls(folders, found)

    def check(self, paths: Iterable[str]) -> None:
        """Whether those of `paths` that were seen are still the same.

        Raises:
            InputError: One changed or is gone.
        """
        for path in sorted(paths):
            if (fingerprint := self.files.get(name_of(path))) is not None:
                fingerprint.check()


class Sources:
    """The open source files of one thread.

    Reads use `preadv` and not a memory map. A file that another program truncates meanwhile is then a short read, and
    not a signal that kills the process.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[str, int] = OrderedDict()
        self._remote: dict[str, MirroredFile | None] = {}
        self._preadv = faults.reader()

    def remote(self, path: str) -> MirroredFile | None:
        """The file of a store that `path` stands for, if it does."""
        if path not in self._remote:
            self._remote[path] = mirrored(path)
        return self._remote[path]

    def fd(self, path: str) -> int:
        """A descriptor of `path`, valid until the next call.

        Raises:
            InputError: The file does not exist.
            StorageError: It cannot be opened.
        """
        fd = self._open.get(path)
        if fd is not None:
            self._open.move_to_end(path)
            return fd
        if len(self._open) >= _OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        try:
            fd = self._open[path] = open_regular(path)
        except OSError as error:
            raise _unreadable(error, path) from error
        return fd

    def read(self, path: str, view: memoryview, offset: int) -> None:
        """Fills `view` with the bytes of `path` from `offset` on.

        Raises:
            InputError: The file ends before.
            StorageError: The disk, or the store, answers with an error.
        """
        if (remote := self.remote(path)) is not None:
            remote.read_into(view, offset)
            return
        fd = self.fd(path)
        while view:
            try:
                count = self._preadv(fd, [view], offset)
            except OSError as error:
                raise storage_error(error, path) from error
            if not count:
                raise InputError(
                    f"the file ends before byte {offset + len(view)}",
                    where=path,
                    hint="it was truncated meanwhile: restore it and run again",
                )
            view, offset = view[count:], offset + count

    def close(self) -> None:
        """Closes every file."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
