"""The parallel grid: how many ways a model is split, and the ranks that follow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ckptkit.errors import UsageError


@dataclass(frozen=True, slots=True)
class Parallelism:
    """Sizes of a Megatron grid.

    Attributes:
        tp: Tensor model parallel size.
        pp: Pipeline model parallel size.
        vpp: Virtual pipeline size: model chunks on each pipeline rank.
        first_stage_layers: Layers on the first pipeline stage, or None for an even share.
        last_stage_layers: Layers on the last pipeline stage, or None for an even share.
        embedding_in_split: Count the embedding as a layer when splitting (`--account-for-embedding-in-pipeline-split`).
        loss_in_split: Count the loss as a layer when splitting (`--account-for-loss-in-pipeline-split`).
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    embedding_in_split: bool = False
    loss_in_split: bool = False

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "vpp"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.vpp > 1 and self.pp == 1:
            raise UsageError("--vpp needs --pp above 1", hint="virtual stages exist only inside a pipeline")

    @property
    def world_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tp * self.pp

    def ranks(self) -> Iterator[tuple[int, int]]:
        """(pp_rank, tp_rank) in the order of Megatron's global ranks: tensor parallel ranks are neighbours."""
        for pp_rank in range(self.pp):
            for tp_rank in range(self.tp):
                yield pp_rank, tp_rank

    def __str__(self) -> str:
        text = f"TP{self.tp} x PP{self.pp}"
        return text if self.vpp == 1 else f"{text} x VPP{self.vpp}"
