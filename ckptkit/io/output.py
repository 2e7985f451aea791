"""One file of the output while it is written."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ckptkit.io import faults
from ckptkit.io.checksums import Checksums, Sum
from ckptkit.io.following import Follower
from ckptkit.io.plan import OutputFile
from ckptkit.io.shares import Window
from ckptkit.io.system import allocate, nothing_written, start_writeback, storage_error

_FULL = {errno.ENOSPC, errno.EDQUOT}
_WRITEBACK = 16 << 20
"""Bytes after which the kernel is asked to write: a disk's queue is full with fewer, and few calls are made."""


class Output:
    """One output file while it is written. The first thread that has bytes for it opens it.

    Attributes:
        spec: Its size and its bytes.
        path: Where it is written.
        window: The bytes of it that this process writes.
        follower: Its hash, if asked for, and if this process writes all of it.
    """

    def __init__(self, spec: OutputFile, path: Path, hash: bool = False, window: Window | None = None) -> None:
        """A file that does not exist yet; or, where several processes write it, that has its size.

        Args:
            spec: Its size and its bytes.
            path: Where it is written.
            hash: Also compute its SHA-256.
            window: The bytes of it that this process writes; None for all.
        """
        self.spec = spec
        self.path = path
        self.window = window or Window(0, spec.size)
        self._pending = self.window.stop - self.window.start
        self._unsent = 0
        self._fd = -1
        self._lock = threading.Lock()
        self._use = threading.Lock()  # held while the kernel works on the whole file, so that nobody closes it
        self._pwrite, self._copy = faults.writer()
        self._checksums = Checksums(spec.checksums)
        self.follower = Follower(spec, self._checksums, self.fd) if hash and self.whole else None

    @property
    def whole(self) -> bool:
        """Whether this process writes all of it."""
        return self.window == (0, self.spec.size)

    @property
    def sums(self) -> list[Sum]:
        """What its checksums know of the bytes that were written."""
        return self._checksums.parts()

    def clip(self, start: int, stop: int) -> tuple[int, int]:
        """The part of bytes `start:stop` of the file that this process writes; empty if the first is not the less."""
        return max(start, self.window.start), min(stop, self.window.stop)

    def fd(self) -> int:
        """The open file, at its full size.

        Raises:
            StorageError: It cannot be created, or there is no room.
        """
        with self._lock:
            if self._fd < 0:
                self._fd = _created(self.path, self.spec.size) if self.whole else _opened(self.path)
            return self._fd

    def write(self, data: NDArray[np.uint8], offset: int) -> None:
        """Writes bytes and adds them to the checksums that cover them.

        Raises:
            StorageError: The disk is full or answers with an error.
        """
        view = data.data
        self._checksums.add(view, offset)
        self._put(view, offset)

    def copy(self, source: int, start: int, size: int, offset: int) -> int:
        """Copies inside the kernel and returns the number of bytes: less than `size` where the kernel cannot copy.

        An error of the source and an error of this file look the same here, so only a full disk is raised. After any
        other error the caller copies by reading and writing, which shows the file at fault.

        Raises:
            StorageError: The disk is full.
        """
        done, fd = 0, self.fd()
        while done < size and self._copy is not None:
            try:
                count = self._copy(source, fd, size - done, start + done, offset + done)
            except OSError as error:
                if error.errno in _FULL:
                    raise storage_error(error, self.path) from error
                count = 0
            if not count:
                break
            done += count
        return done

    def settle(self, size: int) -> tuple[bool, bool]:
        """Counts `size` more bytes as written: (whether these were the last, whether to call `send`)."""
        with self._lock:
            self._pending -= size
            self._unsent += size
            due = self._unsent >= _WRITEBACK
            if due:
                self._unsent = 0
            return not self._pending, due

    def send(self) -> None:
        """Has the kernel begin to write what it holds of this file. Waits while the queue of the disk is full."""
        with self._use:
            if self._fd >= 0:
                start_writeback(self._fd)

    def complete(self) -> None:
        """Writes the checksums, which completes the file. An empty file is created here.

        Raises:
            StorageError: The disk is full or answers with an error.
        """
        self.fd()
        self.fill_in([self._checksums.value(index) for index in range(len(self.spec.checksums))])

    def fill_in(self, values: Sequence[bytes]) -> None:
        """Writes the values of the checksums, where the file holds them and this process writes.

        Raises:
            StorageError: The disk is full or answers with an error.
        """
        for checksum, value in zip(self.spec.checksums, values, strict=True):
            for at in checksum.at:
                first, last = self.clip(at, at + len(value))
                if first < last:
                    self._put(memoryview(value)[first - at : last - at], first)

    def sync(self) -> None:
        """Makes the file durable and closes it.

        Raises:
            StorageError: The disk answers with an error.
        """
        try:
            os.fdatasync(self.fd())
        except OSError as error:
            raise storage_error(error, self.path) from error
        self.close()

    def close(self) -> None:
        """Closes the file, finished or not."""
        with self._use, self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _put(self, view: memoryview, offset: int) -> None:
        put(self.fd(), view, offset, self.path, self._pwrite)


def put(fd: int, view: memoryview, offset: int, path: Path, pwrite: faults.Write) -> None:
    """Writes bytes at a byte of a file.

    Raises:
        StorageError: The disk is full or answers with an error.
    """
    while view:
        try:
            count = pwrite(fd, view, offset)
        except OSError as error:
            raise storage_error(error, path) from error
        if not count:
            raise nothing_written(path)
        view, offset = view[count:], offset + count


def create(path: Path, size: int) -> None:
    """Makes a file of a size, for several processes to write into.

    Raises:
        StorageError: It cannot be created, or there is no room.
    """
    os.close(_created(path, size))


def _created(path: Path, size: int) -> int:
    fd = -1
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(path, flags, 0o666)
        allocate(fd, size)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        raise storage_error(error, path) from error
    return fd


def _opened(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise storage_error(error, path) from error
