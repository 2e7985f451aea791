"""`state_dict_of`: the parts of Hugging Face's tensors that a rank of a running model holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ckptkit.dtypes import TORCH_DTYPE_NAMES
from ckptkit.megatron.live.holding import Holding, owner
from ckptkit.megatron.live.known import reference_of
from ckptkit.megatron.live.standing import Standing, prepare
from ckptkit.megatron.live.together import together
from ckptkit.tensors import Tensor


class LocalTensor(NamedTuple):
    """A part of a Hugging Face tensor in the memory of this rank.

    Attributes:
        name: Hugging Face's name.
        shape: Shape of the whole tensor.
        offsets: The place of the part's first element in it, one number for each axis.
        local: The part: a box of the whole tensor. It is the model's own memory, so it must not be changed; of a norm
            that Megatron has less one, and of an expert that Hugging Face has transposed, it is a copy.
    """

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    local: torch.Tensor


def state_dict_of(model: Any, *, hf_reference: str | Path | None = None) -> Iterator[LocalTensor]:
    """What this rank holds of the model's Hugging Face tensors; all ranks call this.

    Together the ranks of one data parallel replica yield every element of the model once; towers, which it does not
    hold, are yielded by none. No weights are sent, so whoever pushes them to an engine decides how they travel. None
    are copied but experts that Hugging Face has transposed, one at a time.

    Args:
        model: A GPTModel of megatron-core or the list of its chunks, in whatever Megatron wraps them.
        hf_reference: Hugging Face directory with the config.json; by default the one that `load_hf` read.

    Raises:
        UsageError: There is no running model, or no reference.
        InputError: The model is not the reference's.
        UnsupportedError: No family of ours, or a layout whose weights must be computed.
    """
    prepare(model)
    standing = together(lambda: Standing.of(model))
    reference = together(lambda: reference_of(standing.chunks, hf_reference))
    holding = together(lambda: Holding.of(standing, reference))
    checkpoint = holding.checkpoint
    tensors = together(lambda: checkpoint.hf_tensors(checkpoint.stored_names))
    together(lambda: [owner(piece) for whole in tensors.values() for band in whole.bands for piece in band.pieces])
    return (part for name, tensor in tensors.items() for part in _parts(name, tensor, holding))


def _parts(name: str, tensor: Tensor, holding: Holding) -> Iterator[LocalTensor]:
    top, item = 0, tensor.dtype.itemsize
    for band in tensor.bands:
        left = 0
        for piece in band.pieces:
            if owner(piece) == holding.standing.key:
                rows = holding.rows(piece).view(getattr(torch, TORCH_DTYPE_NAMES[tensor.dtype]))
                yield from _boxes(name, tensor.shape, rows, top, left // item)
            left += piece.width
        top += band.rows


def _boxes(name: str, shape: tuple[int, ...], rows: torch.Tensor, top: int, left: int) -> Iterator[LocalTensor]:
    """Rows of a tensor whose leading axes are folded into rows, as boxes of the tensor."""
    if len(shape) < 2:
        yield LocalTensor(name, shape, (top,) * len(shape), rows.reshape(shape[:0] or (-1,)) if shape else rows[0, 0])
        return
    height, done = shape[-2], 0
    while done < len(rows):
        slab, inside = divmod(top + done, height)
        count = min(len(rows) - done, height - inside)
        leading: list[int] = []
        for axis in reversed(shape[:-2]):
            slab, index = divmod(slab, axis)
            leading.insert(0, index)
        local = rows[done : done + count]
        box = local.reshape(*[1] * len(leading), *local.shape)
        yield LocalTensor(name, shape, (*leading, inside, left), box)
        done += count
