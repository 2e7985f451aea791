"""A folder of a store as a folder of sparse files: names and sizes are true, and bytes come when they are read.

What knows this module asks `mirrored(path)` before it reads, and reads through the `MirroredFile` that it gets. What is
read twice stays in the sparse file; weights, which are read once, go past it. A process that is handed the path alone
finds the store by the list beside the files.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple
from functools import partial
from pathlib import Path
from typing import BinaryIO

from ckptkit.errors import CkptkitError, InputError, StorageError
from ckptkit.io.crew import Crew
from ckptkit.io.stores.address import parse
from ckptkit.io.stores.objects import Object, Store, checked
from ckptkit.io.stores.ranges import Ranges
from ckptkit.io.system import storage_error

_MARK = "ckptkit-store-"
_ROOT = re.compile(rf"{_MARK}[a-z0-9_]{{8}}")
"""What `tempfile` calls it."""
_FILES, _LIST = "files", "list.json"
SMALL = 64 << 10
"""Bytes: what is read in pieces of at most this size stays, for it may be read again."""
_GRAIN = 16 << 10
"""Bytes: reads of headers are rounded to these, because the next one is near."""
AHEAD = 128 << 10
"""Bytes that are fetched of the start of a file: the headers of most."""
PIECE = 4 << 20
"""Bytes: the most that is asked for at once where a file is fetched whole."""
_LARGEST_LIST = 256 << 20
_THREADS = 8
_FRESH = 5.0
"""Seconds for which a list counts as what is there now."""

_open: dict[str, Mirror] = {}
_known: dict[str, str] = {}
_lock = threading.Lock()


class MirroredFile:
    """One file of a mirror.

    Attributes:
        about: What the store said of it.
        path: The sparse file.
    """

    def __init__(self, mirror: Mirror, about: Object, path: Path) -> None:
        self._mirror = mirror
        self.about = about
        self.path = path
        self._filling = threading.Lock()  # held while bytes that stay are on their way
        self._lock = threading.Lock()
        self._filled = Ranges()
        self._kept = Ranges()

    @property
    def address(self) -> str:
        """Where it is in the store, for people."""
        return f"{self._mirror.store.address}/{self.about.name}"

    def now(self) -> Object | None:
        """What the store says of it now; None if it is gone. Errors as `Store.list`."""
        return self._mirror.now(self.about.name)

    def keep(self, start: int, stop: int) -> None:
        """Has bytes `start:stop` stay once they are read."""
        with self._lock:
            self._kept.add(start, stop)

    def read_into(self, view: memoryview, start: int) -> None:
        """Fills `view` with the bytes from `start` on; each byte that stays is fetched once.

        Raises:
            InputError: The file ends before, is gone, or has changed.
            StorageError: The store or the disk answers with an error.
        """
        stop = start + len(view)
        if stop > self.about.size:
            raise InputError(f"the file ends before byte {stop}", where=self.path, hint="fetch or copy it again")
        with self._lock:
            parts = [(start, stop, True)] if len(view) <= SMALL else list(self._kept.split(start, stop))
        for left, right, kept in parts:
            part = view[left - start : right - start]
            if kept:
                self.fill((left, right))
                self._read_filled(part, left)
            else:
                self._read_past(part, left)

    def fill(self, *spans: tuple[int, int]) -> None:
        """Has some ranges in the sparse file, which are fetched in parallel; errors as `read_into`."""
        with self._filling:
            with self._lock:
                size = self.about.size
                missing = [gap for start, stop in spans for gap in self._filled.missing(max(0, start), min(stop, size))]
            pieces = [(at, min(right, at + PIECE)) for left, right in missing for at in range(left, right, PIECE)]
            _in_parallel([partial(self._fetch, start, stop) for start, stop in pieces])

    def header(self, start: int, size: int, ahead: int = _GRAIN) -> bytes:
        """At most `size` bytes from `start` on; what is near is fetched with them. Errors as `read_into`.

        Args:
            start: The first byte.
            size: How many.
            ahead: How many to fetch at least.
        """
        stop = min(start + size, self.about.size)
        if start >= stop:
            return b""
        with self._lock:
            there = not self._filled.missing(start, stop)
        if not there:
            self.fill((start - start % _GRAIN, max(stop + -stop % _GRAIN, start + ahead)))
        data = bytearray(stop - start)
        self._read_filled(memoryview(data), start)
        return bytes(data)

    def opened(self) -> BinaryIO:
        """The file to read from its start on, as headers are."""
        return io.BufferedReader(_Raw(self))

    def _read_past(self, view: memoryview, start: int) -> None:
        with self._lock:
            parts = list(self._filled.split(start, start + len(view)))
        for left, right, filled in parts:
            part = view[left - start : right - start]
            if filled:
                self._read_filled(part, left)
            else:
                self._mirror.read(self.about, left, part)

    def _read_filled(self, view: memoryview, start: int) -> None:
        with _one_line(self.path):
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                while view:
                    count = os.preadv(fd, [view], start)
                    if not count:
                        raise InputError("it was cut off meanwhile", where=self.path, hint="run again")
                    view, start = view[count:], start + count
            finally:
                os.close(fd)

    def _fetch(self, start: int, stop: int) -> None:
        data = bytearray(stop - start)
        self._mirror.read(self.about, start, memoryview(data))
        with _one_line(self.path):
            fd = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                done = 0
                while done < len(data):
                    done += os.pwrite(fd, memoryview(data)[done:], start + done)
            finally:
                os.close(fd)
        with self._lock:
            self._filled.add(start, stop)


class _Raw(io.RawIOBase):
    """A mirrored file for Python's own readers."""

    def __init__(self, file: MirroredFile) -> None:
        self._file = file
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.about.size}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: object) -> int:
        with memoryview(buffer) as view:  # type: ignore[arg-type]
            data = self._file.header(self._at, len(view), 0 if self._at else AHEAD)
            view[: len(data)] = data
        self._at += len(data)
        return len(data)


