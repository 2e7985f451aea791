"""Attention of a rank's tokens to those of all context parallel ranks.

megatron-core has this in Transformer Engine only.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from ckptkit.errors import VerificationError
from ckptkit.megatron.attention import ExactAttention
from ckptkit.megatron.context_parallel.plan import plan_of


class ContextParallelAttention(ExactAttention):
    """`ExactAttention` over context parallel ranks.

    Keys and values are gathered from all ranks; on the way back their gradients are summed over the ranks, and each
    gets those of its tokens.
    """

    def _attend_rows(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        packed_seq_params: PackedSeqParams | None,
    ) -> torch.Tensor:
        """Attend from the rank's tokens to those of all ranks.

        Raises:
            VerificationError: The batch has no plan, or that of another one.
        """
        plan = plan_of(packed_seq_params)
        if plan is None:
            raise VerificationError("attention over context parallel ranks has no plan of the batch")
        if len(plan.positions) != len(query) or self.window not in plan.blocks:
            raise VerificationError(
                f"the plan is of {len(plan.positions)} tokens and windows {list(plan.blocks)}, attention is asked for"
                f" {len(query)} and {self.window}"
            )
        row = query.dim() == 3
        parts: list[Any] = [part.unsqueeze(1) if row else part for part in (query, key, value)]
        gathered = gather_from_sequence_parallel_region(
            torch.cat(parts[1:], dim=-1), group=parallel_state.get_context_parallel_group()
        )
        widths = [part.size(-1) for part in parts[1:]]
        every_key, every_value = gathered.index_select(0, plan.order).split(widths, dim=-1)
        output = self._attend(parts[0], every_key, every_value, plan.blocks[self.window])
        return output.squeeze(1) if row else output
