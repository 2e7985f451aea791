"""Rotary frequencies of a layer, as transformers computes them.

megatron-core fixes the low, high and original-length constants of llama3 scaling, has one rotary embedding per model,
and moves it to a CUDA device; this one follows `Rope`, belongs to a layer, and stays where the layer is.
"""

from __future__ import annotations

import math

import torch

from ckptkit.errors import UnsupportedError
from ckptkit.tables.model_config import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """Rotation per token of each pair of channels that rotates, fp32, in radians.

    Of a head of which a part rotates these are the pairs of that part: megatron-core lets the other channels pass.
    Source: `ROPE_INIT_FUNCTIONS` of transformers (default, linear, llama3 and proportional).

    Raises:
        UnsupportedError: The runtime does not know this kind of scaling.
    """
    if rope.kind != "proportional":
        head_dim = int(head_dim * rope.partial)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "default":
        return frequencies
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(frequencies, rope)
    if rope.kind == "proportional":
        return _proportional(frequencies, rope)
    known = "default, linear, llama3, proportional"
    raise UnsupportedError(f"rotary scaling {rope.kind!r} is not in the runtime", hint=f"known: {known}")


def _llama3(frequencies: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Divide slow rotations by the factor, keep fast ones, and blend in between."""
    context = rope.original_max_position
    wavelengths = 2 * math.pi / frequencies
    slow = wavelengths > context / rope.low_freq_factor
    fast = wavelengths < context / rope.high_freq_factor
    kept = (context / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - kept) * frequencies / rope.factor + kept * frequencies
    return torch.where(slow, frequencies / rope.factor, torch.where(fast, frequencies, blended))


def _proportional(frequencies: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Let the first pairs rotate as in a whole head, and the others not at all."""
    rotating = int(rope.partial * 2 * len(frequencies) // 2)  # in this order, as transformers rounds
    kept = torch.arange(len(frequencies)) < rotating
    return torch.where(kept, frequencies, torch.zeros_like(frequencies)) / rope.factor


class RotaryEmbedding(torch.nn.Module):
    """Angles of one layer's rotary embedding.

    Args:
        rope: Base and scaling.
        head_dim: Width of a head.
    """

    inv_freq: torch.Tensor

    def __init__(self, rope: Rope, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inverse_frequencies(rope, head_dim), persistent=False)

    def forward(self, length: int) -> torch.Tensor:
        """Angles of positions 0 to `length` - 1, fp32 [length, 1, 1, channels that rotate], both halves alike."""
        return self.at(torch.arange(length, device=self.inv_freq.device))

    def at(self, positions: torch.Tensor) -> torch.Tensor:
        """Angles of positions, int64 (tokens,), in the shape [tokens, 1, 1, channels that rotate]."""
        angles = torch.outer(positions.float(), self.inv_freq)
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]
