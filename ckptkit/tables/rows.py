"""The language of the family tables: rows, layouts and symbolic shapes.

A family is a table. Each `Row` names one Megatron tensor, the Hugging Face tensors it is made of with their shapes, how
they are laid out inside it, and how it splits over tensor parallel ranks. Everything that converts, checks
or counts reads these rows, in both directions. Rows use canonical names on both sides; what differs between writers of
the same model is in `spelling.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckptkit.dtypes import DTYPES
from ckptkit.sharding.rules import Split, halves
from ckptkit.tables.model_config import LayerConfig, ModelConfig
from ckptkit.tensors import Tensor, vstack

_BF16 = DTYPES["BF16"]

Raw = Mapping[str, Any]
"""A config.json (or the text part of one) as parsed, never passed through transformers."""


@dataclass(frozen=True, eq=False)
class Dim:
    """A size that a config decides, with a name for messages."""

    name: str
    of: Callable[[ModelConfig, LayerConfig], int]

    def __mul__(self, factor: int) -> Dim:
        return Dim(f"{factor}*{self.name}", lambda config, layer: factor * self.of(config, layer))

    __rmul__ = __mul__


Shape = tuple[Dim, ...]

V = Dim("vocab_size", lambda config, layer: config.vocab_size)
D = Dim("hidden_size", lambda config, layer: layer.hidden_size or config.hidden_size)
Q = Dim("num_attention_heads*head_dim", lambda config, layer: layer.num_heads * layer.head_dim)
KV = Dim("num_key_value_heads*head_dim", lambda config, layer: layer.num_kv_heads * layer.head_dim)
HD = Dim("head_dim", lambda config, layer: layer.head_dim)
F = Dim("intermediate_size", lambda config, layer: layer.ffn_hidden_size)
E = Dim("num_experts", lambda config, layer: config.num_experts)
I = Dim("moe_intermediate_size", lambda config, layer: config.moe_ffn_hidden_size)  # noqa: E741  the field's letter
ONE = Dim("1", lambda config, layer: 1)
P = Dim("hidden_size_per_layer_input", lambda config, layer: config.per_layer_input_size)
LP = Dim("num_hidden_layers*" + P.name, lambda config, layer: config.num_layers * config.per_layer_input_size)
VP = Dim("vocab_size_per_layer_input", lambda config, layer: config.per_layer_vocab_size)


@dataclass(frozen=True, eq=False)
class Layout:
    """How the parts of a fused tensor lie inside it.

    Attributes:
        name: For reports.
        pack: Parts -> the fused tensor.
        unpack: The fused tensor and the shapes of the parts -> the parts.
    """

    name: str
    pack: Callable[[Sequence[Tensor], LayerConfig], Tensor]
    unpack: Callable[[Tensor, LayerConfig], list[Tensor]]


def _pack_qkv(parts: Sequence[Tensor], layer: LayerConfig) -> Tensor:
    """Per key/value head: the query heads that share it, then its key, then its value."""
    query, key, value = parts
    group, width = layer.num_heads // layer.num_kv_heads * layer.head_dim, layer.head_dim
    return vstack(
        [
            part.rows(g * size, (g + 1) * size)
            for g in range(layer.num_kv_heads)
            for part, size in ((query, group), (key, width), (value, width))
        ]
    )


def _unpack_qkv(fused: Tensor, layer: LayerConfig) -> list[Tensor]:
    """Query, key and value; without the value where the rows of each group leave no room for one."""
    sizes = [layer.num_heads // layer.num_kv_heads * layer.head_dim, layer.head_dim, layer.head_dim]
    if fused.shape[0] == layer.num_kv_heads * sum(sizes[:2]):
        sizes.pop()
    parts: list[list[Tensor]] = [[] for _ in sizes]
    at = 0
    for _ in range(layer.num_kv_heads):
        for part, size in zip(parts, sizes, strict=True):
            part.append(fused.rows(at, at + size))
            at += size
    return [vstack(part) for part in parts]


copy = Layout("copy", lambda parts, layer: parts[0], lambda fused, layer: [fused])
qkv = Layout("qkv", _pack_qkv, _unpack_qkv)
gate_up = Layout("gate/up", lambda parts, layer: vstack(parts), lambda fused, layer: list(halves(fused)))


When = Callable[[ModelConfig, LayerConfig], bool]
"""Whether a model, or a layer of it, has a tensor."""


def always(config: ModelConfig, layer: LayerConfig) -> bool:
    """The predicate of rows that every model of the family has."""
    return True


@dataclass(frozen=True)
class Slot:
    """A part of a Megatron tensor that the model does not use: filled on the way in, dropped on the way out.

    Attributes:
        name: What it holds, for reports.
        shape: Its shape.
        value: What every element of it is, unless it repeats a part.
        repeats: Index of the row's Hugging Face tensor that it repeats, or None.
        hf: Name of the tensor that some Hugging Face files hold for it although nothing uses it; then that fills it.
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
        hf: Hugging Face names -> shapes, in the order of the layout. `{i}` is the global layer, `{j}` the layer
            counted on its side of the adapter.
        layout: How the Hugging Face tensors lie inside the Megatron one.
        split: How it splits over tensor parallel ranks.
        when: Whether a model, or one of its layers, has it.
        at_cut: Whether it stands where the model's adapter does, between two layers, and not at an end of the model.
        slots: Parts without a Hugging Face tensor, which the layout puts behind those that have one.
        first: Whether the first pipeline stage holds it; without a layer and a cut the last one does by default.
    """

    megatron: str
    hf: Mapping[str, Shape]
    layout: Layout
    split: Split
    when: When = always
    at_cut: bool = False
    slots: tuple[Slot, ...] = ()
    first: bool = False


def renamed(rows: Iterable[Row], *pairs: tuple[str, str]) -> tuple[Row, ...]:
    """Rows for a model whose Hugging Face names differ: (old, new) pieces of names, the first that fits counts."""
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
    """Rows except those whose Megatron name ends so."""
    return tuple(row for row in rows if not row.megatron.endswith(endings))


def only(rows: Iterable[Row], condition: When) -> tuple[Row, ...]:
    """Rows that a layer has only if `condition` holds as well."""
    return tuple(replace(row, when=_both(row.when, condition)) for row in rows)


def _both(first: When, second: When) -> When:
    return lambda config, layer: first(config, layer) and second(config, layer)


@dataclass(frozen=True)
class Replica:
    """A Hugging Face tensor that repeats another one, allowed but not needed."""

    hf: str
    of: str
    when: Callable[[ModelConfig], bool]


@dataclass(frozen=True)
class Buffer:
    """A single number in Hugging Face files that Megatron keeps in code: it travels as an extra, or is made anew.

    Attributes:
        hf: Name, with `{i}`.
        value: What the class sets it to; stored without a dimension, in the dtype of the weights.
        when: Whether a model has it.
    """

    hf: str
    value: float
    when: Callable[[ModelConfig], bool]
