"""Which ranks of a grid hold a difference."""

from __future__ import annotations

from ckptkit.checkpoints.checkpoint import Checkpoint, is_on
from ckptkit.io.reading import difference
from ckptkit.sharding.grid import Parallelism, Rank
from ckptkit.sharding.rules import expert_home, pad_rows
from ckptkit.sharding.stages import split_layers
from ckptkit.tables.items import Item


def guilty_ranks(reference: Checkpoint, candidate: Checkpoint, key: str, grid: Parallelism) -> list[int]:
    """Global ranks whose shards of a tensor differ; all that hold any of it where only parts of it are compared.

    Args:
        reference: The side that is trusted.
        candidate: The side in question.
        key: Canonical name of a tensor of equal shape in both.
        grid: The candidate's grid.
    """
    item, right = candidate.items[key], candidate.tensors[key]
    left, split = reference.tensors[key].astype(right.out_dtype), item.split(candidate.spelling)
    if split.padded:
        rows = max(candidate.padded_vocab_size, right.shape[0])
        left, right = pad_rows(left, rows), pad_rows(right, rows)
    known: dict[tuple[int, int], bool] = {}

    def differs(rank: Rank) -> bool:
        shard = (rank.etp, grid.expert_tp) if split.expert else (rank.tp, grid.tp)
        if shard not in known:
            known[shard] = bool(item.slots) or difference(split.cut(left, *shard), split.cut(right, *shard)) is not None
        return known[shard]

    return [number for number, rank in enumerate(grid.ranks()) if _holds(candidate, item, rank, grid) and differs(rank)]


def _holds(checkpoint: Checkpoint, item: Item, rank: Rank, grid: Parallelism) -> bool:
    """Whether a rank holds a tensor, or a shard of it."""
    if item.expert is not None and expert_home(item.expert, checkpoint.config.num_experts, grid.ep)[0] != rank.ep:
        return False
    stages = split_layers(checkpoint.config.num_layers, grid)
    return any(is_on(item, stage, grid) for stage in stages if stage.pp_rank == rank.pp)
