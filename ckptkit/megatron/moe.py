"""The router of a mixture of experts; experts and their exchange of tokens are megatron-core's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.router import TopKRouter


class Router(TopKRouter):
    """megatron-core's `TopKRouter` with logits from a plain linear layer, on any device.

    megatron-core's own needs a GPU. The logits are rounded to the model's dtype, then chosen and weighed in fp32, as in
    transformers (source: `Qwen3MoeTopKRouter`, `MixtralTopKRouter`).
    """

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Logits, fp32 [..., experts], of hidden states [..., hidden]."""
        return F.linear(input, self.weight).float()
