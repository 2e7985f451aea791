"""RMSNorm for every place of a Megatron model.

megatron-core's local norm refuses sequence parallelism and has no zero-centred weights, and torch's own RMSNorm
multiplies by the weight before it rounds to the model's dtype, where Hugging Face multiplies after.
"""

from __future__ import annotations

import torch


class RMSNorm(torch.nn.Module):
    """Root mean square norm over the last axis: `weight * round(x / sqrt(mean(x^2) + eps))`.

    The statistics are computed in fp32 and the normalised values rounded to the input's dtype before the
    multiplication (source: `LlamaRMSNorm` of transformers). With zero-centred weights it is
    `round((1 + weight) * x / sqrt(mean(x^2) + eps))`, rounded last (source: `Gemma3RMSNorm`).

    Args:
        config: Megatron's `TransformerConfig`: parameter dtype, sequence parallelism, and whether weights are
            zero-centred (`layernorm_zero_centered_gamma`).
        hidden_size: Width of the last axis.
        eps: Added to the mean square.
        builder_options: What other norms of megatron-core also want to know; unused.
    """

    def __init__(self, config: object, hidden_size: int, eps: float = 1e-5, **builder_options: object) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered: bool = getattr(config, "layernorm_zero_centered_gamma", False)
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=getattr(config, "params_dtype", None)))
        # Under sequence parallelism each rank sees a part of the tokens: this mark makes Megatron sum the gradients.
        self.weight.sequence_parallel = getattr(config, "sequence_parallel", False)  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise `x` [..., hidden_size]; same shape and dtype."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.zero_centered:
            return (normed * (1.0 + self.weight.float())).to(x.dtype)
        return self.weight * normed.to(x.dtype)
