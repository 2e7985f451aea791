"""The world is what a launcher says in the environment, and one process where none does."""

from __future__ import annotations

import pytest

from ckptkit.errors import UsageError
from ckptkit.io.world import World

STEP = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "job", "TORCHELASTIC_RESTART_COUNT": "0"}


def test_launchers() -> None:
    assert World.of({}) == World()
    assert World.of(STEP) == World(3, 8, "7 0")
    assert World.of({**STEP, "SLURM_RESTART_COUNT": "1"}) == World(3, 8, "7 0 1", restarted=True)
    assert World.of(TORCHRUN) == World(1, 2, "job 0")
    assert World.of({**STEP, **TORCHRUN}) == World(1, 2, "job 0")  # torchrun in a step of Slurm
    again = World.of({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "2"})
    assert again.restarted and again.launch != "job 0"


def test_a_batch_script_is_one_process() -> None:
    """It has the variables of Slurm, and no step."""
    assert World.of({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}) == World()


@pytest.mark.parametrize("rank", ["2", "-1", "one", "1.0"])
def test_impossible_ranks(rank: str) -> None:
    with pytest.raises(UsageError, match="RANK="):
        World.of({"RANK": rank, "WORLD_SIZE": "2"})


def test_the_timeout() -> None:
    assert World.of({"CKPTKIT_RANK_TIMEOUT": "2.5"}).timeout == 2.5
    for text in ("0", "nan", "soon", "1e9"):
        with pytest.raises(UsageError, match="CKPTKIT_RANK_TIMEOUT"):
            World.of({"CKPTKIT_RANK_TIMEOUT": text})
