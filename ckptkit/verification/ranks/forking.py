"""Forking the ranks of a pool from a process that has imported what they need."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from ckptkit.verification.ranks.processes import stderr_of


def fork_each(
    channels: Sequence[socket.socket], folder: Path, serve: Callable[[socket.socket], None], again: Sequence[str]
) -> None:
    """Fork a process for each channel, and report how each ends; return when all have.

    A report is a line of JSON on standard output: the number of the process, and its exit code, or minus the signal
    that killed it. When standard input ends, the processes are killed.

    Args:
        channels: What each process talks through.
        folder: Where their standard error goes.
        serve: What each does.
        again: The command that starts a process anew; the number of the process and the descriptor of its channel are
            appended. A process with threads cannot be forked safely, so it is taken where an import has started some.
    """
    alone = _threads() == 1
    gc.freeze()  # what is there stays in pages that all share
    numbers = {
        _fork(number, channels, folder, serve, None if alone else again): number for number in range(len(channels))
    }
    for channel in channels:
        channel.close()
    alive, lock = set(numbers), threading.Lock()
    threading.Thread(target=_kill_at_the_end, args=(alive, lock), daemon=True).start()
    while alive:
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        with lock:  # until it is reaped, its number is nobody else's
            alive.discard(ended.si_pid)
            _, status = os.waitpid(ended.si_pid, 0)
        print(json.dumps([numbers[ended.si_pid], os.waitstatus_to_exitcode(status)]), flush=True)


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _kill_at_the_end(alive: set[int], lock: threading.Lock) -> None:
    while os.read(0, 1):
        pass
    with lock:
        for pid in alive:
            os.kill(pid, signal.SIGKILL)


def _fork(
    number: int,
    channels: Sequence[socket.socket],
    folder: Path,
    serve: Callable[[socket.socket], None],
    again: Sequence[str] | None,
) -> int:
    """The process id of a forked process; the process itself never returns."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    with contextlib.suppress(BaseException):
        _redirect(stderr_of(folder, number))
        for other in channels:
            if other is not channels[number]:
                other.close()  # or its end would not be seen
        if again is not None:
            os.execv(again[0], [*again, str(number), str(channels[number].fileno())])
        serve(channels[number])
        code = 0
    with contextlib.suppress(BaseException):
        sys.stderr.flush()
    os._exit(code)


def _redirect(stderr: Path) -> None:
    """Nothing to read, and all output into a file. The first process goes on in the file that has the imports'."""
    for target, path, flags in ((0, os.devnull, os.O_RDONLY), (2, stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND)):
        descriptor = os.open(path, flags, 0o600)
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.dup2(2, 1)
