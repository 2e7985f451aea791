"""Which rank holds what of a checkpoint, as facts for a report."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.io.stores.mirror import shown
from ckptkit.sharding.grid import Parallelism
from ckptkit.sharding.rules import expert_home
from ckptkit.sharding.stages import split_layers

_LAYER = re.compile(r"\blayers\.(?P<layer>\d+)\.")
_BEFORE = ("embed", "per_layer")
"""Words in the names of what is before the layers."""


@dataclass(frozen=True)
class ChunkPlacement:
    """One model chunk of one rank.

    Attributes:
        vp_stage: Virtual pipeline stage.
        layers: Global numbers of its layers.
        embedding: Whether it begins with the embedding.
        head: Whether it ends with the final norm and the head.
    """

    vp_stage: int
    layers: list[int]
    embedding: bool
    head: bool


@dataclass(frozen=True)
class RankPlacement:
    """One rank.

    Attributes:
        rank: Global rank.
        pp: Pipeline rank.
        tp: Tensor parallel rank of everything but experts.
        ep: Expert parallel rank.
        etp: Tensor parallel rank of experts.
        experts: Numbers of the experts that it holds of each layer that has any.
        chunks: Its model chunks, in order of virtual stages.
    """

    rank: int
    pp: int
    tp: int
    ep: int
    etp: int
    experts: list[int]
    chunks: list[ChunkPlacement]


@dataclass(frozen=True)
class SideReport:
    """Facts about one side.

    Attributes:
        path: Where it is.
        format: `hf`, `packed`, `torch` or `torch_dist`.
        architecture: Hugging Face's name of the model class.
        num_layers: Decoder layers.
        moe_layers: Numbers of those that have experts.
        parameters: How many, each counted once.
        grid: Sizes of the parallel grid, and the grid in words as `name`.
        ranks: The ranks of that grid.
        sha256: SHA-256 of its tensors, the same for every layout of the same weights, or None where it was not asked
            for.
    """

    path: str
    format: str
    architecture: str
    num_layers: int
    moe_layers: list[int]
    parameters: int
    grid: dict[str, Any] = field(default_factory=dict)
    ranks: list[RankPlacement] = field(default_factory=list)
    sha256: str | None = None


def describe(checkpoint: Checkpoint, grid: Parallelism | None = None, sha256: str | None = None) -> SideReport:
    """The facts about an opened checkpoint, on its own grid or on the one that it runs on, and its hash, if known."""
    config, grid = checkpoint.config, grid or checkpoint.grid
    return SideReport(
        path=shown(str(checkpoint.path)),
        format=checkpoint.format,
        architecture=config.architecture,
        num_layers=config.num_layers,
        moe_layers=[number for number, layer in enumerate(config.layers) if layer.moe],
        parameters=checkpoint.parameters,
        grid={"name": str(grid), "tp": grid.tp, "pp": grid.pp, "vpp": grid.vpp, "ep": grid.ep, "etp": grid.expert_tp},
        ranks=placement(config.num_layers, config.num_experts, grid),
        sha256=sha256,
    )


def place_of(name: str) -> tuple[float, str]:
    """Where a tensor is: a number that orders the places of a model, and the name of that place.

    Args:
        name: Its Hugging Face name, or Megatron's.

    Returns:
        `embedding`, `layer 0`, ..., or `head` for everything behind the layers.
    """
    if match := _LAYER.search(name):
        layer = int(match["layer"])
        return layer, f"layer {layer}"
    return (-1, "embedding") if any(word in name for word in _BEFORE) else (math.inf, "head")


def placement(num_layers: int, num_experts: int, grid: Parallelism) -> list[RankPlacement]:
    """The content of each rank of a grid, in order of global ranks."""
    stages = split_layers(num_layers, grid)
    return [
        RankPlacement(
            rank=number,
            **rank._asdict(),
            experts=[e for e in range(num_experts) if expert_home(e, num_experts, grid.ep)[0] == rank.ep],
            chunks=[
                ChunkPlacement(stage.vp_stage, list(stage.layers), stage.first, stage.last)
                for stage in stages
                if stage.pp_rank == rank.pp
            ],
        )
        for number, rank in enumerate(grid.ranks())
    ]
