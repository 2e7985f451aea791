"""Reading source files: exact reads with few open files, and whether a file is still the same."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ckptkit.errors import CkptkitError, InputError
from ckptkit.io import faults
from ckptkit.io.regular import open_regular
from ckptkit.io.system import storage_error

_OPEN_FILES = 32


def _unreadable(error: OSError, path: str) -> CkptkitError:
    if isinstance(error, FileNotFoundError):
        return InputError("the source file is gone", where=path, hint="restore it and run again")
    return storage_error(error, path)


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What tells that a file was not touched.

    Attributes:
        path: Absolute.
        size: Bytes.
        mtime_ns: Time of the last change, nanoseconds.
        inode: File number on its device; a file replaced by a copy gets another one.
        device: The device.
    """

    path: str
    size: int
    mtime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, path: str) -> Fingerprint:
        """The fingerprint of a file as it is now.

        Raises:
            InputError: The file does not exist.
            StorageError: It cannot be looked at.
        """
        try:
            status = os.stat(path)
        except OSError as error:
            raise _unreadable(error, path) from error
        return cls(os.path.abspath(path), status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)

    def check(self) -> None:
        """Whether the file is still the same.

        Raises:
            InputError: It changed or is gone.
        """
        if Fingerprint.of(self.path) != self:
            raise InputError("source changed while converting", where=self.path, hint="run again once it is complete")


def fingerprints(paths: Iterable[str]) -> tuple[Fingerprint, ...]:
    """Fingerprints in the order of their absolute paths.

    Raises:
        InputError: A file does not exist.
        StorageError: A file cannot be looked at.
    """
    return tuple(sorted((Fingerprint.of(path) for path in set(paths)), key=lambda item: item.path))


@dataclass(frozen=True)
class Seen:
    """Files as they were before anything of them was read: headers that are kept must be those of the bytes.

    Attributes:
        folders: Where they are.
        files: Their fingerprints by absolute path.
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
            if (fingerprint := self.files.get(os.path.abspath(path))) is not None:
                fingerprint.check()


class Sources:
    """The open source files of one thread.

    Reads go through `preadv` and not through a memory map: a file that somebody truncates meanwhile is
    then a short read, and not a signal that kills the process.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[str, int] = OrderedDict()
        self._preadv = faults.reader()

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
            StorageError: The disk answers with an error.
        """
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
