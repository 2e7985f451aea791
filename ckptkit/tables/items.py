"""Rows resolved for one model, layer and expert: their names, shapes, and the translation in both directions."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from types import MappingProxyType
from typing import NamedTuple

from ckptkit.dtypes import DTYPES, DType, rounded_to_bf16
from ckptkit.errors import InputError, UnsupportedError
from ckptkit.sharding.rules import Split
from ckptkit.tables.layouts import SizedLayout
from ckptkit.tables.model_config import LayerConfig, ModelConfig
from ckptkit.tables.rows import Row, Slot
from ckptkit.tables.spelling import Spelling
from ckptkit.tensors import Literal, Tensor

_BF16 = DTYPES["BF16"]


def number(value: float, dtype: DType) -> Tensor:
    """A 0-dim tensor, rounded to nearest even as torch rounds a Python number.

    Raises:
        UnsupportedError: `dtype` is no floating-point type that torch rounds numbers to.
    """
    formats = {"F64": "<d", "F32": "<f", "F16": "<e", "BF16": "<f"}
    if dtype.name not in formats:
        raise UnsupportedError(f"no {dtype} form of a number", hint="choose bfloat16, float16 or float32 with --dtype")
    data = struct.pack(formats[dtype.name], value)
    if dtype.name == "BF16":
        data = rounded_to_bf16(int.from_bytes(data, "little")).to_bytes(2, "little")
    return Tensor.from_bytes(data, dtype, ())


@dataclass(frozen=True)
class ResolvedSlot:
    """A slot of a row for one model and layer.

    Attributes:
        slot: The slot.
        shape: Its shape in elements.
        hf: Name under which Hugging Face files may hold it, or None.
    """

    slot: Slot
    shape: tuple[int, ...]
    hf: str | None

    def filled(self, parts: Sequence[Tensor], dtype: DType) -> Tensor:
        """The tensor with which a conversion to Megatron fills the slot.

        Args:
            parts: The Hugging Face tensors of the row.
            dtype: Element type for a row without Hugging Face tensors.
        """
        if self.slot.repeats is not None:
            return parts[self.slot.repeats]
        like = parts[0] if parts else None
        kind = like.dtype if like is not None else dtype
        (piece,) = number(self.slot.value, kind).bands[0].pieces
        assert isinstance(piece, Literal) and isinstance(piece.data, bytes)
        constant = Tensor.full(kind, self.shape, piece.data)
        return constant if like is None or like.cast is None else constant.astype(like.cast)


@dataclass(frozen=True, eq=False)
class Kind:
    """A row for the layers of a model that are alike: what the tensors of all these layers and experts have in common.

    Attributes:
        row: The row.
        config: The sizes of such a layer.
        model: The model.
        given: Shapes of the Hugging Face tensors and of the slots where these are not what the row says.
    """

    row: Row
    config: LayerConfig
    model: ModelConfig
    given: tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]] | None = None

    @cached_property
    def parts(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the Hugging Face tensors in elements."""
        if self.given is not None:
            return self.given[0]
        return tuple(tuple(dim.of(self.model, self.config) for dim in shape) for shape in self.row.hf.values())

    @cached_property
    def slots(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the slots in elements."""
        if self.given is not None:
            return self.given[1]
        return tuple(tuple(dim.of(self.model, self.config) for dim in slot.shape) for slot in self.row.slots)

    @cached_property
    def layout(self) -> SizedLayout:
        """How the Hugging Face tensors and the slots lie in the Megatron tensor."""
        return self._sized([*self.parts, *self.slots])

    @cached_property
    def bare_layout(self) -> SizedLayout:
        """The layout without the slots."""
        return self._sized(self.parts)

    def _sized(self, shapes: Sequence[tuple[int, ...]]) -> SizedLayout:
        return self.row.layout.sized(self.model, self.config, [shape[0] if shape else 1 for shape in shapes])

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of the Megatron tensor, without vocabulary padding."""
        return _stacked([*self.parts, *self.slots])

    @cached_property
    def bare_shape(self) -> tuple[int, ...] | None:
        """Shape of the Megatron tensor without its slots; None if no slot repeats a Hugging Face tensor."""
        return _stacked(self.parts) if any(slot.repeats is not None for slot in self.row.slots) else None

    @cached_property
    def parameters(self) -> int:
        """Elements of its Hugging Face tensors: slots are no parameters."""
        return sum(map(prod, self.parts))

    def items(self, layer: int | None, experts: Iterable[int | None] = (None,)) -> Iterator[Item]:
        """The tensors of one layer.

        Args:
            layer: Global number of the layer, or None for a row outside of layers.
            experts: Global numbers of the experts.
        """
        row, model = self.row, self.model
        in_group = None if layer is None else model.number_in_group(layer)
        cut = model.adapter.after if row.at_cut and model.adapter is not None else None

        def named(name: str) -> str:
            return name.format(i=layer, j=in_group, e="{}")

        key, names = named(row.megatron), [named(name) for name in row.hf]
        slots = tuple(
            ResolvedSlot(slot, shape, slot.hf and named(slot.hf))
            for slot, shape in zip(row.slots, self.slots, strict=True)
        )
        for expert in experts:
            number = str(expert)
            found = tuple([name.replace("{}", number) for name in names])
            yield Item(self, key.replace("{}", number), layer, found, expert, cut, slots)


class Item(NamedTuple):
    """One Megatron tensor of a model: a row for one layer and expert. A model has up to hundreds of thousands of them.

    Attributes:
        kind: What it has in common with other layers and experts.
        key: Canonical Megatron name with the global layer and expert numbers.
        layer: Global layer number, or None.
        hf: Hugging Face names.
        expert: Global expert number, or None.
        cut: For a tensor of an adapter, the number of the layer after it; None for all others.
        slots: Parts that the model does not use.
    """

    kind: Kind
    key: str
    layer: int | None
    hf: tuple[str, ...]
    expert: int | None = None
    cut: int | None = None
    slots: tuple[ResolvedSlot, ...] = ()

    @property
    def row(self) -> Row:
        """The row."""
        return self.kind.row

    @property
    def parts(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face names -> shapes in elements."""
        return dict(zip(self.hf, self.kind.parts, strict=True))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the Megatron tensor, without vocabulary padding."""
        return self.kind.shape

    @property
    def bare_shape(self) -> tuple[int, ...] | None:
        """Shape of the Megatron tensor without its slots; None if no slot repeats a Hugging Face tensor."""
        return self.kind.bare_shape

    @property
    def parameters(self) -> int:
        """Elements of its Hugging Face tensors: slots are no parameters."""
        return self.kind.parameters

    def name(self, layer: int | None, expert: int | None = None) -> str:
        """The canonical Megatron name under a rank's own layer and expert numbers."""
        return self.row.megatron.format(i=layer, e=expert)

    def split(self, spelling: Spelling) -> Split:
        """The rule that splits it over tensor parallel ranks in a spelling."""
        split = spelling.split_of(self.row.megatron) or self.row.split
        if split.by_part or (spelling.blocks and self.row.layout.heads):
            return replace(self.kind.layout.by_part(shared=spelling.blocks), expert=split.expert)
        return split

    def pack(
        self, tensors: Sequence[Tensor], unused: Mapping[str, Tensor] = MappingProxyType({}), dtype: DType = _BF16
    ) -> Tensor:
        """Hugging Face tensors -> the Megatron tensor.

        Args:
            tensors: One for each of `parts`.
            unused: Tensors for slots, by Hugging Face name; other slots are filled.
            dtype: Element type of a tensor that has no parts.

        Raises:
            InputError: The tensors differ in dtype.
        """
        if self.row.numbers is not None:
            return self.row.numbers.to_megatron(*tensors)
        if not self.slots and self.hf:
            return self._pack(tensors)
        slots = [
            unused[slot.hf] if slot.hf is not None and slot.hf in unused else slot.filled(tensors, dtype)
            for slot in self.slots
        ]
        return self._pack([*tensors, *slots])

    def _pack(self, parts: Sequence[Tensor]) -> Tensor:
        try:
            return self.kind.layout.pack(parts)
        except ValueError as error:
            raise InputError(
                f"{', '.join(self.hf)}: {error}", hint="cast them to one type first: Megatron has them in one tensor"
            ) from None

    def unpack(self, tensor: Tensor) -> dict[str, Tensor]:
        """The Megatron tensor -> its Hugging Face tensors."""
        if self.row.numbers is not None:
            tensor = self.row.numbers.to_hf(tensor)
        return dict(zip(self.hf, self.kind.layout.unpack(tensor), strict=False))

    def cast(self, tensor: Tensor, dtype: DType) -> Tensor:
        """The Megatron tensor in another type."""
        return tensor.astype(dtype) if self.row.numbers is None else self.row.numbers.cast(tensor, dtype)

    def replaced(self, tensor: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """The Megatron tensor with other Hugging Face tensors in it.

        A slot that repeats one of them follows; all other slots stay.
        """
        if self.row.numbers is not None:
            return self.pack([parts[name] for name in self.hf]) if parts.keys() & set(self.hf) else tensor
        pieces = self.kind.layout.unpack(tensor)
        own = [parts.get(name, piece) for name, piece in zip(self.hf, pieces, strict=False)]
        slots = [
            piece if slot.slot.repeats is None else slot.filled(own, tensor.dtype)
            for slot, piece in zip(self.slots, pieces[len(own) :], strict=True)
        ]
        return self.kind.layout.pack([*own, *slots])

    def dropped(self, tensor: Tensor) -> list[tuple[ResolvedSlot, Tensor, Tensor]]:
        """The slots of the Megatron tensor: (slot, its content, the content that `pack` would put there)."""
        if not self.slots:
            return []
        pieces = self.kind.layout.unpack(tensor)
        parts, slots = pieces[: len(self.hf)], pieces[len(self.hf) :]
        filled = [slot.filled(parts, tensor.dtype) for slot in self.slots]
        return [
            # A slot of a row without parts is filled in the stored type; the tensor may be cast on its way out.
            (slot, found, expected if tensor.cast is None else expected.astype(tensor.cast))
            for slot, found, expected in zip(self.slots, slots, filled, strict=True)
        ]

    def completed(self, tensor: Tensor) -> Tensor:
        """Adds the slots to the Megatron tensor of a writer that leaves them out."""
        return self.pack(self.kind.bare_layout.unpack(tensor), dtype=tensor.dtype)


def _stacked(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes[0] else ()
