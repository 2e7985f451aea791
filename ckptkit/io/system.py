"""The few operating-system calls that Python does not offer, and what their errors mean to a user."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

from ckptkit.errors import StorageError

_UNSUPPORTED = {errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EXDEV}
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_SYNC_FILE_RANGE_WRITE = 2
_MADV_POPULATE_READ = 22
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT = 32 << 20
"""Bytes: glibc takes no larger limit for blocks that it maps one by one."""

_ADVICE = {
    errno.ENOSPC: ("no space left on the device", "free some space and run again with --resume"),
    errno.EDQUOT: ("the disk quota is used up", "free some space and run again with --resume"),
    errno.EIO: ("the device reports an input/output error", "check the disk (dmesg) before trying again"),
    errno.EROFS: ("the file system is read-only", "choose a place that can be written"),
    errno.EACCES: ("permission denied", "check the permissions or choose another place"),
    errno.EPERM: ("operation not permitted", "check the permissions or choose another place"),
    errno.EFBIG: ("the file is too large for this file system", "choose another disk or smaller shards"),
    errno.EMFILE: ("too many open files", "raise the limit (ulimit -n)"),
}


def storage_error(error: OSError, where: object) -> StorageError:
    """The error of the operating system as one clear line."""
    what, hint = _ADVICE.get(error.errno or 0, (error.strerror or str(error), None))
    return StorageError(what, where=where, hint=hint)


def nothing_written(where: object) -> StorageError:
    """A write that took no byte and gave no reason: asking again could take for ever."""
    return StorageError("the file takes no more bytes, for no reason given", where=where, hint="check the file system")


def write_all(fd: int, data: bytes, where: object) -> None:
    """Writes bytes at the position of a file.

    Raises:
        StorageError: It takes no more.
        OSError: The disk answers with an error.
    """
    view = memoryview(data)
    while view:
        count = os.write(fd, view)
        if not count:
            raise nothing_written(where)
        view = view[count:]


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> bool:
    """Calls a libc function; False where this system or file system has no such call."""
    function: Callable[..., int] | None = getattr(_libc(), name, None)
    if function is None:
        return False
    while function(*arguments) != 0:
        code = ctypes.get_errno()
        if code == errno.EINTR:
            continue
        if code in _UNSUPPORTED:
            return False
        raise OSError(code, os.strerror(code))
    return True


def keep_freed_memory() -> None:
    """Has this process keep up to 32 MiB that it frees in each thread, for the next array.

    Computed tensors make and free the same arrays again and again. glibc would give their pages back each time, and
    the kernel would clear new ones. A hint only: another libc has no such call.
    """
    mallopt: Callable[[int, int], int] | None = getattr(_libc(), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)


def give_back(size: int) -> None:
    """Has this process give blocks of at least `size` bytes back to the system as soon as they are freed.

    Otherwise each thread keeps what it freed, where `keep_freed_memory` was called. A hint only.
    """
    mallopt: Callable[[int, int], int] | None = getattr(_libc(), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, size)


def allocate(fd: int, size: int) -> None:
    """Gives an empty file its size, with room on the disk reserved where the file system can.

    `os.posix_fallocate` is not used: where the file system cannot reserve, glibc emulates it by
    writing into every block, which costs a second pass over the file.

    Raises:
        OSError: No room (ENOSPC), or another answer of the disk.
    """
    if not size:
        return
    if not _call("fallocate", fd, 0, ctypes.c_longlong(0), ctypes.c_longlong(size)):
        os.ftruncate(fd, size)


def start_writeback(fd: int) -> None:
    """Asks the kernel to begin writing to the disk what it holds of a file.

    Otherwise it begins when a file is synced, and the disk idles until then. The call waits while the disk's queue is
    full, but not for the data. A hint only: where it cannot be followed, or fails, the sync at the end says so.
    """
    with suppress(OSError):
        _call("sync_file_range", fd, ctypes.c_longlong(0), ctypes.c_longlong(0), _SYNC_FILE_RANGE_WRITE)


def populate(address: int, size: int) -> bool:
    """Brings all pages of a mapping in, for reading; False where this system has no such call.

    Raises:
        OSError: A page cannot be read. Touching it would raise a signal.
    """
    return _call("madvise", ctypes.c_void_p(address), ctypes.c_size_t(size), _MADV_POPULATE_READ)


def exchange(left: Path, right: Path) -> bool:
    """Swaps two directory entries in one atomic step; False where the system cannot.

    Raises:
        OSError: The swap was refused for another reason.
    """
    return _call("renameat2", _AT_FDCWD, os.fsencode(left), _AT_FDCWD, os.fsencode(right), _RENAME_EXCHANGE)


def sync_directory(path: Path) -> None:
    """Makes the entries of a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_file(path: Path) -> None:
    """Makes a file durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_text(path: str, text: str) -> None:
    """Writes a small text file, such as a report.

    Raises:
        StorageError: It cannot be written.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            write_all(fd, text.encode(), path)
        finally:
            os.close(fd)
    except OSError as error:
        raise StorageError(f"cannot write: {error.strerror}", where=path) from error
