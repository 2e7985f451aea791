"""Double precision in code that asks for single: in this process for a while, or in a rank for good."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.opening import open_checkpoint

_to_float = torch.Tensor.float


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else _to_float(tensor)


def _wide(softmax: Any, tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    if tensor.dtype == torch.float64:
        options.pop("dtype", None)
    found: torch.Tensor = softmax(tensor, *args, **options)
    return found


def _patch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.Tensor, "float", _kept)
    for module in (torch, F):
        patch.setattr(module, "softmax", functools.partial(_wide, module.softmax))


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """Leave fp64 tensors in fp64 where code asks for fp32."""
    with pytest.MonkeyPatch.context() as patch:
        _patch(patch)
        yield


@functools.cache
def _for_good() -> None:
    _patch(pytest.MonkeyPatch())


def opened(path: str) -> Checkpoint:
    """Opens a checkpoint in a rank that computes in double precision from now on."""
    _for_good()
    return open_checkpoint(path)
