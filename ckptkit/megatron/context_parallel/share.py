"""A rank's share of a batch, and the whole again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams

from ckptkit.megatron.context_parallel.attention import ContextParallelAttention
from ckptkit.megatron.context_parallel.cut import Cut
from ckptkit.megatron.context_parallel.plan import Plan, planned
from ckptkit.megatron.packed_inputs.batch import PackedBatch
from ckptkit.megatron.parallel import gather_over_context_ranks, gather_over_tensor_ranks


@dataclass(frozen=True, eq=False)
class Share:
    """A rank's share of a batch.

    Attributes:
        cut: How the batch is cut, or None if it is not.
        params: What layers are told of the batch, or None.
    """

    cut: Cut | None
    params: PackedSeqParams | None

    @classmethod
    def of(
        cls, chunks: Iterable[torch.nn.Module], length: int, packed: PackedBatch | None, device: torch.device
    ) -> Share:
        """The share of this rank, its attention planned.

        Args:
            chunks: The model chunks that it goes through.
            length: Tokens of a row; of each sequence, where rows are not packed.
            packed: The sequences of a packed row, or None.
            device: Where the chunks are.
        """
        packed = None if packed is None else packed.to(device)
        ranks = parallel_state.get_context_parallel_world_size()
        if ranks == 1:
            return cls(None, None if packed is None else packed.params())
        cut = Cut((0, length) if packed is None else tuple(packed.bounds), ranks)
        windows = {
            module.window
            for chunk in chunks
            for module in chunk.modules()
            if isinstance(module, ContextParallelAttention)
        }
        return cls(cut, planned(packed, Plan.of(cut, parallel_state.get_context_parallel_rank(), windows, device)))

    def part(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of [batch, length, ...]."""
        return whole if self.cut is None else self.cut.part(whole, parallel_state.get_context_parallel_rank(), 1)

    def whole(self, part: torch.Tensor) -> torch.Tensor:
        """The whole [batch, length, ...] of the parts of all ranks, on each of them."""
        return part if self.cut is None else self.cut.restored(gather_over_context_ranks(part, 1), 1)

    def experts(self, prescribed: Mapping[int, torch.Tensor], length: int) -> dict[int, torch.Tensor]:
        """This rank's part of prescribed experts; what fills rows up is left to the routers.

        Args:
            prescribed: Layer -> experts, int64 [batch, at most `length`, experts per token].
            length: Tokens of a row.
        """
        if self.cut is None:
            return dict(prescribed)
        return {
            layer: self.part(F.pad(chosen, (0, 0, 0, length - chosen.size(1)), value=-1))
            for layer, chosen in prescribed.items()
        }


def multiple_of(tensor_ranks: int) -> int:
    """The length of a sequence must be a multiple of this to be cut.

    Args:
        tensor_ranks: Tensor parallel ranks that share out what a context parallel rank has; 1 without sequence
            parallelism.
    """
    ranks = parallel_state.get_context_parallel_world_size()
    return tensor_ranks if ranks == 1 else 2 * ranks * tensor_ranks


def filled_up(batch: PackedBatch, tensor_ranks: int) -> tuple[PackedBatch, slice | torch.Tensor]:
    """A packed batch that can be shared out.

    Args:
        batch: The batch, in host memory.
        tensor_ranks: As for `multiple_of`.

    Returns:
        The batch with tokens that no other one sees, and where its own are.
    """
    multiple = multiple_of(tensor_ranks)
    if parallel_state.get_context_parallel_world_size() == 1:
        return batch.filled(multiple), slice(batch.total)
    filled, places = batch.each_filled(multiple)
    return filled.filled(multiple), places


def whole_sequence(part: torch.Tensor, sequence_parallel: bool) -> torch.Tensor:
    """The whole of plain rows [sequence, ...] from every rank's part, on each of them.

    Args:
        part: This rank's.
        sequence_parallel: Whether tensor parallel ranks share the sequence out, too.
    """
    joined = gather_over_context_ranks(gather_over_tensor_ranks(part, 0) if sequence_parallel else part, 0)
    ranks = parallel_state.get_context_parallel_world_size()
    return joined if ranks == 1 else Cut.of_length(len(joined), ranks).restored(joined, 0)
