"""Tensors of torch as recipes, and recipes over them as tensors of torch.

The tables describe layouts as slices of bytes, whatever holds the bytes. Here that is torch's memory, of any device, so
that a model in memory goes through the same tables as the files of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ckptkit.dtypes import DTYPES_BY_TORCH_NAME, TORCH_DTYPE_NAMES
from ckptkit.errors import UnsupportedError
from ckptkit.io.computed import Apart, Together, recipe_of
from ckptkit.io.zero_centered import Lessened, Raised, Restored
from ckptkit.tensors import Const, Literal, Piece, Region, Tensor

How = Apart | Together | Lessened | Raised | Restored
"""What is done to tensors in memory."""


class Memory:
    """Tensors that recipes refer to, each under a name that stands for a file."""

    def __init__(self) -> None:
        self._bytes: dict[str, torch.Tensor] = {}

    def add(self, tensors: Mapping[str, torch.Tensor], place: str) -> dict[str, Tensor]:
        """Recipes of whole tensors; the memory is shared, not copied, where they are contiguous.

        Args:
            tensors: Name -> tensor, all on one device.
            place: Distinguishes equal names of several calls.

        Raises:
            UnsupportedError: An element type that checkpoints do not have.
        """
        recipes = {}
        for name, tensor in tensors.items():
            dtype = DTYPES_BY_TORCH_NAME.get(str(tensor.dtype).removeprefix("torch."))
            if dtype is None:
                raise UnsupportedError(f"{name} has elements of type {tensor.dtype}", where=place)
            file = f"{place}:{name}"
            self._bytes[file] = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            recipes[name] = Tensor.from_file(file, 0, dtype, tuple(tensor.shape))
        return recipes

    def read(self, recipe: Tensor) -> torch.Tensor:
        """The tensor that a recipe describes, in memory of its own, on the device of what it is made of."""
        dtype = getattr(torch, TORCH_DTYPE_NAMES[recipe.dtype])
        whole = torch.empty(recipe.shape, dtype=dtype, device=self._device(recipe))
        rows = whole.reshape(-1).view(torch.uint8).view(-1, recipe.row_width) if recipe.bands else whole
        top = 0
        made: dict[int, torch.Tensor] = {}
        for band in recipe.bands:
            left = 0
            for piece in band.pieces:
                rows[top : top + band.rows, left : left + piece.width] = self._piece(piece, made).to(whole.device)
                left += piece.width
            top += band.rows
        return whole if recipe.cast is None else whole.to(getattr(torch, TORCH_DTYPE_NAMES[recipe.cast]))

    def _device(self, recipe: Tensor) -> torch.device:
        for band in recipe.bands:
            for piece in band.pieces:
                if isinstance(piece, Region):
                    return self._bytes[piece.file].device
                if isinstance(piece, Literal) and (found := _recipe(piece)) is not None:
                    return self._device(found[1][0])
        return torch.device("cpu")

    def _make(self, how: How, inputs: tuple[Tensor, ...]) -> torch.Tensor:
        """The bytes of a tensor that is made of others."""
        parts = [self.read(tensor) for tensor in inputs]
        return _made(how, parts).contiguous().reshape(-1).view(torch.uint8)

    def _piece(self, piece: Piece, made: dict[int, torch.Tensor]) -> torch.Tensor:
        """The bytes of a piece, uint8 [rows, width].

        Args:
            piece: The piece.
            made: Bytes of recipes of which there were pieces before, by their identity.
        """
        if isinstance(piece, Region):
            source = self._bytes[piece.file]
            start = source.storage_offset() + piece.offset
            return source.as_strided((piece.rows, piece.width), (piece.pitch, 1), start)
        if isinstance(piece, Const):
            pattern = torch.tensor(list(piece.pattern), dtype=torch.uint8)
            return pattern.repeat(piece.rows, piece.width // len(piece.pattern))
        if (found := _recipe(piece)) is not None:
            key = id(piece.data)
            if key not in made:
                made[key] = self._make(*found)
            return made[key].as_strided((piece.rows, piece.width), (piece.pitch, 1), piece.offset)
        return _literal(piece)


def _recipe(piece: Literal) -> tuple[How, tuple[Tensor, ...]] | None:
    """How to make what a piece is a part of from tensors in memory, which are no files to read."""
    how, inputs = recipe_of(piece.data) or (None, ())
    return (how, inputs) if isinstance(how, How) else None


def _made(how: How, parts: list[torch.Tensor]) -> torch.Tensor:
    """A tensor that is made of others: turned, or one more or less than one of them."""
    if isinstance(how, Apart):
        return parts[0][:, how.at :: how.count].t()
    if isinstance(how, Together):
        return torch.stack(parts, dim=-1).transpose(0, 1)
    if isinstance(how, Raised):
        return parts[0] + 1
    if isinstance(how, Lessened):
        return parts[1] if len(parts) > 1 else parts[0] - 1
    stored, original = parts
    return torch.where(stored == original - 1, original, stored + 1)


def _literal(piece: Literal) -> torch.Tensor:
    end = piece.offset + (piece.rows - 1) * piece.pitch + piece.width
    data = piece.data[piece.offset : end] if isinstance(piece.data, bytes) else piece.data.read(piece.offset, end)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).as_strided((piece.rows, piece.width), (piece.pitch, 1))
