"""What a rank's attention has to know of a batch, found out once, before any layer runs.

A plan travels with the batch in megatron-core's `PackedSeqParams`, which every layer is given, and given again where
its activations are recomputed. Its tensors are on the device; layers only read them, so none waits for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from ckptkit.megatron.context_parallel.cut import Cut
from ckptkit.megatron.masks import QUERY_BLOCK, Block, causal_block
from ckptkit.megatron.packed_inputs.batch import PackedBatch


@dataclass(frozen=True, eq=False)
class Plan:
    """A rank's plan of a batch.

    Attributes:
        order: Where each token is in what is gathered from all ranks, int64 (total,).
        positions: Places of the rank's tokens in their sequences, int64 (total / ranks,).
        following: Where the token after each of them is in what is gathered, int64 (total / ranks,); `total` behind the
            end of a sequence.
        blocks: Window (None for none) -> which of all tokens the rank's own ones see.
    """

    order: torch.Tensor
    positions: torch.Tensor
    following: torch.Tensor
    blocks: Mapping[int | None, list[Block]]

    @classmethod
    def of(cls, cut: Cut, rank: int, windows: Iterable[int | None], device: torch.device) -> Plan:
        """The plan for the layers of some windows.

        Args:
            cut: How the row is cut.
            rank: Context parallel rank.
            windows: Visible tokens of each layer including the current one, or None for all before it.
            device: Where the layers run.
        """
        return cls(
            cut.order().to(device),
            cut.positions(rank).to(device),
            cut.following(rank).to(device),
            {window: _blocks(cut, rank, window, device) for window in windows},
        )


def _blocks(cut: Cut, rank: int, window: int | None, device: torch.device) -> list[Block]:
    blocks: list[Block] = []
    at = 0
    for first, chunk in cut.chunks(rank):
        for start in range(chunk.start, chunk.stop, QUERY_BLOCK):
            tokens = range(start, min(start + QUERY_BLOCK, chunk.stop))
            blocks.append(causal_block(at, tokens, first, window, device))
            at += len(tokens)
    return blocks


@dataclass
class PlannedParams(PackedSeqParams):
    """megatron-core's parameters of a batch, with a plan.

    Plain rows have the format `sbhd`: for megatron-core they are not packed.

    Attributes:
        plan: The plan.
    """

    plan: Plan | None = None


def planned(batch: PackedBatch | None, plan: Plan) -> PlannedParams:
    """The parameters of a packed batch, or of plain rows (None)."""
    if batch is None:
        return PlannedParams(qkv_format="sbhd", plan=plan)
    return PlannedParams(**vars(batch.params()), plan=plan)


def plan_of(params: PackedSeqParams | None) -> Plan | None:
    """The plan that came with a batch."""
    return params.plan if isinstance(params, PlannedParams) else None


def is_packed(params: PackedSeqParams | None) -> bool:
    """Whether megatron-core takes a batch for packed."""
    return params is not None and params.qkv_format == "thd"
