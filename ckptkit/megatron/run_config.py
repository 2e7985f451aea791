"""How a model runs: one record, made once, and read by ranks, levels and reports."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ckptkit.megatron import DDP
from ckptkit.sharding.grid import Parallelism

CAPACITY = 8192
"""Tokens that go through a model at a time by default."""


@dataclass(frozen=True)
class RunConfig:
    """A run of one side.

    How long a sequence the model takes is in the model's config; nothing here changes it.

    Attributes:
        grid: Where it runs; one rank for transformers.
        cp: Ranks that share out every sequence.
        dp: Replicas of the grid.
        dp_kind: Wrapper of the replicas: `ddp` or `fsdp2`.
        sequence_parallel: Whether the sequence is split over tensor parallel ranks outside of the linears.
        packed: Whether sequences are joined in one row.
        capacity: Tokens that go through at a time, unless one sequence is longer; packed, in one row.
        window: The widest sliding window of a layer in tokens, the current one included; 0 without one.
        device: `cpu` or `cuda`.
        dtype: torch's name of the dtype of parameters and activations.
        recompute: Whether only the inputs of layers are kept for the way back.
    """

    grid: Parallelism = Parallelism()  # noqa: RUF009  frozen
    cp: int = 1
    dp: int = 1
    dp_kind: str = DDP
    sequence_parallel: bool = False
    packed: bool = False
    capacity: int = CAPACITY
    window: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    recompute: bool = False

    @property
    def world_size(self) -> int:
        """Ranks that it needs.

        Context parallel ranks are counted within the tensor parallel ones for everything but experts, and are ranks
        like any others for these (source: `initialize_model_parallel` of megatron-core).
        """
        grid = self.grid
        return grid.pp * math.lcm(grid.tp * self.cp, grid.ep * grid.expert_tp) * self.dp

    @property
    def copies(self) -> int:
        """How many times its ranks hold the model."""
        return self.world_size // self.grid.world_size

    @property
    def changes_candidate(self) -> bool:
        """Whether a candidate runs in another way than a reference does."""
        return self.packed or self.sequence_parallel or self.dp > 1 or self.cp > 1

    def __str__(self) -> str:
        return f"{self.grid}, {self.device}"
