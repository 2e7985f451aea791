"""Multi-head latent attention: megatron-core's, with a rotary embedding that runs anywhere.

megatron-core's local spec divides the layer that makes the latent vector of keys and values over tensor parallel ranks,
and gathers its output. The channels that rotate, which all heads share, then go to each rank's own heads. Backwards,
megatron-core takes each rank's part of the gradient of these channels, and does not add up those of all ranks. Here
they are added up.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig

from ckptkit.megatron.attention import segments
from ckptkit.megatron.compat import latent_attention_built
from ckptkit.megatron.context_parallel.plan import Plan, is_packed, plan_of
from ckptkit.megatron.norms import RMSNorm
from ckptkit.megatron.rotary import RotaryEmbedding, attention_factor, yarn_mscale
from ckptkit.tables.model_config import LayerConfig, Rope


class LatentNorm(RMSNorm):
    """The norm of a latent vector, with an epsilon of its own (source: `DeepseekV3Attention` of transformers)."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **builder_options: object) -> None:
        super().__init__(config, hidden_size, config.latent_norm_eps, **builder_options)


class LatentAttention(MLASelfAttention):
    """megatron-core's `MLASelfAttention` with this layer's own rotary embedding.

    Args:
        config: Megatron's config of this layer, a `LatentRuntimeConfig`.
        layer: Rotary embedding of this layer.
        options: Passed on.
    """

    def __init__(self, config: TransformerConfig, *, layer: LayerConfig, **options: Any) -> None:
        with latent_attention_built():
            super().__init__(config=config, **options)
        self.rotary_pos_emb = _Rotary(layer.rope, self.config.qk_pos_emb_head_dim, self.config)
        # megatron-core multiplies scores by the square of another number, which has the same value for released models.
        self.softmax_scale = softmax_scale(layer.rope, self.q_head_dim)
        self.core_attention.scale = self.softmax_scale
        self.linear_kv_down_proj.register_forward_hook(self._gathered)

    def get_query_key_value_tensors(
        self,
        hidden_states: torch.Tensor,
        key_value_states: None = None,
        position_ids: None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **options: Any,
    ) -> Any:
        """Queries, keys and values of a rank's tokens, as megatron-core has them.

        Under context parallelism plain rows come with a plan, and megatron-core takes all that comes so for packed.

        Args:
            hidden_states: Input of the layer after its norm, [sequence, batch, hidden].
            key_value_states: None.
            position_ids: Unused, the layer counts positions itself.
            packed_seq_params: Where the sequences of a packed row begin and end, and the plan of the batch.
            options: Passed on.
        """
        self.rotary_pos_emb.plan = plan_of(packed_seq_params)
        packed = packed_seq_params if is_packed(packed_seq_params) else None
        return super().get_query_key_value_tensors(hidden_states, key_value_states, position_ids, packed, **options)

    def _gathered(self, module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        """The output of the layer that makes latent vectors, whole: [sequence, batch, latent and rotating channels].

        Under sequence parallelism it is this rank's part of the sequence, which megatron-core gathers as it should.
        """
        states, bias = output
        if self.tp_group.size() == 1:
            return output
        whole = gather_from_tensor_model_parallel_region(states)
        if self.config.sequence_parallel:
            return scatter_to_sequence_parallel_region(whole), bias
        latent, shared = whole.split([self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim], dim=-1)
        return torch.cat((latent, copy_to_tensor_model_parallel_region(shared)), dim=-1), bias


def softmax_scale(rope: Rope, width: int) -> float:
    """Factor on attention scores of queries of this width (source: `yarn_apply_mscale` of transformers)."""
    scale = 1.0 / math.sqrt(width)
    if rope.kind != "default" and rope.mscale_all_dim:
        scale *= yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2
    return scale


class _Rotary(torch.nn.Module):
    """This layer's rotary embedding in place of megatron-core's, which asks it for a length, and then for the angles.

    The length is given as the angles themselves.

    Attributes:
        plan: The plan of the batch under context parallelism, or None. Set before a forward pass.
    """

    plan: Plan | None = None

    def __init__(self, rope: Rope, width: int, config: TransformerConfig) -> None:
        super().__init__()
        self.angles = RotaryEmbedding(rope, width)
        self.factor = attention_factor(rope)
        self.with_factor = config.rope_type == "yarn"

    def get_rotary_seq_len(
        self,
        inference_context: None,
        transformer: None,
        hidden_states: torch.Tensor,
        config: TransformerConfig,
        packed: PackedSeqParams | None,
    ) -> torch.Tensor:
        """Angles of the tokens: of a packed row those of the longest sequence, of which it takes its part."""
        if packed is not None and is_packed(packed):
            length = max((end - start for start, end in segments(packed)), default=0)
        elif self.plan is not None:
            return self.angles.at(self.plan.positions)
        else:
            split = config.tensor_model_parallel_size if config.sequence_parallel else 1
            length = hidden_states.size(0) * split
        angles: torch.Tensor = self.angles(length)
        return angles

    def forward(self, angles: torch.Tensor, packed_seq: bool = False) -> Any:
        """The angles, and the factor on their cosines and sines where megatron-core has one."""
        return (angles, self.factor) if self.with_factor else angles
