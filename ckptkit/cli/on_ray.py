"""`--ray`: the ranks of a command as tasks on a Ray cluster.

This process is their launcher, as torchrun would be. Rank 0 is a process beside it, so that its progress and its result
are seen here; each other rank is a process inside a task. They meet as all ranks do, through files beside the output.
After a lost task the launcher starts all ranks again, and these go on where the journal ends.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptkit.cli.output import say
from ckptkit.errors import StorageError, UsageError

LAUNCHED = "CKPTKIT_ON_RAY"
"""Set for ranks that this launcher starts."""
RETRIES = 3
_OWN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_POLL, _HEARING, _LEAVING = 0.1, 15.0, 90.0  # seconds; ranks notice within 60 that rank 0 is gone
_PR_SET_PDEATHSIG = 1
_KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)
_TAIL = 4096
_CONNECTING = 10  # seconds


@dataclass(frozen=True)
class Ended:
    """How a rank ended.

    Attributes:
        code: Its exit code, negative for a signal.
        said: The end of what it said on stderr.
    """

    code: int
    said: str


def run_on_ray(address: str, processes: int | None, arguments: Sequence[str]) -> int:
    """Runs a command line of ckptkit with all its ranks, and starts them again if a task is lost.

    Args:
        address: Of the cluster, as `ray.init` takes it: `auto`, `HOST:PORT` or `ray://HOST:PORT`.
        processes: How many ranks there are; None for one on each node.
        arguments: The command line, without the program.

    Returns:
        The exit code of the command.

    Raises:
        UsageError: Ray is not installed, or there is no cluster at the address.
        StorageError: Tasks were lost time and again.
    """
    ray = _connected(address)
    try:
        run = secrets.token_hex(8)
        for attempt in range(RETRIES + 1):
            size = processes or max(1, sum(node["Alive"] for node in ray.nodes()))
            if size - 1 > (cores := int(ray.cluster_resources().get("CPU", 0))):
                raise UsageError(
                    f"{size} processes need {size - 1} CPUs of the cluster, which has {cores}", where=address
                )
            ranks = _Ranks(
                ray, size, arguments, {"TORCHELASTIC_RUN_ID": run, "TORCHELASTIC_RESTART_COUNT": str(attempt)}
            )
            code = ranks.run()
            if code == 0 or not ranks.lost:
                return code
            say(f"{', '.join(ranks.lost)}; all ranks start again where they were", label="warning", style="yellow")
        raise StorageError(f"tasks were lost {RETRIES + 1} times", where=address, hint="run again with --resume")
    finally:
        ray.shutdown()


def _connected(address: str) -> Any:
    """Ray's module, connected."""
    try:
        import ray
    except ImportError:
        raise UsageError(
            "Ray is not installed", where="--ray", hint="pip install 'ckptkit-megatron[ray]' on all nodes"
        ) from None
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # no GPU is asked for, and none hidden
    _knock(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"no Ray cluster answers: {reason}", where=f"--ray {address}", hint="ray status") from None
    return ray


def _knock(address: str) -> None:
    """Whether anything listens at HOST:PORT: Ray itself would try for minutes."""
    host, found, port = address.removeprefix("ray://").rpartition(":")
    if not found:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECTING).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UsageError(f"no Ray cluster answers: {error}", where=f"--ray {address}", hint="ray status") from None


