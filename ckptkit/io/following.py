"""SHA-256 of a file while it is written: the hash follows the writers through what they leave in the page cache.

SHA-256 takes the bytes in order, but writers write a file in several places at once, and a checksum in front of its
bytes is known after them. So the hash advances to the first byte that is not final yet, whenever there is enough to
read, and is almost done when the last byte is written.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable

from ckptkit.errors import StorageError
from ckptkit.io.checksums import Checksums
from ckptkit.io.mapped import mapped
from ckptkit.io.plan import OutputFile

_STEP = 8 << 20
"""Bytes worth a turn: far more than starting one costs, and less than the cores' shared cache holds."""
_BUFFER = 2 << 20
"""Bytes to read where a file cannot be mapped: many, because every read waits for Python's lock afterwards."""
_place = threading.local()


class Follower:
    """The hash of one file. Any thread may call it."""

    def __init__(self, spec: OutputFile, checksums: Checksums, fd: Callable[[], int]) -> None:
        """A follower at the start of its file.

        Args:
            spec: The file.
            checksums: Its checksums; their values are taken from here, because the file gets them last.
            fd: Gives the open file.
        """
        self._spec = spec
        self._checksums = checksums
        self._fd = fd
        self._lock = threading.Lock()  # of what is written
        self._ranges: dict[int, int] = {}
        self._ready = 0
        self._left = [checksum.stop - checksum.start for checksum in spec.checksums]
        self._fields = sorted((at, index) for index, checksum in enumerate(spec.checksums) for at in checksum.at)
        self._open = 0
        self._waiting = False
        self._turn = threading.Lock()  # of what is hashed
        self._digest = hashlib.sha256()
        self._position = 0
        self._passed = 0

    def written(self, start: int, stop: int) -> bool:
        """Notes that bytes `start:stop` are written and in the checksums. True if `advance` should be called."""
        with self._lock:
            for index, first, last in self._checksums.covering(start, stop):
                self._left[index] -= last - first
            self._ranges[start] = stop
            while (end := self._ranges.pop(self._ready, None)) is not None:
                self._ready = end
            if self._waiting or self._final() - self._position < _STEP:
                return False
            self._waiting = True
            return True

    def advance(self) -> None:
        """Hashes every byte that is final.

        Raises:
            StorageError: The file cannot be read.
        """
        with self._turn:
            self._waiting = False
            while True:
                with self._lock:
                    final = self._final()
                if final <= self._position:
                    return
                while self._position < final:
                    self._take(final)

    def finish(self) -> str:
        """The SHA-256 in hexadecimal, once all bytes are written.

        Raises:
            StorageError: The file cannot be read.
        """
        self.advance()
        if self._position != self._spec.size:
            raise RuntimeError(f"{self._spec.path}: bytes after {self._position} were not written")
        return self._digest.hexdigest()

    def _final(self) -> int:
        """Where the bytes that will not change any more end."""
        while self._open < len(self._fields) and not self._left[self._fields[self._open][1]]:
            self._open += 1
        return min(self._ready, self._fields[self._open][0]) if self._open < len(self._fields) else self._ready

    def _take(self, final: int) -> None:
        """Hashes the next bytes, up to `final` at most."""
        fd, start = self._fd(), self._position
        # Mapped, the bytes need not be copied out of the page cache, which would cost a fifth of what hashing does.
        view = mapped(fd, start, min(final, start + _STEP))
        if view is None:
            view = _buffer()[: final - start]
            view = view[: os.preadv(fd, [view], start)]
        if not view:
            raise StorageError("the file became shorter", where=self._spec.path, hint="run again with --resume")
        self._hash(view)

    def _hash(self, view: memoryview) -> None:
        """Hashes bytes, with the values of checksums where the file has none yet."""
        start, stop, done = self._position, self._position + len(view), 0
        while self._passed < len(self._fields) and self._fields[self._passed][0] < stop:
            at, index = self._fields[self._passed]
            first, last = max(at, start), min(at + 4, stop)
            self._digest.update(view[done : first - start])
            self._digest.update(self._checksums.value(index)[first - at : last - at])
            done = last - start
            if last < at + 4:
                break
            self._passed += 1
        self._digest.update(view[done:])
        self._position = stop


def _buffer() -> memoryview:
    """The buffer of this thread."""
    if not hasattr(_place, "buffer"):
        _place.buffer = memoryview(bytearray(_BUFFER))
    buffer: memoryview = _place.buffer
    return buffer
