"""Activations of the MLP by Hugging Face's names, learned ones included."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

from ckptkit.errors import UnsupportedError
from ckptkit.tables.model_config import QUICK_GELU, QUICK_GELU_ALPHA


class XIELU(torch.nn.Module):
    """The activation of Apertus: quadratic above zero, exponential below, with a learned steepness on either side.

    Above zero `p * x^2 + beta * x`, else `(expm1(min(x, eps)) - x) * n + beta * x`, where `p = softplus(alpha_p)` and
    `n = beta + softplus(alpha_n)` (source: arXiv 2411.13010, and `XIELUActivation` of transformers, whose beta and eps
    are also in the dtype of the weights).

    Args:
        dtype: Dtype of the parameters and constants.
    """

    beta: torch.Tensor
    eps: torch.Tensor

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.alpha_p = torch.nn.Parameter(torch.zeros(1, dtype=dtype))
        self.alpha_n = torch.nn.Parameter(torch.zeros(1, dtype=dtype))
        self.register_buffer("beta", torch.tensor(0.5, dtype=dtype), persistent=False)
        self.register_buffer("eps", torch.tensor(-1e-6, dtype=dtype), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Element by element; same shape and dtype."""
        # Each rank sees a part of the channels: backwards this sums the gradients of all of them.
        group = get_tensor_model_parallel_group()
        alpha_p, alpha_n = (copy_to_tensor_model_parallel_region(x, group) for x in (self.alpha_p, self.alpha_n))
        positive, negative = F.softplus(alpha_p), self.beta + F.softplus(alpha_n)
        return torch.where(
            x > 0,
            positive * x * x + self.beta * x,
            (torch.expm1(torch.minimum(x, self.eps)) - x) * negative + self.beta * x,
        )


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """`x * sigmoid(1.702 * x)`, element by element; megatron-core's is marked for compilation."""
    return x * torch.sigmoid(QUICK_GELU_ALPHA * x)


FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
    QUICK_GELU: quick_gelu,
}
LEARNED: dict[str, Callable[[torch.dtype], torch.nn.Module]] = {"xielu": XIELU}


def activation(name: str, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function that Hugging Face calls `name`; a learned one is a new module with parameters of `dtype`.

    Raises:
        UnsupportedError: It is not one that the runtime knows.
    """
    if name in LEARNED:
        return LEARNED[name](dtype)
    if name not in FUNCTIONS:
        known = ", ".join([*FUNCTIONS, *LEARNED])
        raise UnsupportedError(f"activation {name!r} is not in the runtime", hint=f"known: {known}")
    return FUNCTIONS[name]
