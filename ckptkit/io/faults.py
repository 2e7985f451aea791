"""Faults on purpose, so that tests can prove what happens when a disk or a process dies.

A fault is written `kind:where`. Counted in bytes: `enospc:K`, `eio:K` and `kill:K` strike once K
bytes have been written, `short:K` cuts a write at every K bytes, from `zero:K` on writes take nothing,
`read-eio:K` and `read-end:K` strike once K bytes have been read. By name: `kill:NAME` and `eio:NAME`
strike at that step of the commit.

Active only inside `inject` or when the environment holds `CKPTKIT_FAULT`; otherwise the plain
functions of `os` are handed out, and nothing is paid.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

from ckptkit.errors import UsageError

VARIABLE = "CKPTKIT_FAULT"
_WRITE = {"enospc", "eio", "kill", "short", "zero"}
_READ = {"read-eio", "read-end"}
_NAMED = {"eio", "kill"}

Write = Callable[[int, memoryview, int], int]
Read = Callable[[int, Sequence[memoryview], int], int]
Copy = Callable[[int, int, int, int, int], int]


class Fault:
    """One fault and how many bytes have passed so far."""

    def __init__(self, spec: str) -> None:
        self.kind, _, where = spec.partition(":")
        self.at = int(where) if where.isdigit() else -1
        self.name = "" if where.isdigit() else where
        known = self.kind in (_NAMED if self.name else _WRITE | _READ) and where
        if not known:
            raise UsageError(f"unknown fault {spec!r}", where=VARIABLE)
        self._passed = 0
        self._lock = threading.Lock()

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        """`os.pwrite`, until the fault strikes."""
        return self._meter(_WRITE, len(data), lambda size: os.pwrite(fd, data[:size], offset))

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """`os.preadv` into one buffer, until the fault strikes."""
        (view,) = buffers
        return self._meter(_READ, len(view), lambda size: os.preadv(fd, [view[:size]], offset))

    def copy_file_range(self, source: int, target: int, count: int, start: int, offset: int) -> int:
        """`os.copy_file_range`, until the fault strikes."""
        return self._meter(_WRITE, count, lambda size: os.copy_file_range(source, target, size, start, offset))

    def step(self, name: str) -> None:
        """Strikes if the fault names this step."""
        if name == self.name:
            self._strike()

    def _meter(self, kinds: set[str], size: int, move: Callable[[int], int]) -> int:
        if self.kind not in kinds or self.at < 0:
            return move(size)
        with self._lock:
            room = self.at - self._passed
            if size <= room:
                self._passed += size
                return move(size)
            self._passed = self.at
            done = move(room) if room else 0
            if self.kind == "short" and room:
                self._passed = 0
                return done
            if self.kind == "short":
                self._passed = 1
                return move(1)
        return self._strike()

    def _strike(self) -> int:
        match self.kind:
            case "kill":
                os._exit(137)
            case "enospc":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            case "read-end" | "zero":
                return 0
        raise OSError(errno.EIO, os.strerror(errno.EIO))


_injected: Fault | None = None


@contextmanager
def inject(spec: str) -> Iterator[None]:
    """Activates a fault for the block.

    Raises:
        UsageError: There is no such fault.
    """
    global _injected
    before, _injected = _injected, Fault(spec)
    try:
        yield
    finally:
        _injected = before


def _active() -> Fault | None:
    if _injected is not None:
        return _injected
    spec = os.environ.get(VARIABLE)
    return _for_this_process(spec) if spec else None


@cache
def _for_this_process(spec: str) -> Fault:
    """One fault however many files ask, so that it counts the bytes of all of them."""
    return Fault(spec)


def writer() -> tuple[Write, Copy | None]:
    """The functions to write with: `os.pwrite` and `os.copy_file_range` (None where the system has none)."""
    fault = _active()
    if fault is not None:
        return fault.pwrite, fault.copy_file_range
    return os.pwrite, getattr(os, "copy_file_range", None)


def reader() -> Read:
    """The function to read with: `os.preadv`."""
    fault = _active()
    return os.preadv if fault is None else fault.preadv


def step(name: str) -> None:
    """Marks a step of the commit at which a named fault may strike."""
    fault = _active()
    if fault is not None:
        fault.step(name)
