"""Processes that act as ranks: a pool that is started once, or the processes that torchrun started."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import queue
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeVar

from ckptkit.errors import UsageError, VerificationError
from ckptkit.steps import Step, Tell, nobody
from ckptkit.verification.ranks.jobs import LogitsJob, decode_error, encode_error
from ckptkit.verification.ranks.processes import Processes

if TYPE_CHECKING:
    import torch.distributed as dist

T = TypeVar("T")

START_TIMEOUT = 300.0
"""Seconds for a rank to import torch and megatron-core."""
GRACE = 5.0
"""Seconds that the other ranks get to answer once one has failed."""
LONG = 24 * 3600.0
"""Seconds that a process waits for what another one does alone: a run of transformers may take its time."""


class Ranks(Protocol):
    """Something that runs a job on all its ranks."""

    def run(self, job: LogitsJob, tell: Tell = nobody) -> list[dict[str, Any]]:
        """Run a job and return every rank's answer, in order of ranks; `tell` is told what the first rank is at."""
        ...

    def once(self, task: Callable[[], T]) -> T:
        """Do `task` in one process only; its result (JSON types) is known to all."""
        ...

    def wait_for_all(self) -> None:
        """Return once every process of the caller's program has come here."""
        ...


class RankPool:
    """Worker processes on this machine, each of which can be any rank of a job.

    The processes start with the first job, or before it with `begin`, and stay for the next ones. After a failure that
    may have left ranks waiting for one another they are killed, and start again with the next job; also where they were
    started for another device.

    Args:
        world_size: Largest number of ranks that a job may need.
        start_timeout: Seconds for the processes to start.
    """

    def __init__(self, world_size: int, start_timeout: float = START_TIMEOUT) -> None:
        self.world_size = world_size
        self.start_timeout = start_timeout
        self._processes: Processes | None = None
        self._ready = False
        self._folder = tempfile.TemporaryDirectory(prefix="ckptkit-ranks-")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def once(self, task: Callable[[], T]) -> T:
        """Do `task` here: there is only one caller."""
        return task()

    def wait_for_all(self) -> None:
        """Return at once: there is only one caller."""

    def begin(self, device: str = "cpu") -> Processes:
        """Let the processes start while the caller does something else, if they are not running."""
        if self._processes is not None and self._processes.device != device:
            self._kill()
        if self._processes is None:
            self._processes = Processes(self.world_size, Path(self._folder.name), device)
        return self._processes

    def start(self, device: str = "cpu") -> Processes:
        """Start the processes, if they are not running, and wait until they have.

        Raises:
            VerificationError: One of them ended or took too long.
        """
        processes = self.begin(device)
        if not self._ready:
            with self._killed_unless_done():
                self._collect(processes, range(self.world_size), self.start_timeout, "starting the ranks")
            self._ready = True
        return processes

    def run(self, job: LogitsJob, tell: Tell = nobody) -> list[dict[str, Any]]:
        """Run a job on the first `job.run.world_size` processes.

        Args:
            job: The job.
            tell: Told what the first rank is at.

        Returns:
            Each rank's answer, in order of ranks.

        Raises:
            UsageError: The pool is too small.
            VerificationError: A rank died, took too long, or failed.
            CkptkitError: What a rank raised.
        """
        if job.run.world_size > self.world_size:
            raise UsageError(f"{job.run.grid} needs {job.run.world_size} ranks, the pool has {self.world_size}")
        tell(Step("starting the ranks"))
        processes = self.start(job.run.device)
        meeting_point = str(Path(self._folder.name) / uuid.uuid4().hex)
        for rank in range(job.run.world_size):
            processes.send(rank, json.dumps({"rank": rank, "meeting_point": meeting_point, "job": job.to_json()}))
        with self._killed_unless_done():
            answers = self._collect(processes, range(job.run.world_size), job.options.timeout, str(job), tell)
        return [answers[rank]["result"] for rank in range(job.run.world_size)]

    def close(self) -> None:
        """End the processes."""
        self._kill()
        self._folder.cleanup()

    def _collect(
        self, processes: Processes, ranks: range, timeout: float, where: str, tell: Tell = nobody
    ) -> dict[int, dict[str, Any]]:
        """Wait for one answer of each rank, and pass on what it says before."""
        deadline = time.monotonic() + timeout
        answers: dict[int, dict[str, Any]] = {}
        failed: dict[str, str | None] | None = None
        while len(answers) < len(ranks):
            try:
                rank, line = processes.replies.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                waiting = [rank for rank in ranks if rank not in answers]
                if failed is None:
                    hint = "; ".join(f"rank {rank}: {processes.tail(rank)}" for rank in waiting[:2])
                    self._kill()
                    what = f"no answer from {_ranks(waiting)} within {timeout:g} seconds (--timeout)"
                    raise VerificationError(what, where=where, hint=hint) from None
                break
            if line is None:
                raise self._died(processes, rank, where)
            message = json.loads(line)
            if "step" in message:
                tell(Step(**message["step"]))
                continue
            answers[rank] = message
            if failed is None and "error" in answers[rank]:
                failed, deadline = answers[rank]["error"], min(deadline, time.monotonic() + GRACE)
        if failed is not None:
            if len(answers) < len(ranks):
                self._kill()
            raise decode_error(failed)
        return answers

    @contextlib.contextmanager
    def _killed_unless_done(self) -> Iterator[None]:
        """Whoever is interrupted while it waits must not leave answers for the next one."""
        try:
            yield
        except Exception:
            raise  # `_collect` has seen to the processes
        except BaseException:
            self._kill()
            raise

    def _died(self, processes: Processes, rank: int, where: str) -> VerificationError:
        code, tail = processes.exit_code(rank), processes.tail(rank)
        self._kill()
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        hint = f"its last words: {tail}" + ("; was the machine out of memory?" if code == -9 else "")
        return VerificationError(f"rank {rank} died ({how})", where=where, hint=hint)

    def _kill(self) -> None:
        processes, self._processes, self._ready = self._processes, None, False
        if processes is not None:
            processes.kill()


