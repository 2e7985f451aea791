"""Gemma 4's attention, which normalises values."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.parallel_state import get_tensor_model_parallel_rank
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig

from ckptkit.megatron.attention import GroupedQueryAttention
from ckptkit.megatron.norms import normalised
from ckptkit.tables.model_config import LayerConfig


class ValueNormAttention(GroupedQueryAttention):
    """Attention that normalises values per head, without a weight, and may take them from the raw keys.

    Source: `Gemma4TextAttention` of transformers. The fused projection of a layer whose values are its keys, or that
    attends to keys and values of another one, has rows that nothing reads.

    Args:
        config: Megatron's config of this layer.
        layer: Whether values are keys.
        options: Passed on.
    """

    def __init__(self, config: TransformerConfig, *, layer: LayerConfig, **options: Any) -> None:
        super().__init__(config, layer=layer, **options)
        self.k_eq_v = layer.k_eq_v

    def get_query_key_value_tensors(
        self, hidden_states: torch.Tensor, key_value_states: torch.Tensor | None = None, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normalised: q [sequence, batch, heads, head_dim], k and v [sequence, batch, groups, head_dim]."""
        query, key, value = self._projected(hidden_states)
        source = key if self.k_eq_v else value
        return self.q_layernorm(query), self.k_layernorm(key), self._value_norm(source)

    def _value_norm(self, value: torch.Tensor) -> torch.Tensor:
        return normalised(value, self.config.layernorm_epsilon).to(value.dtype)

    def _projected(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """This rank's heads of the fused projection, which holds, per group, its queries, its key and its value.

        With more ranks than groups a group's rows lie on several ranks. They are gathered, and each takes the key, the
        value, and a part of the queries.
        """
        fused, _ = self.linear_qkv(hidden_states)
        groups, rank = self.config.num_query_groups, get_tensor_model_parallel_rank()
        sharing = max(1, self.world_size // groups)
        if sharing > 1:
            fused = all_gather_last_dim_from_tensor_parallel_region(fused).chunk(groups, dim=-1)[rank // sharing]
        width = self.hidden_size_per_attention_head
        heads = fused.reshape(*fused.shape[:2], self.num_query_groups_per_partition, -1, width)
        query, key, value = heads.split((heads.size(3) - 2, 1, 1), dim=3)
        query = query.flatten(2, 3).chunk(sharing, dim=2)[rank % sharing if sharing > 1 else 0]
        return query, key.squeeze(3), value.squeeze(3)