class Mirror:
    """An open mirror.

    Attributes:
        store: Where its files are.
        root: The folder that holds the sparse files and the list of them.
        requests: Requests for bytes so far.
        nbytes: Bytes fetched so far.
    """

    def __init__(self, root: Path, store: Store, files: Sequence[Object]) -> None:
        self.root = root
        self.store = store
        self.requests = 0
        self.nbytes = 0
        self._files = {file.name: MirroredFile(self, file, self.folder / file.name) for file in files}
        self._count = threading.Lock()
        self._listing = threading.Lock()
        self._now: dict[str, Object] = {}
        self._asked: set[str] = set()
        self._listed = float("-inf")

    @property
    def folder(self) -> Path:
        """The folder of the sparse files."""
        return self.root / _FILES

    @property
    def files(self) -> list[MirroredFile]:
        """All of them."""
        return list(self._files.values())

    def file(self, name: str) -> MirroredFile | None:
        """A file by its name."""
        return self._files.get(name)

    def read(self, file: Object, start: int, view: memoryview) -> None:
        """Fills `view` from the store, and counts."""
        requests = self.store.read(file, start, view)
        with self._count:
            self.requests += requests
            self.nbytes += len(view)

    def now(self, name: str) -> Object | None:
        """What the store says of a file now: one list serves for all files, until one is asked for again."""
        with self._listing:
            if name in self._asked or time.monotonic() - self._listed > _FRESH:
                self._now = {file.name: file for file in self.store.list()}
                self._listed = time.monotonic()
                self._asked.clear()
            self._asked.add(name)
            return self._now.get(name)

    def make(self) -> None:
        """Makes the sparse files.

        Raises:
            StorageError: The disk does not take them.
        """
        made: set[Path] = set()
        with _one_line(self.root):
            self.folder.mkdir()
            for file in self._files.values():
                if file.path.parent not in made:
                    file.path.parent.mkdir(parents=True, exist_ok=True)
                    made.add(file.path.parent)
                with file.path.open("xb") as sparse:
                    sparse.truncate(file.about.size)
            text = {"address": str(self.store.address), "files": [asdict(file.about) for file in self.files]}
            (self.root / _LIST).write_text(json.dumps(text))


@contextmanager
def mirror_of(store: Store, files: Sequence[Object]) -> Iterator[Mirror]:
    """A mirror of some files of a store, which goes away with the context; errors then name the store.

    Raises:
        StorageError: The disk does not take it.
    """
    root = os.path.realpath(tempfile.mkdtemp(prefix=_MARK))
    mirror = Mirror(Path(root), store, files)
    with _lock:
        _open[root] = mirror
        _known[root] = str(store.address)
    try:
        mirror.make()
        yield mirror
    except CkptkitError as error:
        _rename(error)
        raise
    finally:
        with _lock:
            del _open[root]
        shutil.rmtree(root, ignore_errors=True)


def mirrored(path: str | os.PathLike[str]) -> MirroredFile | None:
    """The mirrored file that stands at a path of this disk, if one does.

    Raises:
        InputError: The path is in what is left of a mirror, whose files have names and sizes alone.
    """
    text = os.fspath(path)
    if _MARK not in text:
        return None
    for root, rest in _perhaps_in(os.path.abspath(text)):
        if rest.startswith(f"{_FILES}/") and (mirror := _mirror_at(root)) is not None:
            return mirror.file(rest.removeprefix(f"{_FILES}/"))
    return None


def mirror_around(folder: str | os.PathLike[str]) -> Mirror | None:
    """The mirror that a folder is in, if it is in one; errors as `mirrored`."""
    found = (_mirror_at(root) for root, _ in _perhaps_in(os.path.abspath(folder)))
    return next((mirror for mirror in found if mirror is not None), None)


