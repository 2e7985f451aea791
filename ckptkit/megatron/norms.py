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
    `round((1 + weight) * x / sqrt(mean(x^2) + eps))`, rounded last (source: `Gemma3RMSNorm`); where norms scale in fp32
    it is `round(weight * x / sqrt(mean(x^2) + eps))`, rounded last as well (source: `Gemma4RMSNorm`).

    Args:
        config: Megatron's `TransformerConfig`: parameter dtype, sequence parallelism, whether weights are
            zero-centred (`layernorm_zero_centered_gamma`), and `RuntimeConfig.norms_scale_in_fp32`.
        hidden_size: Width of the last axis.
        eps: Added to the mean square.
        builder_options: Further options that other norms of megatron-core take; unused.
    """

    def __init__(self, config: object, hidden_size: int, eps: float = 1e-5, **builder_options: object) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered: bool = getattr(config, "layernorm_zero_centered_gamma", False)
        self.scales_in_fp32: bool = getattr(config, "norms_scale_in_fp32", False)
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=getattr(config, "params_dtype", None)))
        # Under sequence parallelism each rank sees a part of the tokens: this mark makes Megatron sum the gradients.
        self.weight.sequence_parallel = getattr(config, "sequence_parallel", False)  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise `x` [..., hidden_size]; same shape and dtype."""
        if self.scales_in_fp32:
            return (normalised(x, self.eps) * self.weight.float()).to(x.dtype)
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.zero_centered:
            return (normed * (1.0 + self.weight.float())).to(x.dtype)
        return self.weight * normed.to(x.dtype)


class DeferredRMSNorm(RMSNorm):
    """A norm that lets its input pass, and is applied further on: where Megatron has it before it is needed.

    What follows needs the values before the norm as well.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` itself."""
        return x

    def apply_norm(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise `x` [..., hidden_size]; same shape and dtype."""
        return super().forward(x)


def normalised(x: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps)` over the last axis, in fp32 (source: `Gemma4RMSNorm` of transformers)."""
    wide = x.float()
    return wide * torch.pow(wide.square().mean(-1, keepdim=True) + eps, -0.5)
