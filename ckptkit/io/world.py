"""The processes that carry out one plan together, as a launcher describes them in the environment.

torchrun says it with RANK and WORLD_SIZE, Slurm's srun with SLURM_PROCID and SLURM_NTASKS. An sbatch script has the
variables of Slurm, too, although it is one process, so these count inside a step only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ckptkit.errors import UsageError

TIMEOUT_VARIABLE = "CKPTKIT_RANK_TIMEOUT"
_TIMEOUT, _ARRIVAL = 60.0, 5
_MOST = 1 << 16


@dataclass(frozen=True)
class World:
    """This process among those that carry out one plan.

    Attributes:
        rank: Its number, from 0.
        size: How many there are.
        launch: What the launcher calls this start of all of them; empty if it does not say.
        restarted: Whether the launcher starts them again after a failure.
        timeout: Seconds without a sign of life after which a process counts as dead.
    """

    rank: int = 0
    size: int = 1
    launch: str = ""
    restarted: bool = False
    timeout: float = _TIMEOUT

    @property
    def first(self) -> bool:
        """Whether this process plans, checks and commits."""
        return self.rank == 0

    @property
    def arrival(self) -> float:
        """Seconds to wait for processes that the launcher starts: they may come one after another."""
        return self.timeout * _ARRIVAL

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> World:
        """The world that the environment describes.

        Raises:
            UsageError: The variables are no numbers, or contradict each other.
        """
        timeout = _seconds(environment)
        if environment.get("WORLD_SIZE") and environment.get("RANK"):
            rank, size = _numbers(environment, "RANK", "WORLD_SIZE")
            restarts = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
            names: tuple[str, ...] = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT")
        elif environment.get("SLURM_STEP_ID") and environment.get("SLURM_PROCID") and environment.get("SLURM_NTASKS"):
            rank, size = _numbers(environment, "SLURM_PROCID", "SLURM_NTASKS")
            restarts = environment.get("SLURM_RESTART_COUNT", "0")
            names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        else:
            return cls(timeout=timeout)
        launch = " ".join(environment.get(name, "") for name in names).strip()
        return cls(rank, size, launch, restarts not in ("", "0"), timeout)


ALONE = World()
"""One process."""


def _numbers(environment: Mapping[str, str], rank: str, size: str) -> tuple[int, int]:
    given = f"{rank}={environment[rank]!r}, {size}={environment[size]!r}"
    hint = f"start it with torchrun or srun, or unset {size}"
    try:
        number, count = int(environment[rank]), int(environment[size])
    except ValueError:
        raise UsageError("the environment names no rank", where=given, hint=hint) from None
    if not 0 <= number < count <= _MOST:
        raise UsageError("the environment names a rank that cannot be", where=given, hint=hint)
    return number, count


def _seconds(environment: Mapping[str, str]) -> float:
    text = environment.get(TIMEOUT_VARIABLE, "")
    try:
        seconds = float(text) if text else _TIMEOUT
    except ValueError:
        seconds = -1.0
    if not 1 <= seconds <= 86400:
        raise UsageError(f"{text!r} is no number of seconds from 1 to 86400", where=TIMEOUT_VARIABLE)
    return seconds
