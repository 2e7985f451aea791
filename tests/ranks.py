"""Ranks of one world, as threads or as processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from ckptkit.errors import CkptkitError
from ckptkit.io.world import World

ROOT = Path(__file__).parents[1]
Answer = TypeVar("Answer")


def own_environment(**variables: str) -> dict[str, str]:
    """Variables of a Python process that finds this project and whatever this one finds by PYTHONPATH."""
    places = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1", **variables}


def torchrun_on_cpu(program: Path, ranks: int, *arguments: object) -> str:
    """What a program prints that torchrun starts on CPU ranks; it has to succeed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=own_environment(CUDA_VISIBLE_DEVICES=""))
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def in_threads(
    size: int, work: Callable[[World], Answer], *, timeout: float = 60.0, restarted: bool = False
) -> list[Answer | BaseException]:
    """What `work` gives, or raises, on each rank of a world of threads."""
    found: list[Answer | BaseException] = [RuntimeError("not done")] * size

    def do(rank: int) -> None:
        try:
            found[rank] = work(World(rank, size, "a launch", restarted, timeout))
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=do, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def start_processes(
    size: int,
    work: Callable[[World], object],
    *,
    timeout: float = 60.0,
    faults: Mapping[int, str] | None = None,
) -> list[int]:
    """Starts a process for each rank, which ends with the exit code of what `work` raises; their ids."""
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                os.environ["CKPTKIT_FAULT"] = (faults or {}).get(rank, "")
                work(World(rank, size, "a launch", False, timeout))
                code = 0
            except CkptkitError as error:
                code = error.exit_code
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    return pids


def exit_codes(pids: list[int], within: float = 60.0) -> list[int | None]:
    """How processes ended: an exit code, the negative number of a signal, or None for one that did not end in time."""
    deadline = time.monotonic() + within
    found: list[int | None] = [None] * len(pids)
    while None in found and time.monotonic() < deadline:
        for index, pid in enumerate(pids):
            if found[index] is None and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                found[index] = os.waitstatus_to_exitcode(ended[1])
        time.sleep(0.01)
    return found
