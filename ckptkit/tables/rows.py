"""The rows of the family tables.

A family is a table. Each `Row` names one Megatron tensor and the Hugging Face tensors it consists of. It gives their
shapes, their layout inside the Megatron tensor, and the rule that splits it over tensor parallel ranks. Conversion,
checks and counts all read these rows, in both directions. Rows use canonical names on both sides: Megatron's names as
the Transformer Engine spec has them, and the names of a directory on the hub. Names of other writers of the same model
are in `spelling.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ckptkit.dtypes import DType
from ckptkit.sharding.rules import REPLICATED, Split
from ckptkit.tables.dims import Shape
from ckptkit.tables.layouts import Layout, Parts, copy
from ckptkit.tables.model_config import LayerConfig, ModelConfig
from ckptkit.tensors import Tensor

Raw = Mapping[str, Any]
"""A parsed config.json, or the text part of one. It never passes through transformers, which rewrites fields."""

When = Callable[[ModelConfig, LayerConfig], bool]
"""Whether a model, or a layer of it, has a tensor."""


def always(config: ModelConfig, layer: LayerConfig) -> bool:
    """The predicate of rows that every model of the family has."""
    return True


def untied(config: ModelConfig, layer: LayerConfig) -> bool:
    """Whether a model has a head of its own."""
    return not config.tied


def qkv_bias(config: ModelConfig, layer: LayerConfig) -> bool:
    """Whether query, key and value projections have biases."""
    return config.qkv_bias


def out_bias(config: ModelConfig, layer: LayerConfig) -> bool:
    """Whether the output projection of the attention has a bias."""
    return config.out_bias


def mlp_bias(config: ModelConfig, layer: LayerConfig) -> bool:
    """Whether the MLP has biases."""
    return config.mlp_bias


def qk_norm(config: ModelConfig, layer: LayerConfig) -> bool:
    """Whether queries and keys are normalised head by head."""
    return config.qk_norm


def dense(config: ModelConfig, layer: LayerConfig) -> bool:
    """Whether a layer has a dense MLP and no experts."""
    return not layer.moe


def sparse(config: ModelConfig, layer: LayerConfig) -> bool:
    """Whether a layer has experts."""
    return layer.moe


class Numbers(Protocol):
    """How the numbers of a Megatron tensor differ from those of its one Hugging Face tensor."""

    def to_megatron(self, tensor: Tensor) -> Tensor:
        """Hugging Face's numbers -> Megatron's; the inverse of `to_hf` without a rounding where that is known."""

    def to_hf(self, tensor: Tensor) -> Tensor:
        """Megatron's numbers -> Hugging Face's; of a result of `to_megatron` or `kept`, the numbers that it is of."""

    def original(self, tensor: Tensor) -> Tensor | None:
        """What a result of `to_megatron` or `kept` is of, or None for numbers that only Megatron is known to have."""

    def kept(self, stored: Tensor, original: Tensor) -> Tensor:
        """Megatron's numbers as they are stored, of which `to_hf` gives the original ones back.

        Args:
            stored: Megatron's numbers.
            original: Hugging Face's numbers, from before a conversion. An element counts while `to_megatron` gives the
                stored element of it.
        """

    def moved(self, tensor: Tensor) -> int:
        """Elements of a result of `kept` for which the original does not count; 0 of other tensors. It reads both."""

    def cast(self, tensor: Tensor, dtype: DType) -> Tensor:
        """Megatron's numbers in another type; where Hugging Face's are known, these are cast."""


@dataclass(frozen=True)
class Slot:
    """A part of a Megatron tensor that the model does not use.

    A conversion to Megatron fills it, a conversion to Hugging Face drops it.

    Attributes:
        name: A description of its content, for reports.
        shape: Its shape.
        value: The value of every element, unless the slot repeats a Hugging Face tensor.
        repeats: Index of the Hugging Face tensor of the row that fills it with a copy, or None.
        hf: Some Hugging Face files hold an unused tensor of this name. Where it is present, it fills the slot.
    """

    name: str
    shape: Shape
    value: float = 0.0
    repeats: int | None = None
    hf: str | None = None


@dataclass(frozen=True)
class Row:
    """One Megatron tensor (per layer if its name holds `{i}`, per expert if it also holds `{e}`).

    Attributes:
        megatron: Canonical Megatron name (Transformer Engine spec); `{i}` is the global layer, `{e}` the global expert.
        hf: Hugging Face names -> shapes, in the order of the layout. `{i}` is the global layer. `{j}` is the layer
            number within one half of a split Llama.
        layout: How the Hugging Face tensors lie inside the Megatron tensor.
        split: The rule that splits it over tensor parallel ranks.
        when: Whether a model, or one of its layers, has it.
        at_cut: Whether the tensor is part of a split Llama's adapter, which stands between two layers.
        slots: Parts without a Hugging Face tensor. The layout puts them after the Hugging Face tensors.
        first: Whether the first pipeline stage holds it. Any other tensor outside of layers, except the adapter, is on
            the last stage.
        buffer: Whether both libraries keep it in fp32 whatever the dtype of the model is, and no gradient trains it.
        numbers: How its numbers differ from those of its one Hugging Face tensor, or None where they are the same.
    """

    megatron: str
    hf: Mapping[str, Shape]
    layout: Layout
    split: Split
    when: When = always
    at_cut: bool = False
    slots: tuple[Slot, ...] = ()
    first: bool = False
    buffer: bool = False
    numbers: Numbers | None = None


MEGATRON_LAYER, HF_LAYER = "decoder.layers.{i}.", "model.layers.{i}."


def once(
    megatron: str,
    hf: str | Parts | None,
    shape: Shape | None = None,
    split: Split | None = None,
    *,
    when: When = always,
    slots: tuple[Slot, ...] = (),
    first: bool = False,
    at_cut: bool = False,
    buffer: bool = False,
    numbers: Numbers | None = None,
) -> Row:
    """A row for a tensor that a model has once, outside of its layers.

    Args:
        megatron: Canonical Megatron name.
        hf: The Hugging Face name, if the Megatron tensor is a copy of one tensor; or several tensors in a layout; or
            None for a tensor of slots alone.
        shape: The shape of the single Hugging Face tensor.
        split: The rule that splits it over tensor parallel ranks. The default is the rule of the layout; without one, a
            vector is replicated, and a matrix needs a rule.
        when: Whether a model has it.
        slots: Parts without a Hugging Face tensor.
        first: Whether the first pipeline stage holds it.
        at_cut: Whether it is part of a split Llama's adapter.
        buffer: Whether both libraries keep it in fp32 and no gradient trains it.
        numbers: How its numbers differ from those of its one Hugging Face tensor.

    Raises:
        ValueError: The single tensor has no shape, or is a matrix without a rule to split it.
    """
    parts = _parts(hf, shape)
    split = split or parts.layout.split
    if split is None:
        if any(len(shape) > 1 for shape in parts.shapes.values()):
            raise ValueError(f"{megatron}: say how it splits over ranks")
        split = REPLICATED
    return Row(megatron, parts.shapes, parts.layout, split, when, at_cut, slots, first, buffer, numbers)


def layer(
    megatron: str,
    hf: str | Parts | None,
    shape: Shape | None = None,
    split: Split | None = None,
    *,
    when: When = always,
    slots: tuple[Slot, ...] = (),
    buffer: bool = False,
    numbers: Numbers | None = None,
) -> Row:
    """A row for a tensor in every layer. `{e}` in its names stands for the number of an expert.

    Args:
        megatron: Canonical Megatron name inside a layer.
        hf: Hugging Face name inside a layer, or several tensors in a layout, or None for slots alone.
        shape: As for `once`.
        split: As for `once`.
        when: Whether a layer has it.
        slots: Parts without a Hugging Face tensor, with names inside a layer.
        buffer: As for `once`.
        numbers: As for `once`.

    Raises:
        ValueError: As for `once`.
    """
    parts = _parts(hf, shape)
    inside = Parts(parts.layout, {HF_LAYER + name: shape for name, shape in parts.shapes.items()})
    slots = tuple(replace(slot, hf=slot.hf and HF_LAYER + slot.hf) for slot in slots)
    return once(MEGATRON_LAYER + megatron, inside, None, split, when=when, slots=slots, buffer=buffer, numbers=numbers)


def _parts(hf: str | Parts | None, shape: Shape | None) -> Parts:
    if isinstance(hf, Parts):
        return hf
    if hf is None:
        return Parts(copy, {})
    if shape is None:
        raise ValueError(f"{hf}: say which shape it has")
    return Parts(copy, {hf: shape})


def renamed(rows: Iterable[Row], *pairs: tuple[str, str]) -> tuple[Row, ...]:
    """Rows for a model whose Hugging Face names differ.

    Args:
        rows: The rows.
        pairs: (old, new) pieces of names. For each name the first pair whose old piece occurs in it is used.
    """
    return tuple(
        replace(
            row,
            hf={_renamed(name, pairs): shape for name, shape in row.hf.items()},
            slots=tuple(replace(slot, hf=slot.hf and _renamed(slot.hf, pairs)) for slot in row.slots),
        )
        for row in rows
    )


def _renamed(name: str, pairs: Sequence[tuple[str, str]]) -> str:
    return next((name.replace(old, new, 1) for old, new in pairs if old in name), name)


def without(rows: Iterable[Row], *endings: str) -> tuple[Row, ...]:
    """All rows except those whose Megatron name has one of these endings."""
    return tuple(row for row in rows if not row.megatron.endswith(endings))


def choose(rows: Iterable[Row], *endings: str) -> tuple[Row, ...]:
    """The rows whose Megatron name has one of these endings."""
    return tuple(row for row in rows if row.megatron.endswith(endings))


def only(rows: Iterable[Row], condition: When) -> tuple[Row, ...]:
    """The same rows with a further condition: a layer has them only if `condition` holds, too."""
    return tuple(replace(row, when=_both(row.when, condition)) for row in rows)


def _both(first: When, second: When) -> When:
    return lambda config, layer: first(config, layer) and second(config, layer)


@dataclass(frozen=True)
class Replica:
    """A redundant Hugging Face tensor: a copy of another one that files may hold, and that a reader does not need."""

    hf: str
    of: str
    when: Callable[[ModelConfig], bool]


@dataclass(frozen=True)
class Buffer:
    """A single number that Hugging Face files store and Megatron has in its code.

    It goes into the sidecar as an extra. Where no sidecar has it, it is made again.

    Attributes:
        hf: Name, with `{i}`.
        value: Its value in the class of transformers. It is stored without a dimension, in the dtype of the weights.
        when: Whether a model has it.
    """

    hf: str
    value: float
    when: Callable[[ModelConfig], bool]
