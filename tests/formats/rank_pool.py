"""Processes that act as ranks of Megatron-Core for the tests, each started afresh and kept for many jobs.

They are never forked from one another: a process that comes from one in which CUDA is up cannot use it. Importing
megatron-core takes far longer than a job, so all tests share one pool; a job that fails ends its processes, because
the other ranks wait for the one that is gone, and the next job starts new ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT = 600.0
"""Seconds that a rank may take to import torch and megatron-core."""


class RankProcesses:
    """A pool of ranks.

    Args:
        size: How many.
        module: The program of a rank, started as `python -m MODULE RANK`. It answers a line on its standard output
            once it is ready and one for each job, which comes as a line of JSON on its standard input.
    """

    def __init__(self, size: int, module: str) -> None:
        self.size = size
        self.module = module
        self.starts = 0
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._meetings = 0

    def run(self, world_size: int, job: dict[str, Any], timeout: float = 300.0) -> str:
        """Runs a job on the first `world_size` ranks.

        Returns:
            What went wrong: nothing, or the end of what the ranks said.
        """
        assert world_size <= self.size
        try:
            self._start()
            self._meetings += 1
            meeting_point = str(Path(self._folder.name) / f"store_{self._meetings}")
            for process in self._processes[:world_size]:
                assert process.stdin is not None
                process.stdin.write(json.dumps({"job": job, "store": meeting_point}).encode() + b"\n")
                process.stdin.flush()
            self._collect(world_size, timeout)
        except (BrokenPipeError, ChildProcessError, TimeoutError) as error:
            self.close()
            return f"{job}: {error}\n{self._said(world_size)}"
        return ""

    def close(self) -> None:
        """Ends the processes and those that they started."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    assert pipe is not None
                    pipe.close()
        self._processes = []

    def __enter__(self) -> RankProcesses:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        self._folder.cleanup()

    def _start(self) -> None:
        if self._processes:
            return
        self.starts += 1
        self._processes = [self._spawn(rank) for rank in range(self.size)]
        self._collect(self.size, START_TIMEOUT)

    def _spawn(self, rank: int) -> subprocess.Popen[bytes]:
        own = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        environment = {key: value for key, value in os.environ.items() if key not in own}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *(path for path in sys.path if path)])
        environment.setdefault("OMP_NUM_THREADS", "1")
        if sys.platform == "linux":
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are here; the host's name may not resolve
        with self._log(rank).open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", self.module, str(rank)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def _collect(self, count: int, timeout: float) -> None:
        """Waits for one answer of each of the first `count` ranks.

        Raises:
            ChildProcessError: A rank failed or died.
            TimeoutError: One took too long.
        """
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as waiting:
            for rank, process in enumerate(self._processes[:count]):
                assert process.stdout is not None
                waiting.register(process.stdout, selectors.EVENT_READ, rank)
            while ranks := sorted(key.data for key in waiting.get_map().values()):
                ready = waiting.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise TimeoutError(f"no answer from ranks {ranks} within {timeout:g} seconds")
                for key, _ in ready:
                    answer = self._processes[key.data].stdout.readline()  # type: ignore[union-attr]
                    if answer.strip() != b"done":
                        raise ChildProcessError(f"rank {key.data} {'failed' if answer else 'died'}")
                    waiting.unregister(key.fileobj)

    def _log(self, rank: int) -> Path:
        return Path(self._folder.name) / f"rank_{rank}.log"

    def _said(self, world_size: int) -> str:
        logs = (self._log(rank) for rank in range(world_size))
        return "\n".join(log.read_text(errors="replace")[-6000 // world_size :] for log in logs if log.exists())


def incoming() -> Iterator[tuple[dict[str, Any], str]]:
    """The jobs of a rank, from within it: (job, path of its store). Asking for the next one reports the last as done.

    What anything else prints goes to standard error, which is the rank's log.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print("done", file=answers, flush=True)
    for line in sys.stdin:
        message = json.loads(line)
        try:
            yield message["job"], message["store"]
        except GeneratorExit:
            print("failed", file=answers, flush=True)
            raise
        print("done", file=answers, flush=True)
