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

from ckptkit.megatron.stand_ins import replaced

_to_float, _to, _type = torch.Tensor.float, torch.Tensor.to, torch.Tensor.type


def _kept(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else _to_float(tensor, *args, **options)


def _kept_by_to(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    if tensor.dtype == torch.float64:
        args = tuple(torch.float64 if one is torch.float32 else one for one in args)
        options = {name: torch.float64 if one is torch.float32 else one for name, one in options.items()}
    return _to(tensor, *args, **options)


def _kept_by_type(tensor: torch.Tensor, dtype: Any = None, **options: Any) -> Any:
    wide = tensor.dtype == torch.float64 and dtype is torch.float32
    return tensor if wide else _type(tensor, dtype, **options)


def _wide(softmax: Any) -> Any:
    @functools.wraps(softmax)  # whoever watches torch's functions knows them by their names
    def in_its_own_type(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if tensor.dtype == torch.float64:
            options.pop("dtype", None)
        found: torch.Tensor = softmax(tensor, *args, **options)
        return found

    return in_its_own_type


@contextlib.contextmanager
def double_precision(wanted: bool = True) -> Iterator[None]:
    """Leaves float64 tensors in float64 where code asks for float32: `float`, `to`, `type`, `softmax` with a dtype.

    Args:
        wanted: Whether it does; a context that does nothing saves its caller a case.
    """
    if not wanted:
        yield
        return
    stand_ins: list[tuple[Any, str, Any]] = [(torch.Tensor, "float", _kept), (torch.Tensor, "to", _kept_by_to)]
    stand_ins += [(torch.Tensor, "type", _kept_by_type)]
    stand_ins += [(module, "softmax", _wide(module.softmax)) for module in (torch, F)]
    with replaced(stand_ins):
        yield
