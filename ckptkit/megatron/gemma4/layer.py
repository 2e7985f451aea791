"""Gemma 4's decoder layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from ckptkit.megatron.activations import activation
from ckptkit.megatron.decoder import BiasDropoutAdd, DecoderLayer
from ckptkit.megatron.gemma4.carried import Carried
from ckptkit.megatron.norms import RMSNorm
from ckptkit.tables.model_config import ModelConfig


class Gemma4Layer(DecoderLayer):
    """A decoder layer with norms of its own after attention and MLP, inputs of its own, and a scale on its output.

    Source: `Gemma4TextDecoderLayer` of transformers; names as Megatron-Bridge gives them. With experts the norm after
    attention is part of the last linear, and there are more of them around the two MLPs (see `ParallelMoELayer`).

    Args:
        config: Megatron's model-wide config.
        model: The model.
        number: Global number of this layer, from 0.
        stage: Global numbers of the layers of its model chunk.
        options: Passed on.
    """

    layer_scalar: torch.Tensor
    self_attn_bda: BiasDropoutAdd
    mlp_bda: BiasDropoutAdd

    def __init__(
        self, config: TransformerConfig, *, model: ModelConfig, number: int, stage: range, **options: Any
    ) -> None:
        layer = model.layers[number]
        super().__init__(config, layer=layer, activation=model.activation, **options)
        self.number, self.stage, self.donor = number, stage, layer.kv_donor
        self.carried = Carried.under(config, model)
        self.self_attention.core_attention.keeps = number in self.carried.donors(model.num_layers, 0)
        self._add_norms(layer.moe)
        if model.per_layer_input_size:
            self._add_inputs(model)
        self.register_buffer("layer_scalar", torch.ones(1, dtype=config.params_dtype))

    def _norm(self) -> RMSNorm:
        return RMSNorm(self.config, self.config.hidden_size, self.config.layernorm_epsilon)

    def _add_norms(self, moe: bool) -> None:
        """The norms before the residual is added, and, with experts, the one before the dense MLP."""
        if moe:
            self.pre_shared_expert_layernorm, self.post_ffn_layernorm = self._norm(), self._norm()
            self.mlp.norms_before(self.pre_shared_expert_layernorm.__call__, self.pre_mlp_layernorm.apply_norm)
            self.mlp_bda = NormThenAdd(self.post_ffn_layernorm, self.mlp_bda)
        else:
            self.post_self_attn_layernorm, self.post_mlp_layernorm = self._norm(), self._norm()
            self.self_attn_bda = NormThenAdd(self.post_self_attn_layernorm, self.self_attn_bda)
            self.mlp_bda = NormThenAdd(self.post_mlp_layernorm, self.mlp_bda)

    def _add_inputs(self, model: ModelConfig) -> None:
        hidden, width = model.hidden_size, model.per_layer_input_size
        self.per_layer_input_gate = ReplicatedLinear(self.config, hidden, width)
        self.per_layer_projection = ReplicatedLinear(self.config, width, hidden)
        self.post_per_layer_input_norm = self._norm()
        self.per_layer_activation = activation(model.activation, self.config.params_dtype)

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, context: torch.Tensor | None = None, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The hidden state after this layer, and what is carried beside it.

        Args:
            hidden_states: [sequence, batch, hidden]; in the first layer of a stage with what came beside it, in the
                last layer returned with what the next stage needs.
            args: Passed on.
            context: Values carried within the stage (see `Carried`).
            options: Passed on.
        """
        if self.number == self.stage.start:
            hidden_states, context = self.carried.split(hidden_states)
        columns = self.carried.before(self.number, self.stage.start)
        attention = self.self_attention.core_attention
        attention.shared = None if self.donor is None else self.carried.take(context, columns, ("kv", self.donor))
        hidden_states, _ = super().forward(hidden_states, *args, context=None, **options)
        if self.carried.config.per_layer_input_size:
            hidden_states = self._mix(hidden_states, self.carried.take(context, columns, ("input", self.number)))
        # A buffer keeps its dtype where mixed precision casts parameters.
        hidden_states = hidden_states * self.layer_scalar.to(hidden_states.dtype)
        context = self._keep(hidden_states, context)
        attention.shared = attention.kept = None
        if self.number == self.stage[-1]:
            columns = self.carried.before(self.number + 1, self.stage.start)
            hidden_states = self.carried.join(hidden_states, context, columns, self.number + 1)
        return hidden_states, context

    def _mix(self, hidden: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Add what this layer's own input gives, gated by the hidden state."""
        gate = self.per_layer_activation(self.per_layer_input_gate(hidden))
        mixed: torch.Tensor = self.post_per_layer_input_norm(self.per_layer_projection(gate * own))
        return hidden + mixed

    def _keep(self, hidden: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor | None:
        """The context, with this layer's keys and values if later ones attend to them."""
        kept = self.self_attention.core_attention.kept
        if kept is None:
            return context
        kept = kept.reshape(*hidden.shape[:2], -1)
        return kept if context is None else torch.cat((context, kept), dim=-1)


class NormThenAdd:
    """megatron-core's bias-dropout-add with a norm before it.

    Args:
        norm: The norm, which belongs to a layer.
        add: Adds the normalised output to the stream.
    """

    def __init__(self, norm: torch.nn.Module, add: BiasDropoutAdd) -> None:
        self.norm, self.add = norm, add

    def __call__(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        """The function that adds (output, bias or None), normalised, to the residual."""
        add = self.add(training, fused)

        def normed(
            output: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, dropout: float
        ) -> torch.Tensor:
            value, bias = output
            return add((self.norm(value if bias is None else value + bias), None), residual, dropout)

        return normed


class ReplicatedLinear(torch.nn.Module):
    """A linear layer without bias that every tensor parallel rank has whole.

    Args:
        config: Megatron's config: parameter dtype and sequence parallelism.
        input_size: Width of the input.
        output_size: Width of the output.
    """

    def __init__(self, config: TransformerConfig, input_size: int, output_size: int) -> None:
        super().__init__()
        self.config = config
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        # Under sequence parallelism each rank sees a part of the tokens: this mark makes Megatron sum the gradients.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., input_size] -> [..., output_size]."""
        return F.linear(x, self.weight)
