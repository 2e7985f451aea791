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
    Source: `ROPE_INIT_FUNCTIONS` of transformers (default, linear, llama3, proportional and yarn).

    Args:
        rope: Base and scaling.
        head_dim: Width of a head, or of its part that a rope is for.

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
    if rope.kind == "yarn":
        return _yarn(frequencies, rope)
    known = "default, linear, llama3, proportional, yarn"
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


def _yarn(frequencies: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Keep pairs that rotate often within the original context, divide slow ones by the factor, and blend in between.

    Source: `_compute_yarn_parameters` of transformers.
    """
    pairs = len(frequencies)

    def bound(rotations: float) -> float:
        turns = rope.original_max_position / (rotations * 2 * math.pi)
        return 2 * pairs * math.log(turns) / (2 * math.log(rope.theta))

    low, high = bound(rope.beta_fast), bound(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    ramp = (torch.arange(pairs, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
    kept = 1 - ramp.clamp(0, 1)
    return frequencies / rope.factor * (1 - kept) + frequencies * kept


def yarn_mscale(factor: float, weight: float = 1.0) -> float:
    """A factor that grows with the logarithm of the scaling (source: `yarn_get_mscale` of transformers)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def attention_factor(rope: Rope) -> float:
    """Factor on cosines and sines (source: `_compute_yarn_parameters` of transformers)."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
    return yarn_mscale(rope.factor)


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
