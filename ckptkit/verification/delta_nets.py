"""Gated DeltaNets of transformers that round elsewhere: a second sample of what rounding does to the reference.

Another implementation of attention leaves these layers as they are. What is computed here is the same, rounded as the
kernels of causal-conv1d and flash-linear-attention round it: once, behind the activation of the convolution, and once
behind the gated norm. The functions of transformers for any device round before the activation, and before the weight
of the norm. Float32 sees neither: there the delta rule sums up in another order, that of shorter chunks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ckptkit.megatron.stand_ins import replaced

_CONVOLUTION = "causal_conv1d_fn"
_RULE = "torch_chunk_gated_delta_rule"
CHUNK = 8
"""Tokens of a chunk of the delta rule, for which transformers has 64."""


def delta_nets(model: torch.nn.Module) -> list[Any]:
    """The gated DeltaNets of a transformers model; in all of its classes the name says so."""
    return [module for module in model.modules() if type(module).__name__.endswith("GatedDeltaNet")]


@contextmanager
def rounded_once(model: torch.nn.Module) -> Iterator[None]:
    """Lets the DeltaNets of a transformers model round as kernels do; a model without them stays as it is."""
    found = delta_nets(model)
    norms = {type(module.norm) for module in found}
    homes = {sys.modules[type(module).__module__] for module in found}
    stand_ins: list[tuple[Any, str, Any]] = [(norm, "forward", _gated) for norm in norms]
    stand_ins += [(home, _CONVOLUTION, _convolved) for home in homes if hasattr(home, _CONVOLUTION)]
    stand_ins += [
        (home, _RULE, partial(rule, chunk_size=CHUNK)) for home in homes if (rule := getattr(home, _RULE, None))
    ]
    with replaced(stand_ins):
        yield


def _convolved(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **options: object,
) -> torch.Tensor:
    """In place of `causal_conv1d_fn`, whose arguments these are: [batch, channels, sequence], of the same shape."""
    wide: torch.Tensor = F.conv1d(
        hidden_states.float(),
        weight.float().unsqueeze(1),
        None if bias is None else bias.float(),
        padding=weight.shape[-1] - 1,
        groups=weight.shape[0],
    )[..., : hidden_states.shape[-1]]
    activated = wide if activation is None else F.silu(wide)
    return activated.to(hidden_states.dtype)


def _gated(self: Any, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """In place of the gated norm's `forward`."""
    wide = hidden_states.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
    output: torch.Tensor = self.weight.float() * normed * F.silu(gate.float())
    return output.to(hidden_states.dtype)
