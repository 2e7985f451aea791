"""A model in the memory of running ranks as a checkpoint: the same tables join its shards, wherever their bytes are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.description import Given, complete
from ckptkit.checkpoints.locating import Place
from ckptkit.checkpoints.opening import with_extras
from ckptkit.checkpoints.readers import join_ranks
from ckptkit.formats.hf import open_reference
from ckptkit.formats.quantised.archive import dequantised
from ckptkit.formats.torch_legacy import RankFile, RankKey
from ckptkit.sharding.grid import Parallelism, StatedGrid

NAME = Path("the running model")
"""Where it is, for messages."""


def open_running(ranks: Mapping[RankKey, RankFile], grid: Parallelism, reference: str | Path) -> Checkpoint:
    """The checkpoint that ranks hold.

    Args:
        ranks: (pp_rank, tp_rank, ep_rank) -> chunk -> Megatron's name -> tensor, whose regions name memory.
        grid: Their grid.
        reference: Hugging Face directory with config.json, tokenizer and shard map.

    Raises:
        InputError: Tensors are missing, unknown or mis-shaped; or the reference is damaged.
        UnsupportedError: No family of ours.
    """
    files = complete(dequantised(open_reference(Path(reference))))[0]
    given = Given(files, StatedGrid(), None)
    return with_extras(join_ranks(Place(NAME, NAME), ranks, grid, {}, given), files)
