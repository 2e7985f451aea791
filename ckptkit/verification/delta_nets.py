"""Gated DeltaNets of transformers: computed in torch where a kernel would be a poor reference, or rounded elsewhere.

With flash-linear-attention and causal-conv1d installed, transformers takes their kernels for every type and device. On
a CPU they do not run, in fp32 they multiply as TF32 does, with 10 bits of mantissa, and on some GPUs the first refuses
to go backwards, because some releases of its compiler make wrong gradients (issue 640 of flash-linear-attention).

Another implementation of attention leaves these layers as they are. So a second sample of what rounding does to the
reference is the same computation, rounded as those kernels round it: once, behind the activation of the convolution,
and once behind the gated norm. The functions of transformers for any device round before the activation, and before
the weight of the norm. Float32 sees neither: there the delta rule sums up in another order, that of shorter chunks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ckptkit.megatron.stand_ins import replaced

_CONVOLUTION = "causal_conv1d_fn"
_RULE = "torch_chunk_gated_delta_rule"
_RULES = (_RULE, "torch_recurrent_gated_delta_rule")
CHUNK = 8
"""Tokens of a chunk of the delta rule, for which transformers has 64."""


def delta_nets(model: torch.nn.Module) -> list[Any]:
    """The gated DeltaNets of a transformers model; in all of its classes the name says so."""
    return [module for module in model.modules() if type(module).__name__.endswith("GatedDeltaNet")]


@contextmanager
def without_kernels(model: torch.nn.Module, dtype: torch.dtype, device: str) -> Iterator[None]:
    """Lets the DeltaNets of a transformers model compute in torch, unless they round to 16 bits on a GPU, and forwards.

    Args:
        model: Any model; one without DeltaNets stays as it is.
        dtype: What it computes in.
        device: Where: `cpu`, or a CUDA device.
    """
    allowed = device != "cpu" and dtype.itemsize == 2
    homes = {sys.modules[type(module).__module__] for module in delta_nets(model)}
    places = [(home, name, getattr(home, name, None)) for home in homes for name in (*_RULES, _CONVOLUTION)]
    with replaced([(home, name, _chosen(one, allowed)) for home, name, one in places if hasattr(one, "__wrapped__")]):
        yield


def _chosen(function: Any, allowed: bool) -> Callable[..., Any]:
    """What transformers falls back to without kernels; or, if that is allowed and nobody goes backwards, `function`."""

    def called(*args: Any, **options: Any) -> Any:
        kernel = allowed and not torch.is_grad_enabled()
        return (function if kernel else function.__wrapped__)(*args, **options)

    return called


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
