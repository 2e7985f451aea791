"""The gated delta rule in torch, on any device: an associative memory that every token reads and writes.

For each head there is a matrix `S` [key dim, value dim], zero before the first token. At token t, with a decay
`a_t = exp(decay_t)` in (0, 1] and a rate `b_t` in (0, 1):

    S_t = a_t * S_{t-1} + k_t (b_t * (v_t - k_t a_t S_{t-1}))      o_t = q_t S_t

Within a chunk of tokens the values that are written solve a triangular system (source: arXiv 2412.06464).
"""

from __future__ import annotations

import torch

CHUNK = 64
"""Tokens whose values are found together; bounds memory at heads x CHUNK x length elements."""
EPS = 1e-6
"""Added to the square of a length (source: `l2norm` of flash-linear-attention, which has this number in its code)."""


def gated_delta_rule(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor, rate: torch.Tensor
) -> torch.Tensor:
    """What every token reads, after it wrote; computed in fp32.

    Queries and keys are scaled to length 1, and queries by `key dim ** -0.5` (source: `torch_chunk_gated_delta_rule` of
    transformers).

    Args:
        query: [batch, sequence, key heads, key dim].
        key: As `query`.
        value: [batch, sequence, value heads, value dim]; neighbouring value heads share a key head.
        decay: Logarithm of what remains of the memory, fp32 [batch, sequence, value heads].
        rate: How much of the error is corrected, [batch, sequence, value heads].

    Returns:
        [batch, sequence, value heads, value dim], in the dtype of `value`.
    """
    shared = value.size(2) // key.size(2)
    q, k, v, d, r = (part.transpose(1, 2).float() for part in (query, key, value, decay, rate))
    q, k = (_of_length_one(part).repeat_interleave(shared, dim=1) for part in (q, k))
    q = q * q.size(-1) ** -0.5
    memory = v.new_zeros(*v.shape[:2], k.size(-1), v.size(-1))
    outputs = []
    for start in range(0, v.size(2), CHUNK):
        at = slice(start, start + CHUNK)
        output, memory = _chunk(q[:, :, at], k[:, :, at], v[:, :, at], d[:, :, at], r[:, :, at], memory)
        outputs.append(output)
    return torch.cat(outputs, dim=2).transpose(1, 2).to(value.dtype)


def _of_length_one(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS)


def _chunk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    rate: torch.Tensor,
    memory: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the tokens of a chunk read, and the memory after them; all [batch, heads, tokens, ...]."""
    total = decay.cumsum(-1)
    future = torch.ones(decay.size(-1), decay.size(-1), dtype=torch.bool, device=decay.device).triu(1)
    # From token j to token t; hidden before `exp`, which would overflow.
    between = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(future, float("-inf")).exp()
    remaining, rate = total.exp().unsqueeze(-1), rate.unsqueeze(-1)
    system = rate * between * (key @ key.transpose(-1, -2))
    errors = rate * (value - (remaining * key) @ memory)
    written = torch.linalg.solve_triangular(system, errors, upper=False, unitriangular=True)
    output = (remaining * query) @ memory + (between * (query @ key.transpose(-1, -2))) @ written
    to_end = (total[..., -1:] - total).exp().unsqueeze(-1)
    return output, remaining[..., -1:, :] * memory + (to_end * key).transpose(-1, -2) @ written