@dataclass
class _Ranks:
    """All ranks of one start.

    Attributes:
        ray: The module.
        size: How many there are.
        arguments: The command line.
        variables: What the environment of each has, beside its number.
        lost: Sentences about tasks that did not end by themselves.
    """

    ray: Any
    size: int
    arguments: Sequence[str]
    variables: Mapping[str, str]
    lost: list[str] = field(default_factory=list)

    def run(self) -> int:
        """Starts the ranks and waits for them; the exit code."""
        task = self.ray.remote(num_cpus=1, max_retries=0, max_calls=1, scheduling_strategy="SPREAD")(_rank)
        own = {name: value for name, value in os.environ.items() if name.startswith("CKPTKIT_")}
        tasks = {
            task.remote(list(self.arguments), os.getcwd(), {**own, **self._environment(rank)}): rank
            for rank in range(1, self.size)
        }
        environment = {**os.environ, **self._environment(0)}
        first = subprocess.Popen([*_program(), *self.arguments], env=environment, preexec_fn=_end_with_parent())
        try:
            failed = self._watch(first, tasks)
            code = first.wait()
        except BaseException:  # a signal: rank 0 tells the others
            _stop(first)
            self._leave(tasks)
            raise
        self._leave(tasks)
        if code in _KILLED:
            self.lost.append("rank 0 was killed")
        if self.lost or failed is None:
            return code if code >= 0 else 128 - code
        return failed

    def _environment(self, rank: int) -> dict[str, str]:
        return {**self.variables, "RANK": str(rank), "WORLD_SIZE": str(self.size), LAUNCHED: "1"}

    def _watch(self, first: subprocess.Popen[bytes], tasks: dict[Any, int]) -> int | None:
        """Waits for rank 0; the exit code of another rank that failed and that rank 0 did not hear of."""
        running = dict(tasks)
        while first.poll() is None:
            if not running:
                time.sleep(_POLL)
                continue
            done, _ = self.ray.wait(list(running), timeout=_POLL)
            for one in done:
                rank = running.pop(one)
                ended = self._ended(one, rank)
                if ended is None:
                    _stop(first)
                elif ended.code:
                    return self._failed(first, rank, ended)
        return None

    def _ended(self, task: Any, rank: int) -> Ended | None:
        """How a rank ended; None if its task was lost."""
        try:
            ended = self.ray.get(task)
        except self.ray.exceptions.RayTaskError as error:
            return Ended(StorageError.exit_code, f"error: rank {rank}: {error.cause}")
        except self.ray.exceptions.RayError as error:
            self.lost.append(f"rank {rank} was lost ({type(error).__name__})")
            return None
        assert isinstance(ended, Ended)
        if ended.code in _KILLED:
            self.lost.append(f"rank {rank} was killed")
            return None
        return ended

    def _failed(self, first: subprocess.Popen[bytes], rank: int, ended: Ended) -> int | None:
        """A rank failed. It has told rank 0, unless it failed before they met."""
        try:
            first.wait(_HEARING)
        except subprocess.TimeoutExpired:
            _stop(first)
            lines = ended.said.strip().splitlines()
            say(lines[-1] if lines else f"error: rank {rank} ended with exit code {ended.code}")
            return ended.code if ended.code > 0 else 128 - ended.code
        return None

    def _leave(self, tasks: Mapping[Any, int]) -> None:
        """Waits until no rank is at work any more: one that is could write while the next start does."""
        if tasks:
            _, late = self.ray.wait(list(tasks), num_returns=len(tasks), timeout=_LEAVING)
            for task in late:
                self.ray.cancel(task, force=True)


def _rank(arguments: list[str], folder: str, variables: dict[str, str]) -> Ended:
    """Runs one rank in a process of its own, inside a task."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder} is not a folder on {os.uname().nodename}")
    environment = {name: value for name, value in os.environ.items() if name not in _OWN} | variables
    done = subprocess.run(
        [*_program(), *arguments],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=_end_with_parent(),
    )
    return Ended(done.returncode, done.stderr[-_TAIL:].decode(errors="replace"))


def _program() -> list[str]:
    return [sys.executable, "-m", "ckptkit"]


def _end_with_parent() -> Callable[[], None]:
    """Makes a new process end with the one that starts it, also if that is killed."""
    libc = ctypes.CDLL(None)

    def end() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    return end


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Asks rank 0 to end, which tells the others, and waits for it."""
    process.terminate()
    try:
        process.wait(_LEAVING)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
