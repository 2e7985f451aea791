"""Double precision in code that asks for single.

Both libraries compute norms, softmax and losses in float32 whatever the dtype of a model is. That would leave rounding
in, which float64 is asked for to take out.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

_to_float = torch.Tensor.float


def _kept(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else _to_float(tensor, *args, **options)


def _wide(softmax: Any, tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    if tensor.dtype == torch.float64:
        options.pop("dtype", None)
    found: torch.Tensor = softmax(tensor, *args, **options)
    return found


@contextlib.contextmanager
def double_precision(wanted: bool = True) -> Iterator[None]:
    """Leaves float64 tensors in float64 where code asks for float32 (`Tensor.float`, `softmax` with a dtype).

    Args:
        wanted: Whether it does; a context that does nothing saves its caller a case.
    """
    if not wanted:
        yield
        return
    replaced: list[tuple[Any, str, Any]] = [(torch.Tensor, "float", _kept)]
    replaced += [(module, "softmax", functools.partial(_wide, module.softmax)) for module in (torch, F)]
    originals = [getattr(module, name) for module, name, _ in replaced]
    for module, name, stand_in in replaced:
        setattr(module, name, stand_in)
    try:
        yield
    finally:
        for (module, name, _), original in zip(replaced, originals, strict=True):
            setattr(module, name, original)
