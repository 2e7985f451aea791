"""The one way to open a file for reading: regular files only, and a bounded number of bytes.

A path may lead to a pipe without a writer, or to a device without an end. Opening the first blocks, and reading the
second never stops. So the kind of an open file is checked before any byte is read.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from ckptkit.errors import InputError
from ckptkit.io.stores.mirror import fetch_all, mirrored
from ckptkit.io.stores.opening import must_be_on_disk
from ckptkit.io.system import storage_error

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}
_NO_FILE = {errno.ENXIO, errno.ENODEV}  # what opening a socket, or a device that is not there, gives
_COPY_AGAIN = "put the file itself there"


def open_regular(path: str | Path, *, follow: bool = True) -> int:
    """A descriptor to read a regular file with.

    Args:
        path: The file.
        follow: Whether a symbolic link may stand in its place.

    Raises:
        InputError: It is a pipe, a device, a socket or a folder, or (without `follow`) a link.
        OSError: It cannot be opened; FileNotFoundError if it is not there.
    """
    if (remote := mirrored(path)) is not None:
        fetch_all([remote])  # whoever reads a descriptor does not ask for ranges
    return _opened(path, follow=follow)


def open_header(path: str | Path) -> BinaryIO:
    """A regular file to read some of: of a file in a store only what is read is fetched.

    Args:
        path: The file.

    Raises:
        InputError: As `open_regular`.
        OSError: As `open_regular`.
    """
    if (remote := mirrored(path)) is not None:
        return remote.opened()
    return open(_opened(path), "rb")


def _opened(path: str | Path, *, follow: bool = True) -> int:
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | (0 if follow else os.O_NOFOLLOW)
    try:
        fd = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ENOENT:
            must_be_on_disk(path)
        if error.errno == errno.ELOOP:
            what = "a symbolic link" if not follow else "a symbolic link that leads nowhere"
            raise InputError(f"{what}, not a file", where=path, hint=_COPY_AGAIN) from None
        if error.errno in _NO_FILE:
            raise _irregular("a socket or a device", path) from None
        raise
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        raise _irregular(_KINDS.get(stat.S_IFMT(mode), "something else"), path)
    return fd


def read_bounded(path: str | Path, limit: int, *, follow: bool = True) -> bytes:
    """All bytes of a regular file.

    Args:
        path: The file.
        limit: The most bytes that it may have.
        follow: Whether a symbolic link may stand in its place.

    Raises:
        InputError: It is not there, no regular file, or larger.
        StorageError: It cannot be read.
    """
    if (remote := mirrored(path)) is not None:
        return _within(remote.header(0, limit + 1), limit, path)
    try:
        with open(_opened(path, follow=follow), "rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise InputError("no such file", where=path) from None
    except OSError as error:
        raise storage_error(error, path) from error
    return _within(data, limit, path)


def _within(data: bytes, limit: int, path: str | Path) -> bytes:
    if len(data) > limit:
        raise InputError(f"larger than {limit:,} bytes, the most that such a file may have", where=path)
    return data


def walk(
    folder: Path, skipped: Collection[str] = (), check: Callable[[Path], None] = lambda item: None
) -> Iterator[Path]:
    """Everything below a folder that is no folder, by name; a link to a folder is given as a link, and not followed.

    Args:
        folder: Where to look.
        skipped: Names of folders to leave out.
        check: Called with every entry before it is looked at.

    Raises:
        InputError: A link leads to a folder that contains the link.
        OSError: A folder cannot be read.
    """
    pending = [folder]
    while pending:
        item = pending.pop()
        linked = item is not folder and item.is_symlink()
        if linked and item.parent.resolve().is_relative_to(real := item.resolve()) and item.is_dir():
            raise InputError(f"the same folder as {real}", where=item, hint="remove the link")
        if linked or not item.is_dir():
            yield item
            continue
        for inner in sorted(item.iterdir(), reverse=True):
            check(inner)
            if not (inner.name in skipped and inner.is_dir()):
                pending.append(inner)


def _irregular(kind: str, path: str | Path) -> InputError:
    return InputError(f"{kind}, not a regular file", where=path, hint=_COPY_AGAIN)