def _perhaps_in(path: str) -> Iterator[tuple[str, str]]:
    """The folders around a path that have the name of a mirror, and the rest of the path: TMPDIR may have one, too."""
    at = path.find(f"/{_MARK}")
    while at >= 0:
        end = path.find("/", at + 1)
        yield (path, "") if end < 0 else (path[:end], path[end + 1 :])
        at = path.find(f"/{_MARK}", at + 1)


def at_address(address: str) -> MirroredFile | None:
    """The mirrored file that stands for an address."""
    for mirror in list(_open.values()):
        start = f"{mirror.store.address}/"
        if address.startswith(start) and (found := mirror.file(address[len(start) :])) is not None:
            return found
    return None


def shown(text: str) -> str:
    """A text in which folders of mirrors have the names of what they mirror."""
    if _MARK in text:
        for root, address in list(_known.items()):
            text = text.replace(f"{root}/{_FILES}", address).replace(root, address)
    return text


def name_of(path: str | os.PathLike[str]) -> str:
    """What identifies a file from one run to the next: its absolute path, or its address in a store."""
    return shown(os.path.abspath(path))


def fetch_all(files: Sequence[MirroredFile]) -> None:
    """Fetches files whole, for programs that read them by themselves; errors as `read_into`."""
    small = [file for file in files if file.about.size <= PIECE]
    _in_parallel([partial(file.fill, (0, file.about.size)) for file in small])
    for file in files:
        file.fill((0, file.about.size))


def fetch_folder(folder: str | os.PathLike[str], wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Fetches the files of a folder, if it is in a mirror, whose names are wanted; errors as `read_into`."""
    mirror = mirror_around(folder)
    if mirror is not None:
        around = Path(os.path.abspath(folder))
        fetch_all([file for file in mirror.files if file.path.is_relative_to(around) and wanted(file.path.name)])


def prepare(spans: Mapping[Path, Sequence[tuple[int, int]]]) -> None:
    """Fetches small ranges of files at once, those that are near one another together, where a store has the files.

    Args:
        spans: File -> (first byte, end) of each range that is read next.

    Raises:
        InputError: A file is gone, or has changed.
        StorageError: The store or the disk answers with an error.
    """
    found = [(remote, _near(ranges)) for path, ranges in spans.items() if (remote := mirrored(path)) is not None]
    _in_parallel([partial(remote.fill, *ranges) for remote, ranges in found])


def prepare_starts(paths: Iterable[Path]) -> None:
    """Fetches the starts of files, where headers are, at once; as `prepare`."""
    prepare({path: [(0, AHEAD)] for path in paths})


def _near(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if joined and start - joined[-1][1] <= _GRAIN:
            joined[-1] = (joined[-1][0], max(joined[-1][1], stop))
        else:
            joined.append((start, stop))
    return joined


def _in_parallel(works: Sequence[Callable[[], None]]) -> None:
    crew = Crew(min(_THREADS, len(works)) if len(works) > 1 else 0, "ckptkit-fetch")
    stopped = threading.Event()

    def work(one: Callable[[], None]) -> None:
        if not stopped.is_set():
            one()

    try:
        for _ in crew.map(work, works):
            pass
    finally:
        stopped.set()
        crew.close()


def _mirror_at(root: str) -> Mirror | None:
    mirror = _open.get(root)
    if mirror is not None:
        return mirror
    with _lock:
        if root not in _open and (found := _attached(root)) is not None:
            _open[root] = found
            _known[root] = str(found.store.address)
        return _open.get(root)


def _attached(root: str) -> Mirror | None:
    """The mirror that another process of this user made.

    Raises:
        InputError: It was one, and nothing says any more of what.
    """
    from ckptkit.io.stores.opening import store_at

    try:
        text = json.loads(_own_list(Path(root, _LIST)))
        address, files = parse(text["address"]), [Object(**about) for about in text["files"]]
        if any([type(item) for item in astuple(file)] != [str, int, str, int] for file in files):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        if _ROOT.fullmatch(os.path.basename(root)) and os.path.isdir(os.path.join(root, _FILES)):
            hint = "name the address in the store, and remove this folder"
            what = "what is left of a folder that stood for a store: its bytes are not there"
            raise InputError(what, where=root, hint=hint) from None
        return None
    return Mirror(Path(root), store_at(address), checked(files, address))


def _own_list(place: Path) -> bytes:
    """The list of a mirror, if it is a file that this user wrote.

    Raises:
        OSError: It is not, or cannot be read.
    """
    fd = os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_size > _LARGEST_LIST:
            raise OSError(errno.EPERM, "not a list of ours")
        return file.read(status.st_size)


def _rename(error: CkptkitError) -> None:
    error.what = shown(error.what)
    error.where = None if error.where is None else shown(error.where)
    error.hint = None if error.hint is None else shown(error.hint)
    error.args = (str(error),)


@contextmanager
def _one_line(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        said = storage_error(error, where)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # a message names the store, and its disk is not full
            hint = "free some space, or set TMPDIR to a folder with more room"
            raise StorageError("no space left for temporary files", where=said.where, hint=hint) from error
        raise said from error
