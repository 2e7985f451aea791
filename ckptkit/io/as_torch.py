"""Tensor recipes as torch tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptkit.dtypes import TORCH_DTYPE_NAMES
from ckptkit.tensors import Tensor

if TYPE_CHECKING:
    import torch


def load(tensor: Tensor) -> torch.Tensor:
    """Reads a tensor into CPU memory that it owns, in the dtype it is written in.

    Raises:
        StorageError: The disk answered with an error.
        UnsupportedError: torch has no such dtype here.
    """
    import torch

    from ckptkit.io.engine import read_tensor

    data = torch.from_numpy(read_tensor(tensor))
    return data.view(getattr(torch, TORCH_DTYPE_NAMES[tensor.out_dtype])).reshape(tensor.shape)
