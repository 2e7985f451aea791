"""The gated delta rule by the kernel of flash-linear-attention, for those types and devices that it is made for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from ckptkit.megatron.delta_rule import gated_delta_rule

Rule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def rule_for(value: torch.Tensor) -> Rule:
    """What computes the rule for values such as these: the kernel in 16 bits on a GPU and forwards alone, else torch.

    In fp32 the kernel multiplies as TF32 does, with 10 bits of mantissa; on a CPU it does not run. On some GPUs it
    refuses to go backwards, because some releases of its compiler make wrong gradients (issue 640 there).

    Args:
        value: A tensor of the dtype and on the device in question.
    """
    fits = value.is_cuda and value.element_size() == 2 and not torch.is_grad_enabled()
    kernel = _kernel() if fits else None
    if kernel is None:
        return gated_delta_rule

    def rule(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor, rate: torch.Tensor
    ) -> torch.Tensor:
        """Arguments and result as of `gated_delta_rule`."""
        shared = value.size(2) // key.size(2)  # older kernels want as many heads of each
        query, key = (part.repeat_interleave(shared, dim=2) for part in (query, key))
        parts = (part.contiguous() for part in (query, key, value, decay, rate))
        output: torch.Tensor = kernel(*parts, use_qk_l2norm_in_kernel=True)[0]
        return output

    return rule


@cache
def _kernel() -> Callable[..., Any] | None:
    """`chunk_gated_delta_rule` of flash-linear-attention, or None where it is not installed or cannot be loaded."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except Exception:  # it looks for a GPU, its driver and a compiler while it is imported
        return None
    kernel: Callable[..., Any] = chunk_gated_delta_rule
    return kernel
