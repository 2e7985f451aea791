"""A running model as recipes over the memory of its ranks: every rank knows all of it, and holds its own part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.running import NAME, open_running
from ckptkit.dtypes import DTYPES, DTYPES_BY_TORCH_NAME
from ckptkit.errors import UnsupportedError
from ckptkit.formats.torch_legacy import RankFile, RankKey
from ckptkit.io.computed import Together, recipe_of
from ckptkit.io.plan import MEMORY, files_of
from ckptkit.io.zero_centered import Raised
from ckptkit.megatron.in_memory import Memory
from ckptkit.megatron.live.standing import Standing
from ckptkit.tensors import Literal, Piece, Region, Tensor

Form = tuple[str, tuple[int, ...]]
"""Element type and shape of a tensor."""


@dataclass(frozen=True)
class Holding:
    """A running model.

    Attributes:
        standing: This rank's part.
        checkpoint: The whole model; its regions name memory.
        own: Name of memory -> the bytes of a tensor of this rank, uint8 [bytes], on the model's device.
    """

    standing: Standing
    checkpoint: Checkpoint
    own: dict[str, torch.Tensor]

    def rows(self, piece: Piece) -> torch.Tensor:
        """The bytes of a piece of this rank, uint8 [rows, width].

        They are the model's own memory, but for numbers that Hugging Face has one more, and experts that it has
        transposed.
        """
        return Memory(self.own).piece(piece, {})

    @classmethod
    def of(cls, standing: Standing, reference: str | Path) -> Holding:
        """Joins what all ranks hold. Names, types and shapes are exchanged, no weights; every rank calls this.

        Args:
            standing: This rank's part.
            reference: Hugging Face directory with config.json, tokenizer and shard map.

        Raises:
            InputError: Tensors are missing, unknown or mis-shaped; or the reference is damaged.
            UnsupportedError: No family of ours, or an element type that checkpoints do not have.
        """
        tensors = standing.tensors()
        forms: list[dict[str, Form]] | None = [_forms(chunk) for chunk in tensors] if standing.replica == 0 else None
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, None if forms is None else (standing.key, forms))
        ranks = {key: _recipes(key, chunks) for key, chunks in filter(None, everyone)}
        own = {
            _memory(standing.key, number, name): value.detach().contiguous().reshape(-1).view(torch.uint8)
            for number, chunk in enumerate(tensors)
            for name, value in chunk.items()
        }
        return cls(standing, open_running(ranks, standing.grid, reference), own)


def owner(piece: Piece) -> RankKey | None:
    """The rank in whose memory a piece is; None for what is in files, or at hand everywhere.

    Raises:
        UnsupportedError: Its bytes are computed from memory.
    """
    if isinstance(piece, Region) and piece.file.startswith(MEMORY):
        pp, tp, ep = map(int, piece.file[len(MEMORY) :].split("/", 1)[0].split(","))
        return pp, tp, ep
    if any(file.startswith(MEMORY) for file in files_of(piece)):
        how, inputs = (isinstance(piece, Literal) and recipe_of(piece.data)) or (None, ())
        # A vector, which every rank has whole; or an expert whose rows are columns in files, in no other's memory.
        if isinstance(how, Raised | Together):
            keys = {owner(one) for tensor in inputs for band in tensor.bands for one in band.pieces}
            if len(keys) == 1:
                return keys.pop()
        raise UnsupportedError(
            "a layout whose weights must be computed of what several ranks hold, or from experts in one tensor",
            where=NAME,
            hint="use megatron-core's experts with a weight for each, for GPT-OSS with expert_tensor_parallel_size 1",
        )
    return None


def _memory(key: RankKey, chunk: int, name: str) -> str:
    return f"{MEMORY}{','.join(map(str, key))}/{chunk}/{name}"


def _forms(chunk: dict[str, torch.Tensor]) -> dict[str, Form]:
    forms = {}
    for name, tensor in chunk.items():
        dtype = DTYPES_BY_TORCH_NAME.get(str(tensor.dtype).removeprefix("torch."))
        if dtype is None:
            raise UnsupportedError(f"{name} has elements of type {tensor.dtype}", where=NAME)
        forms[name] = dtype.name, tuple(tensor.shape)
    return forms


def _recipes(key: RankKey, chunks: Sequence[dict[str, Form]]) -> RankFile:
    names = ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
    return {
        label: {
            name: Tensor.from_file(_memory(key, number, name), 0, DTYPES[dtype], shape)
            for name, (dtype, shape) in chunk.items()
        }
        for number, (label, chunk) in enumerate(zip(names, chunks, strict=True))
    }
