"""The processes of a pool: how they start, are spoken to, and end.

On the CPU one process imports torch and megatron-core, and every rank is forked from it: the imports take longer than a
small model runs. CUDA does not survive a fork, so there each rank imports for itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import threading
from pathlib import Path

GRACE = 5.0
"""Seconds that the process which forked the ranks gets to end them."""
TAIL_LINES, TAIL_CHARACTERS = 3, 400


class Processes:
    """Worker processes, each of which can be any rank of a job. They start at once, and answer when they are ready.

    Args:
        count: How many.
        folder: Where their standard error goes.
        device: `cpu` or `cuda`; what is started for the CPU runs nothing else.

    Attributes:
        device: As given.
        replies: (number of a process, a line that it wrote), or (number, None) when it has ended.
    """

    def __init__(self, count: int, folder: Path, device: str) -> None:
        self.device = device
        self.replies: queue.SimpleQueue[tuple[int, str | None]] = queue.SimpleQueue()
        self._folder, self._ready, self._codes = folder, False, dict[int, int]()
        # Fork is the habit of Linux; the libraries of macOS do not survive it.
        self._forked = device == "cpu" and sys.platform == "linux" and count > 1
        pairs = [socket.socketpair() for _ in range(count)]
        self._channels = [ours for ours, _ in pairs]
        ends = [theirs for _, theirs in pairs]
        groups = [range(count)] if self._forked else [range(number, number + 1) for number in range(count)]
        self._started = [self._start(group, [ends[number] for number in group], count) for group in groups]
        for number, channel in enumerate(self._channels):
            ends[number].close()
            threading.Thread(target=self._forward, args=(number, channel, self.replies), daemon=True).start()

    @property
    def pids(self) -> list[int]:
        """Process ids of the processes that were started directly."""
        return [process.pid for process in self._started]

    def send(self, number: int, line: str) -> None:
        """Send a line. That a process is dead is told by `replies`, not here."""
        with contextlib.suppress(OSError):
            self._channels[number].sendall(f"{line}\n".encode())

    def exit_code(self, number: int) -> int:
        """The exit code of a process that has ended, or minus the signal that killed it."""
        if not self._forked:
            return self._started[number].wait()
        (parent,) = self._started
        assert parent.stdout is not None
        while number not in self._codes:
            line = parent.stdout.readline()
            if not line:  # the parent has ended itself, and so have the ranks
                return parent.wait()
            self._codes.update([json.loads(line)])
        return self._codes[number]

    def tail(self, number: int) -> str:
        """The end of what a process, or the one that was to fork it, wrote to standard error."""
        for path in (self._stderr(number), self._stderr(0)):
            text = path.read_text(errors="replace") if path.exists() else ""
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            if lines:
                return " | ".join(lines[-TAIL_LINES:])[-TAIL_CHARACTERS:]
        return "(nothing)"

    def kill(self) -> None:
        """End all processes, and wait until they have."""
        for channel in self._channels:
            with contextlib.suppress(OSError):
                channel.shutdown(socket.SHUT_RDWR)
            channel.close()
        for process in self._started:
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            if self._forked and self._ready:  # it kills the ranks, and reaps them
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
            process.kill()
            process.wait()
            process.stdout.close()

    def _start(self, numbers: range, ends: list[socket.socket], count: int) -> subprocess.Popen[str]:
        descriptors = [end.fileno() for end in ends]
        words = [self.device, str(self._folder), str(numbers.start), *map(str, descriptors)]
        with open(self._stderr(numbers.start), "w") as stderr:
            return subprocess.Popen(
                # -P: what lies in the current directory, a checkout of Megatron-LM perhaps, is not imported.
                [sys.executable, "-P", "-m", "ckptkit.verification.ranks.worker", *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=_environment(count),
                pass_fds=descriptors,
            )

    def _stderr(self, number: int) -> Path:
        return stderr_of(self._folder, number)

    def _forward(self, number: int, channel: socket.socket, replies: queue.SimpleQueue[tuple[int, str | None]]) -> None:
        """Pass a process's lines on; None when it ends."""
        with contextlib.suppress(OSError), channel.makefile("r", encoding="utf-8") as lines:
            for line in lines:
                self._ready = True
                replies.put((number, line))
        replies.put((number, None))


def stderr_of(folder: Path, number: int) -> Path:
    """The file for the standard error of a process; before it is forked, the first one's has that of all."""
    return folder / f"rank_{number}.stderr"


def _environment(count: int) -> dict[str, str]:
    """The environment of a worker: it finds the same modules, and the ranks share the cores."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    environment.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's, which start with the import; ranks have torch's
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the ranks are all here; the host's name may not resolve
    return environment
