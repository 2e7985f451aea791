"""Gemma 4's router, and its experts beside a dense MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig

from ckptkit.megatron.moe import Router
from ckptkit.megatron.norms import RMSNorm, normalised


class ScaledRouter(Router):
    """A router with scales of its own: one on its normalised input, and one on the weight of every expert.

    Weights are renormalised over the chosen experts before they are scaled (source: `Gemma4TextRouter` of
    transformers).
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        dtype = self.config.params_dtype
        self.scale = torch.nn.Parameter(torch.ones(self.config.hidden_size, dtype=dtype))
        self.per_expert_scale = torch.nn.Parameter(torch.ones(self.num_experts, dtype=dtype))
        for scale in (self.scale, self.per_expert_scale):
            scale.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Logits, fp32 [..., experts], of hidden states [..., hidden] before any norm."""
        normed = normalised(input, self.config.layernorm_epsilon).to(input.dtype)
        return super().gating(normed * self.scale * self.config.hidden_size**-0.5)

    def routing(self, logits: torch.Tensor, *args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights [tokens, experts], zero for those not chosen, and which were chosen, of logits [s, b, experts]."""
        weights, chosen = super().routing(logits, *args, **options)
        return weights * self.per_expert_scale, chosen


class ParallelMoELayer(MoELayer):
    """Experts and a dense MLP side by side, each with a norm before and after it; the router sees what no norm has.

    The dense MLP is what Megatron calls a shared expert (names as Megatron-Bridge gives them). Source:
    `Gemma4TextDecoderLayer` of transformers.

    Args:
        config: Megatron's config of this layer.
        args: Passed on.
        options: Passed on.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **options: Any) -> None:
        super().__init__(config, *args, **options)
        self.post_shared_expert_layernorm, self.post_moe_layernorm = (
            RMSNorm(config, config.hidden_size, config.layernorm_epsilon) for _ in range(2)
        )

    def norms_before(
        self, dense: Callable[[torch.Tensor], torch.Tensor], experts: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Tell the norms before the dense MLP and before the experts; they belong to the decoder layer."""
        self._norm_before_dense, self._norm_before_experts = dense, experts

    def shared_experts_compute(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Output of the dense MLP, normalised before and after."""
        dense = super().shared_experts_compute(self._norm_before_dense(hidden_states))
        normed: torch.Tensor = self.post_shared_expert_layernorm(dense)
        return normed

    def preprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalise what the experts get, after the router has seen it as it was."""
        result: tuple[torch.Tensor, torch.Tensor] = super().preprocess(
            self._norm_before_experts(hidden_states), probs, routing_map
        )
        return result

    def postprocess(self, output: torch.Tensor, shared_expert_output: torch.Tensor | None) -> torch.Tensor:
        """The sum of both MLPs, each normalised."""
        experts: torch.Tensor = self.post_moe_layernorm(super().postprocess(output, None))
        return experts if shared_expert_output is None else shared_expert_output + experts
