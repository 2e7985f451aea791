"""Self-attention: megatron-core's linears around a core attention and a rotary embedding that run anywhere."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig

from ckptkit.errors import UnsupportedError
from ckptkit.megatron.config import attention_config
from ckptkit.megatron.context_parallel.plan import is_packed, plan_of
from ckptkit.megatron.masks import QUERY_BLOCK, Block, causal_block
from ckptkit.megatron.packed_inputs.kernels import flash_attention, flash_serves
from ckptkit.megatron.rotary import RotaryEmbedding
from ckptkit.tables.model_config import LayerConfig, ModelConfig


class GroupedQueryAttention(SelfAttention):
    """megatron-core's `SelfAttention` with this layer's own rotary embedding and biases.

    Args:
        config: Megatron's config of this layer.
        model: The model: which linears have a bias, and whether the output is gated.
        layer: Rotary embedding of this layer.
        options: Passed on.
    """

    def __init__(self, config: TransformerConfig, *, model: ModelConfig, layer: LayerConfig, **options: Any) -> None:
        super().__init__(config=attention_config(config, model, layer.rope), **options)
        self.rotary = RotaryEmbedding(layer.rope, self.hidden_size_per_attention_head)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        rotary_pos_emb: None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of `hidden_states` [sequence, batch, hidden] (packed: [tokens, 1, hidden]).

        Args:
            hidden_states: Input of the layer after its norm; split over the sequence under sequence parallelism.
            attention_mask: None: the core attention is causal by itself.
            rotary_pos_emb: Unused, the layer has its own.
            packed_seq_params: Where the sequences of a packed row begin and end, and under context parallelism the
                plan of the batch.
            options: Passed on.

        Returns:
            The output in the shape of the input, and the bias that is still to be added, or None.
        """
        output: tuple[torch.Tensor, torch.Tensor | None] = super().forward(
            hidden_states,
            attention_mask,
            rotary_pos_emb=self._angles(hidden_states, packed_seq_params),
            packed_seq_params=packed_seq_params,
            **options,
        )
        return output

    def _apply_output_gate(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """The output of the core attention, times the sigmoid of its gate, rounded as transformers rounds it.

        Args:
            x: [sequence, batch, heads * head_dim].
            gate: [sequence, batch, heads, head_dim].
        """
        return x * torch.sigmoid(gate.reshape(x.shape))

    def _angles(self, hidden_states: torch.Tensor, params: PackedSeqParams | None) -> torch.Tensor:
        """Rotary angles of the tokens.

        Of a packed row megatron-core is given those of the longest sequence, and takes for each sequence what it needs,
        under context parallelism the rank's part. Of plain rows it takes what it is given.
        """
        if params is not None and is_packed(params):
            length = max((end - start for start, end in segments(params)), default=0)
        elif (plan := plan_of(params)) is not None:
            return self.rotary.at(plan.positions)
        else:
            length = hidden_states.size(0) * (self.world_size if self.config.sequence_parallel else 1)
        angles: torch.Tensor = self.rotary(length)
        return angles


class ExactAttention(torch.nn.Module):
    """Causal softmax attention over grouped heads, with an optional window, on any device.

    Scores are computed in the model's dtype and normalised in fp32 (source: `eager_attention_forward` of transformers).
    Packed sequences go to flash attention where it serves, see `kernels`.

    Args:
        config: Megatron's config of this layer: width of a head and window.
        attn_mask_type: Must be megatron's `causal`.
        softmax_scale: Factor of the scores, or None for 1 / sqrt(head_dim).
        softcap: Scores become `softcap * tanh(score / softcap)`, or None.
        sinks: Whether every head has a sink.
        options: Further options that other core attentions take; unused.

    Attributes:
        shared: Keys and values of another layer, rotated, to attend to instead of this layer's own, side by side in the
            last axis: [..., 2 * head_dim] of any shape with as many elements; or None. Set before a forward pass.
        keeps: Whether `kept` is set.
        softmax_offset: The sinks of this rank's heads, by megatron-core's name: a score beside those of the keys, for
            which there is no value; or None.
        kept: Keys and values of the last forward pass, rotated, in the same form as `shared`.
    """

    shared: torch.Tensor | None = None
    keeps = False
    kept: torch.Tensor | None = None
    softmax_offset: torch.nn.Parameter | None

    def __init__(
        self,
        config: TransformerConfig,
        *,
        attn_mask_type: Any,
        softmax_scale: float | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if attn_mask_type.name != "causal":
            raise UnsupportedError(f"attention mask {attn_mask_type.name!r} is not in the runtime, only causal is")
        assert config.kv_channels is not None
        self.scale = 1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale
        self.softcap = softcap
        self.window = None if config.window_size is None else config.window_size[0] + 1
        self.register_parameter("softmax_offset", None)
        if sinks:
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            self.softmax_offset = torch.nn.Parameter(torch.zeros(heads, dtype=config.params_dtype))
            set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        /,
        *,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [sequence, batch, heads, head_dim]; packed: [tokens, heads, head_dim].
            key: [sequence, batch, query groups, head_dim]; packed: [tokens, query groups, head_dim].
            value: As `key`, of any width of a head.
            attention_mask: None; the mask is causal.
            attn_mask_type: Unused, fixed at construction.
            attention_bias: None.
            packed_seq_params: Where the sequences of a packed row begin and end.

        Returns:
            [sequence, batch, heads * head_dim]; packed: [tokens, heads * head_dim].

        Raises:
            UnsupportedError: A mask or a bias was given.
        """
        if attention_mask is not None or attention_bias is not None:
            raise UnsupportedError("the runtime's attention takes no mask and no bias, it is causal by itself")
        if self.shared is not None:
            key, value = self.shared.reshape(*key.shape[:-1], -1).chunk(2, dim=-1)
        if self.keeps:
            self.kept = torch.cat((key, value), dim=-1)
        return self._attend_rows(query, key, value, packed_seq_params)

    def _attend_rows(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        packed_seq_params: PackedSeqParams | None,
    ) -> torch.Tensor:
        """Attend, once it is known to what: see `forward`."""
        if packed_seq_params is None:
            return self._attend(query, key, value, self._causal(len(query), query.device))
        if self.softmax_offset is None and flash_serves(query, self.softcap) and value.size(-1) == query.size(-1):
            return flash_attention(query, key, value, packed_seq_params, scale=self.scale, window=self.window)
        parts = []
        for start, end in segments(packed_seq_params):
            q, k, v = (part[start:end].unsqueeze(1) for part in (query, key, value))
            parts.append(self._attend(q, k, v, self._causal(end - start, query.device)).squeeze(1))
        return torch.cat(parts) if parts else query.new_empty(0, query.size(1) * value.size(2))

    def _causal(self, length: int, device: torch.device) -> Iterator[Block]:
        """The blocks of one sequence; there is one mask at a time."""
        for start in range(0, length, QUERY_BLOCK):
            tokens = range(start, min(start + QUERY_BLOCK, length))
            yield causal_block(start, tokens, 0, self.window, device)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: Iterable[Block]
    ) -> torch.Tensor:
        """Attend in some blocks, which together are all queries in their order.

        Args:
            query: [queries, batch, heads, head_dim].
            key: [keys, batch, query groups, head_dim].
            value: As `key`.
            blocks: The blocks.

        Returns:
            [queries, batch, heads * head_dim].
        """
        length, batch, heads, width = query.shape
        groups = key.size(2)
        # [batch, groups, heads per group, sequence, head_dim]: each group's key and value broadcast over its heads.
        query = query.permute(1, 2, 0, 3).reshape(batch, groups, heads // groups, length, width)
        key, value = (part.permute(1, 2, 0, 3).unsqueeze(2) for part in (key, value))
        parts = [
            self._block(query[..., queries, :], key[..., keys, :], value[..., keys, :], hidden)
            for queries, keys, hidden in blocks
        ]
        joined = torch.cat(parts, dim=-2) if parts else query
        width = value.size(-1)
        return joined.reshape(batch, heads, length, width).permute(2, 0, 1, 3).reshape(length, batch, heads * width)

    def _block(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Attend from some queries to keys of which some are hidden."""
        scores = torch.matmul(query, key.transpose(-1, -2)) * self.scale
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        scores = scores.masked_fill(hidden, float("-inf"))
        if self.softmax_offset is not None:
            sinks = self.softmax_offset.view(1, *scores.shape[1:3], 1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat((scores, sinks.to(scores.dtype)), dim=-1)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
        return torch.matmul(weights[..., : value.size(-2)].to(query.dtype), value)


def segments(packed: PackedSeqParams) -> Iterator[tuple[int, int]]:
    """First token and end of each sequence of a packed row, padding that follows a sequence included."""
    padded = packed.cu_seqlens_q_padded
    bounds = (packed.cu_seqlens_q if padded is None else padded).tolist()
    yield from itertools.pairwise(bounds)