class TorchrunRanks:
    """The processes that torchrun started: every one of them runs the same program, and is its own rank."""

    # Counts for the life of the process: all meet in one store, whose keys must never be used twice.
    _calls: ClassVar[Iterator[int]] = itertools.count()

    def __init__(self) -> None:
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._store: dist.Store | None = None

    def run(self, job: LogitsJob, tell: Tell = nobody) -> list[dict[str, Any]]:
        """Run a job on the first `job.run.world_size` processes; the others wait.

        Args:
            job: The job.
            tell: Told, in the first process, what it is at.

        Raises:
            UsageError: There are too few processes.
            CkptkitError: What a rank raised.
        """
        if job.run.world_size > self.world_size:
            raise UsageError(f"{job.run.grid} needs {job.run.world_size} ranks, torchrun started {self.world_size}")
        from torch.distributed import PrefixStore

        from ckptkit.verification.ranks.worker import execute

        prefix = self._next()
        store = PrefixStore(prefix, self._meet())
        if self.rank < job.run.world_size:

            def failed(error: Exception) -> None:
                self._set(prefix, self.rank, {"error": encode_error(error)})

            self._put(prefix, self.rank, lambda: execute(job, self.rank, store, failed, tell))
        return [self._get(prefix, rank, job.options.timeout) for rank in range(job.run.world_size)]

    def once(self, task: Callable[[], T]) -> T:
        """Do `task` on rank 0; its result (JSON types) is known to all."""
        prefix = self._next()
        if self.rank == 0:
            self._put(prefix, 0, task)
        result: T = self._get(prefix, 0, LONG)
        return result

    def wait_for_all(self) -> None:
        """Return once every process has come here."""
        prefix = self._next()
        self._put(prefix, self.rank, lambda: None)
        for rank in range(self.world_size):
            self._get(prefix, rank, LONG)

    def _meet(self) -> dist.Store:
        if self._store is None:
            from torch.distributed import rendezvous

            from ckptkit.megatron import compat

            compat.import_megatron()
            self._store, _, _ = next(rendezvous("env://"))
        return self._store

    def _next(self) -> str:
        return f"ckptkit/{next(self._calls)}"

    def _put(self, prefix: str, rank: int, task: Callable[[], Any]) -> None:
        try:
            answer = {"result": task()}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": encode_error(error)}
        self._set(prefix, rank, answer)

    def _set(self, prefix: str, rank: int, answer: dict[str, Any]) -> None:
        self._meet().set(f"{prefix}/answer/{rank}", json.dumps(answer))

    def _get(self, prefix: str, rank: int, timeout: float) -> Any:
        key = f"{prefix}/answer/{rank}"
        try:
            self._meet().wait([key], datetime.timedelta(seconds=timeout))
        except RuntimeError as error:
            raise VerificationError(f"no answer from rank {rank} ({error})", where="torchrun") from None
        answer = json.loads(self._meet().get(key))
        if "error" in answer:
            raise decode_error(answer["error"])
        return answer["result"]


def inside_torchrun() -> bool:
    """Whether torchrun or another launcher started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _ranks(numbers: list[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
