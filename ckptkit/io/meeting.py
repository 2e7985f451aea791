"""How the processes of one run speak to each other: small files in a folder that all of them see.

Every process says what it has to say in a file of its own, a JSON object on each line, and reads the files of others. A
second file is its pulse, a number that changes. A third is locked as long as it lives:

    call.json            the run that rank 0 began; the next run has another number
    RUN-RANK.jsonl       what a rank says
    RUN-RANK.pulse       a count, and the bytes that the rank has moved
    RUN-RANK.lock        held (flock) by the rank

Files are opened for each write and each read, because a network file system shows one machine what another wrote when
the one closes the file and the other opens it. No clocks are compared: a rank counts as dead when its pulse did not
change for some seconds of the clock of whoever watches. On one machine the lock shows it at once.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from ckptkit.errors import CkptkitError, InputError, StorageError, UsageError
from ckptkit.io.regular import open_regular, read_bounded
from ckptkit.io.system import storage_error, write_all
from ckptkit.io.world import World

Message = dict[str, Any]

_CALL = "call.json"
_LARGEST_CALL, _LARGEST_PULSE, _LARGEST_READ = 1 << 12, 1 << 8, 64 << 20
_PULSE_WIDTH = 64
_OLD_RANKS = 10.0  # seconds in which ranks of an earlier run may still end


def pause(size: int) -> float:
    """Seconds between two looks at the files of others: many processes must not keep a file system busy with that."""
    return max(0.05, 0.01 * size)


@cache
def machine() -> str:
    """Something that only processes of one running kernel have in common: there locks can be trusted."""
    with suppress(CkptkitError, OSError):
        return read_bounded("/proc/sys/kernel/random/boot_id", 1 << 10).decode().strip()
    return ""


class Voice:
    """What this process says. Any thread may speak."""

    def __init__(self, folder: Path, run: str, rank: int) -> None:
        """Takes the place of a rank.

        Raises:
            UsageError: Another process has taken it.
            FileNotFoundError: The folder is gone.
            StorageError: The files cannot be written.
        """
        self._base = folder / f"{run}-{rank}"
        self._lock = threading.Lock()
        self._beats = 0
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self._held = os.open(self._base.with_suffix(".lock"), flags, 0o666)
        except FileExistsError:
            hint = "start every rank once (do the processes share one environment?)"
            raise UsageError(f"another process is rank {rank} of this run, too", where=folder, hint=hint) from None
        except FileNotFoundError:
            raise
        except OSError as error:
            raise storage_error(error, self._base) from error
        fcntl.flock(self._held, fcntl.LOCK_EX)

    def say(self, **message: object) -> None:
        """Adds a message.

        Raises:
            StorageError: It cannot be written.
        """
        data = json.dumps(message).encode() + b"\n"
        with self._lock:
            self._put(".jsonl", data, os.O_APPEND)

    def beat(self, done: int) -> None:
        """Gives a sign of life.

        Args:
            done: Bytes that this process has moved.

        Raises:
            StorageError: It cannot be written.
        """
        self._beats += 1
        self._put(".pulse", json.dumps([self._beats, done]).encode().ljust(_PULSE_WIDTH), 0)

    def close(self) -> None:
        """Gives up the place."""
        if self._held >= 0:
            os.close(self._held)
            self._held = -1

    def _put(self, suffix: str, data: bytes, flags: int) -> None:
        path = self._base.with_suffix(suffix)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o666)
            try:
                write_all(fd, data, path)
            finally:
                os.close(fd)
        except FileNotFoundError as error:
            hint = "see what rank 0 says"
            raise StorageError("the run has ended: its partial directory is gone", where=path, hint=hint) from error
        except OSError as error:
            raise storage_error(error, path) from error


class Ear:
    """What another process says."""

    def __init__(self, folder: Path, run: str, rank: int, timeout: float) -> None:
        self.rank = rank
        self.host = ""
        self.ended = False
        self.done = 0
        self._machine = ""
        self._base = folder / f"{run}-{rank}"
        self._timeout = timeout
        self._position = 0
        self._pulse = b""
        self._since = time.monotonic()

    @property
    def name(self) -> str:
        """The rank and its machine, for messages."""
        return f"rank {self.rank} on {self.host}" if self.host else f"rank {self.rank}"

    def messages(self) -> list[Message]:
        """What it has said since the last call.

        Raises:
            InputError: That is no message of ours.
            StorageError: The file cannot be read.
        """
        path = self._base.with_suffix(".jsonl")
        data = _read(path, self._position)
        lines = data[: data.rfind(b"\n") + 1]
        self._position += len(lines)
        found = [_message(line, path) for line in lines.splitlines()]
        for message in found:
            self.host, self._machine = message.get("host", self.host), message.get("machine", self._machine)
            self.ended = self.ended or "bye" in message
        return found

    def pulse(self) -> bool:
        """Whether it gave a sign of life since the last call."""
        data = _read(self._base.with_suffix(".pulse"), 0)[:_LARGEST_PULSE]
        if data == self._pulse:
            return False
        with suppress(ValueError, RecursionError):
            match json.loads(data):
                case [int(), int() as done]:
                    self.done = done
        self._pulse, self._since = data, time.monotonic()
        return True

    def lives(self) -> bool:
        """Whether it gives signs of life now: what it wrote may be of an earlier run."""
        if self._here:
            return not self.gone()
        before = self._pulse
        return self.pulse() and before != b""

    def left(self) -> bool:
        """Whether it works no more, or never came."""
        return not self.host or self.death() is not None

    def death(self) -> str | None:
        """How it is known that it works no more; None if it may."""
        if self.ended:
            return "has ended"
        silent = time.monotonic() - self._since
        if not self.pulse() and silent > self._timeout:
            return f"has given no sign of life for {silent:.0f} seconds"
        return "has died" if self._here and self.gone() else None

    @property
    def _here(self) -> bool:
        """Whether it runs on this machine."""
        return self._machine == machine() != ""

    def gone(self) -> bool:
        """Whether nobody holds its lock. To be believed on the same machine only."""
        return not _held(self._base.with_suffix(".lock"))


def hello() -> Message:
    """How a process introduces itself."""
    return {"host": socket.gethostname(), "machine": machine(), "pid": os.getpid()}


def call(folder: Path, world: World, run: str) -> None:
    """Has the ranks of a world come to a run. The folder is empty.

    Raises:
        StorageError: It cannot be written.
    """
    new = folder / f"{_CALL}.new"
    data = json.dumps({"run": run, "launch": world.launch, "size": world.size}).encode()
    try:
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            write_all(fd, data, new)
        finally:
            os.close(fd)
        os.rename(new, folder / _CALL)
    except OSError as error:
        raise storage_error(error, folder) from error


def called(folder: Path, world: World) -> str | None:
    """The run to which rank 0 of this launch calls, alive or dead; None while there is none."""
    try:
        found = json.loads(read_bounded(folder / _CALL, _LARGEST_CALL, follow=False))
    except (CkptkitError, ValueError, RecursionError):
        return None
    match found:
        case {"run": str() as run, "launch": world.launch, "size": world.size} if run.isalnum():
            return run
    return None


def clear(folder: Path) -> None:
    """Removes what an earlier run left, once its ranks have ended.

    Raises:
        UsageError: One of them still lives, and could write into the files.
        StorageError: The folder cannot be removed.
    """
    deadline = time.monotonic() + _OLD_RANKS
    if folder.is_symlink():
        return  # whoever removes the partial directory removes it, and a resume refuses links
    with _storage(folder):
        while (alive := next(filter(_held, sorted(folder.glob("*.lock"))), None)) is not None:
            if time.monotonic() > deadline:
                rank = alive.stem.rpartition("-")[2]
                hint = "end it: it may be stopped, or on another machine"
                raise UsageError(f"rank {rank} of an earlier run still lives", where=folder, hint=hint)
            time.sleep(0.1)
        with suppress(FileNotFoundError):
            shutil.rmtree(folder)


@contextmanager
def _storage(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_error(error, where) from error


def _held(path: Path) -> bool:
    """Whether somebody holds the lock of a file that exists."""
    try:
        fd = open_regular(path, follow=False)
    except (OSError, InputError):
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False


def _read(path: Path, position: int) -> bytes:
    """What a file holds from a byte on; nothing if there is no such file yet."""
    try:
        fd = open_regular(path, follow=False)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise storage_error(error, path) from error
    try:
        return os.pread(fd, _LARGEST_READ, position)
    except OSError as error:
        raise storage_error(error, path) from error
    finally:
        os.close(fd)


def _message(line: bytes, path: Path) -> Message:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InputError("not what a rank says", where=path, hint="does another program write there?")
    return found
