"""Which kernel computes attention over packed sequences.

Flash attention for sequences of different lengths is in torch itself. It serves half precision on a CUDA device with
heads of at most 256 channels and no cap on the scores; elsewhere attention is exact (`attention.ExactAttention`), and
everywhere with `CKPTKIT_EXACT_ATTENTION=1` in the environment.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams

FLASH_HEAD_DIM = 256
"""Widest head that flash attention takes; the width must also be a multiple of `FLASH_STEP`."""
FLASH_STEP = 8
FLASH_CAPABILITY = (8, 0)
"""Oldest compute capability (Ampere) that it runs on."""

EXACT = "CKPTKIT_EXACT_ATTENTION"
"""Environment variable that keeps flash attention out, to tell its errors from others."""

Varlen = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, float, int | None], torch.Tensor]
"""(query, key, value, cu_seqlens, max_seqlen, scale, window) -> output; tensors are [tokens, heads, head_dim]."""


def flash_serves(query: torch.Tensor, softcap: float | None) -> bool:
    """Whether flash attention computes what is asked.

    Args:
        query: [tokens, heads, head_dim].
        softcap: Cap of the scores, which the kernel does not know, or None.
    """
    width = query.size(-1)
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and softcap is None
        and width <= FLASH_HEAD_DIM
        and width % FLASH_STEP == 0
        and torch.cuda.get_device_capability(query.device) >= FLASH_CAPABILITY
        and os.environ.get(EXACT, "0") in ("", "0")
    )


def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: PackedSeqParams,
    *,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Causal attention of packed sequences, none of which sees another.

    Args:
        query: [tokens, heads, head_dim], as `flash_serves` wants it.
        key: [tokens, query groups, head_dim].
        value: As `key`.
        packed: Where the sequences begin and end.
        scale: Factor of the scores.
        window: Visible tokens including the current one, or None for all before it.

    Returns:
        [tokens, heads * head_dim].
    """
    bounds, longest = packed.cu_seqlens_q, int(packed.max_seqlen_q)
    query, key, value = (part.contiguous() for part in (query, key, value))
    return _varlen()(query, key, value, bounds, longest, scale, window).flatten(1)


@functools.cache
def _varlen() -> Varlen:
    """Torch's public function if this release has one that knows scale and window, else the operator below it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return _operator
    known = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= known.keys():
        return _operator
    # Releases that lack the flag take grouped heads as they come.
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in known else {}
    attend: Any = varlen_attn  # without the log-sum-exp, which is not asked for, it returns one tensor

    def public(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bounds: torch.Tensor,
        longest: int,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        left = -1 if window is None else window - 1
        output: torch.Tensor = attend(
            query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=(left, 0), **grouped
        )
        return output

    return public


def _operator(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Source of the arguments: `_flash_attention_forward` in native_functions.yaml of torch."""
    left = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    output: torch.Tensor = torch.ops.aten._flash_attention_forward(
        query, key, value, bounds, bounds, longest, longest, 0.0, True, False, scale=scale, **left
    )[0]
    return output
