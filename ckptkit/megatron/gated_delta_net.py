"""Gated DeltaNet: megatron-core's linears and tensors around a convolution and a delta rule that run anywhere.

The tensors, their names, and how a distributed checkpoint splits them are those of megatron-core's `GatedDeltaNet`,
which is the base class. Its own computation needs flash-linear-attention, or refuses packed inputs. The one here rounds
as transformers does, and starts anew at every sequence of a packed row. In 16 bits on a GPU, and forwards alone, the
rule is the kernel of flash-linear-attention where that is installed.

A memory needs every token before. So under context parallelism the ranks exchange what they have: each gets all tokens
of the sequences for its share of the heads, and gives back what these read (source: `tensor_a2a_cp2hp` and
`tensor_a2a_hp2cp` of megatron-core 0.19.2).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.ssm.gated_delta_net import GatedDeltaNet as CoreGatedDeltaNet
from megatron.core.tensor_parallel import all_to_all, copy_to_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig

from ckptkit.errors import VerificationError
from ckptkit.megatron.attention import segments
from ckptkit.megatron.compat import gated_delta_net_built
from ckptkit.megatron.context_parallel.plan import is_packed, plan_of
from ckptkit.megatron.delta_kernel import rule_for
from ckptkit.megatron.norms import RMSNorm, normalised


class GatedNorm(RMSNorm):
    """RMSNorm of every head, times the SiLU of a gate (source: `Qwen3NextRMSNormGated` of transformers).

    Tensor parallel ranks have different heads: backwards the gradients of all of them are summed up. megatron-core does
    so under sequence parallelism alone.
    """

    def gated(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Normalise `x` [..., width of a head], times the SiLU of a gate of the same shape; same shape and dtype."""
        weight: torch.Tensor = self.weight
        if not weight.sequence_parallel:  # type: ignore[attr-defined]
            weight = copy_to_tensor_model_parallel_region(weight, get_tensor_model_parallel_group())
        if self.zero_centered:
            weight = (1.0 + weight.float()).to(x.dtype)
        return (weight * normalised(x, self.eps).to(x.dtype) * F.silu(gate.float())).to(x.dtype)


class GatedDeltaNet(CoreGatedDeltaNet):
    """megatron-core's `GatedDeltaNet`, computed in torch (source: `Qwen3NextGatedDeltaNet` of transformers).

    Args:
        config: Megatron's config of this layer.
        options: Passed on.
    """

    out_norm: GatedNorm

    def __init__(self, config: TransformerConfig, **options: Any) -> None:
        own = copy.copy(config)
        own.deterministic_mode = True  # megatron-core 0.19 then does not look for a kernel
        with gated_delta_net_built(CoreGatedDeltaNet):
            super().__init__(config=own, **options)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The layer's output for `hidden_states` [sequence, batch, hidden] (packed: [tokens, 1, hidden]).

        Args:
            hidden_states: Input of the layer after its norm; split over the sequence under sequence parallelism.
            attention_mask: Unused.
            packed_seq_params: Where the sequences of a packed row begin and end.
            options: Unused: rotary embeddings, and what inference needs.

        Returns:
            The output in the shape of the input, and None: there is no bias.
        """
        mixed, _ = self.in_proj(hidden_states)
        ranks = parallel_state.get_context_parallel_world_size()
        if ranks == 1:
            states = self._rows(mixed, packed_seq_params)
        else:
            plan = plan_of(packed_seq_params)
            if plan is None:
                raise VerificationError("a DeltaNet over context parallel ranks has no plan of the batch")
            whole = self._all_tokens(mixed, ranks).index_select(0, plan.order)
            read = self._rows(whole, packed_seq_params if is_packed(packed_seq_params) else None)
            states = _all_heads(read.index_select(0, plan.order.argsort()), ranks)
        output, bias = self.out_proj(states)
        return output, bias

    def _rows(self, mixed: torch.Tensor, packed_seq_params: PackedSeqParams | None) -> torch.Tensor:
        """What this rank's heads read of plain rows, or of a packed one, sequence by sequence."""
        if packed_seq_params is None:
            return self._sequences(mixed)
        bounds = [(start, end) for start, end in segments(packed_seq_params) if start < end]
        return torch.cat([self._sequences(mixed[start:end]) for start, end in bounds])

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """Channels of queries, and of values, and value heads of a tensor parallel rank."""
        return self.qk_dim // self.tp_size, self.v_dim // self.tp_size, self.num_value_heads // self.tp_size

    def _all_tokens(self, mixed: torch.Tensor, ranks: int) -> torch.Tensor:
        """This rank's tokens of all heads -> all ranks' tokens, rank by rank, of this rank's share of the heads."""
        keys, values, heads = self._sizes
        parts = mixed.split([keys, keys, values, values, heads, heads], dim=-1)
        shares = [
            torch.cat(share, dim=-1) for share in zip(*(part.chunk(ranks, dim=-1) for part in parts), strict=True)
        ]
        whole: torch.Tensor = all_to_all(parallel_state.get_context_parallel_group(), torch.cat(shares))
        return whole

    def _own(self, parameter: torch.Tensor, *sizes: int) -> torch.Tensor:
        """This rank's share of the heads in a parameter whose first axis has parts of these sizes."""
        ranks, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
        if ranks == 1:
            return parameter
        return torch.cat([part.chunk(ranks)[rank] for part in parameter.split(sizes)])

    def _sequences(self, mixed: torch.Tensor) -> torch.Tensor:
        """What this rank's heads read, normalised and gated, of sequences that begin with the first token.

        Args:
            mixed: Projections of this rank's heads, [sequence, batch, (2 * keys + 2 * values + 2 * value heads) /
                (tensor x context parallel ranks)].

        Returns:
            [sequence, batch, value heads * value dim / (tensor x context parallel ranks)].
        """
        ranks = parallel_state.get_context_parallel_world_size()
        keys, values, heads = (size // ranks for size in self._sizes)
        qkv, gate, rate, alpha = mixed.transpose(0, 1).split([2 * keys + values, values, heads, heads], dim=-1)
        query, key, value = self._convolved(qkv).split([keys, keys, values], dim=-1)
        a_log, dt_bias = (self._own(one, heads * ranks) for one in (self.A_log, self.dt_bias))
        decay = -a_log.float().exp() * F.softplus(alpha.float() + dt_bias)
        read = rule_for(value)(
            query.unflatten(-1, (-1, self.key_head_dim)),
            key.unflatten(-1, (-1, self.key_head_dim)),
            value.unflatten(-1, (-1, self.value_head_dim)),
            decay,
            rate.sigmoid(),
        )
        states = self.out_norm.gated(read, gate.unflatten(-1, (-1, self.value_head_dim)))
        return states.flatten(2).transpose(0, 1)

    def _convolved(self, qkv: torch.Tensor) -> torch.Tensor:
        """The activation of the convolution of every channel over its last tokens; [batch, sequence, channels]."""
        keys, values, _ = self._sizes
        filters = self._own(self.conv1d.weight, keys, keys, values)
        padding = filters.size(-1) - 1
        filtered = F.conv1d(qkv.transpose(1, 2), filters, padding=padding, groups=len(filters))
        convolved: torch.Tensor = self.act_fn(filtered[..., : qkv.size(1)])
        return convolved.transpose(1, 2)


def _all_heads(states: torch.Tensor, ranks: int) -> torch.Tensor:
    """All ranks' tokens, rank by rank, of this rank's share of the heads -> its tokens of all heads."""
    shares = all_to_all(parallel_state.get_context_parallel_group(), states).chunk(ranks)
    return torch.cat(shares, dim=-1)
