"""The language of the family tables: rows, layouts and symbolic shapes.

A family is a table. Each `Row` names one Megatron tensor, the Hugging Face tensors it is made of with their shapes, how
they are laid out inside it, and how it splits over tensor parallel ranks. Everything that converts, checks
or counts reads these rows, in both directions. Rows use canonical names on both sides; what differs between writers of
the same model is in `spelling.py`.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.families.config import LayerConfig, ModelConfig
from ckptkit.families.spelling import GROUPED, HUB, LOCAL, SEQUENTIAL, TE, HfSpelling, Spelling, template
from ckptkit.sharding.rules import Split, halves
from ckptkit.tensors import DType, Tensor, vstack

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
D = Dim("hidden_size", lambda config, layer: config.hidden_size)
Q = Dim("num_attention_heads*head_dim", lambda config, layer: layer.num_heads * layer.head_dim)
KV = Dim("num_key_value_heads*head_dim", lambda config, layer: layer.num_kv_heads * layer.head_dim)
HD = Dim("head_dim", lambda config, layer: layer.head_dim)
F = Dim("intermediate_size", lambda config, layer: layer.ffn_hidden_size)
E = Dim("num_experts", lambda config, layer: config.num_experts)
I = Dim("moe_intermediate_size", lambda config, layer: config.moe_ffn_hidden_size)  # noqa: E741  the field's letter
ONE = Dim("1", lambda config, layer: 1)


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
    sizes = (layer.num_heads // layer.num_kv_heads * layer.head_dim, layer.head_dim, layer.head_dim)
    parts: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
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
class Row:
    """One Megatron tensor (per layer if its name holds `{i}`, per expert if it also holds `{e}`).

    Attributes:
        megatron: Canonical Megatron name (Transformer Engine spec); `{i}` is the global layer, `{e}` the global expert.
        hf: Hugging Face names -> shapes, in the order of the layout.
        layout: How the Hugging Face tensors lie inside the Megatron one.
        split: How it splits over tensor parallel ranks.
        when: Whether a model, or one of its layers, has it.
    """

    megatron: str
    hf: Mapping[str, Shape]
    layout: Layout
    split: Split
    when: When = always


def renamed(rows: Iterable[Row], *pairs: tuple[str, str]) -> tuple[Row, ...]:
    """Rows for a model whose Hugging Face names differ: (old, new) pieces of names, the first that fits counts."""
    return tuple(replace(row, hf={_renamed(name, pairs): shape for name, shape in row.hf.items()}) for row in rows)


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


def _number(value: float, dtype: DType) -> Tensor:
    """A 0-dim tensor, rounded to nearest even as torch rounds a Python number."""
    formats = {"F64": "<d", "F32": "<f", "F16": "<e", "BF16": "<f"}
    if dtype.name not in formats:
        raise UnsupportedError(f"no {dtype} form of a number", hint="choose bfloat16, float16 or float32 with --dtype")
    data = struct.pack(formats[dtype.name], value)
    if dtype.name == "BF16":
        bits = int.from_bytes(data, "little")
        data = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).to_bytes(2, "little")
    return Tensor.from_bytes(data, dtype, ())


@dataclass(frozen=True)
class Item:
    """A row for one model, layer and expert, with everything resolved.

    Attributes:
        row: The row it comes from.
        key: Canonical Megatron name with the global layer and expert numbers.
        layer: Global layer number, or None.
        parts: Hugging Face names -> shapes in elements.
        config: The layer's sizes.
        expert: Global expert number, or None.
    """

    row: Row
    key: str
    layer: int | None
    parts: dict[str, tuple[int, ...]]
    config: LayerConfig
    expert: int | None = None

    def name(self, layer: int | None, expert: int | None = None) -> str:
        """The canonical Megatron name under a rank's own layer and expert numbers."""
        return self.row.megatron.format(i=layer, e=expert)

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Hugging Face tensors -> the Megatron tensor."""
        try:
            return self.row.layout.pack(tensors, self.config)
        except ValueError as error:
            raise InputError(
                f"{', '.join(self.parts)}: {error}", hint="--dtype casts all of them to one type"
            ) from None

    def unpack(self, tensor: Tensor) -> dict[str, Tensor]:
        """The Megatron tensor -> its Hugging Face tensors."""
        return dict(zip(self.parts, self.row.layout.unpack(tensor, self.config), strict=True))

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of the Megatron tensor, without vocabulary padding."""
        shapes = list(self.parts.values())
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes[0] else ()


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name: Short name.
        architectures: Hugging Face class names.
        rows: The table.
        parse: Raw config.json -> `ModelConfig`.
        unparse: (`ModelConfig` read from Megatron's `args`, base config.json) -> raw config.json with these values.
        replicas: Redundant copies that some Hugging Face files hold.
        extras: Hugging Face tensors without a Megatron slot; they travel in the sidecar. Names with `{i}` for every
            layer, or with a `*` at the end for everything that starts so.
        buffers: Extras that can be made anew where nothing brought them along.
        spellings: Megatron names of different writers; the first is canonical.
        hf_spellings: Hugging Face names of different writers; the first is canonical.
        prefix: What stands before all Megatron names of this family's models, unless only the text part is wanted.
        marks: Canonical Megatron names (without numbers) that a checkpoint of this family is recognised by.
        text_only: Multimodal families: raw config.json -> raw config.json of the text model alone. The canonical names
            of both are the same.
        sizes_in: Key of config.json under which the sizes of the text model are, or None for the top level.
    """

    name: str
    architectures: tuple[str, ...]
    rows: tuple[Row, ...]
    parse: Callable[[Raw], ModelConfig]
    unparse: Callable[[ModelConfig, Raw], dict[str, Any]]
    replicas: tuple[Replica, ...] = ()
    extras: tuple[str, ...] = ()
    buffers: tuple[Buffer, ...] = ()
    spellings: tuple[Spelling, ...] = (TE, LOCAL)
    hf_spellings: tuple[HfSpelling, ...] = (HUB,)
    prefix: str = ""
    marks: tuple[str, ...] = ()
    text_only: Callable[[Raw], dict[str, Any]] | None = None
    sizes_in: str | None = None

    def items(self, config: ModelConfig) -> Iterator[Item]:
        """Every tensor that a model of this config has, in table order, layer by layer, expert by expert."""
        for row in self.rows:
            if "{i}" not in row.megatron and row.when(config, config.layers[0]):
                yield _resolve(row, config, None, None)
        for index, layer in enumerate(config.layers):
            for row in self.rows:
                if "{i}" in row.megatron and row.when(config, layer):
                    for expert in range(config.num_experts) if "{e}" in row.megatron else (None,):
                        yield _resolve(row, config, index, expert)

    def is_extra(self, name: str, config: ModelConfig) -> bool:
        """Whether a Hugging Face tensor has no Megatron slot but belongs to the model all the same."""
        patterns = [*self.extras, *(buffer.hf for buffer in self.buffers if buffer.when(config))]
        return any(_matches(pattern, name, config.num_layers) for pattern in patterns)

    def missing_buffers(self, present: Collection[str], config: ModelConfig, dtype: DType) -> dict[str, Tensor]:
        """The buffers that a model has and `present` does not, with the values of the class.

        Args:
            present: Hugging Face names at hand.
            config: The model.
            dtype: Element type to make them in, that of the weights.

        Raises:
            UnsupportedError: `dtype` is no floating-point type that torch rounds numbers to.
        """
        names = {
            buffer.hf.format(i=index): buffer.value
            for buffer in self.buffers
            if buffer.when(config)
            for index in range(config.num_layers)
        }
        return {name: _number(value, dtype) for name, value in names.items() if name not in present}

    def unfuse(self, tensors: Mapping[str, Tensor], config: ModelConfig) -> tuple[dict[str, Tensor], str]:
        """Hugging Face tensors as some writer names them -> canonical names, and the name of the writer's spelling.

        Raises:
            InputError: Stacked experts are missing or have another shape than the config says.
        """
        spelling = self.hf_spelling(tensors, config)
        if spelling == self.hf_spellings[0]:
            return dict(tensors), spelling.name
        shapes = {name: shape for item in self.items(config) for name, shape in item.parts.items()}
        return spelling.split(tensors, shapes, config), spelling.name

    def fuse(self, tensors: Mapping[str, Tensor], config: ModelConfig, spelling: str) -> dict[str, Tensor]:
        """Hugging Face tensors under canonical names -> the names of a spelling.

        Raises:
            UsageError: The family has no such spelling.
            InputError: Experts that should be one tensor differ in dtype.
        """
        found = next((found for found in self.hf_spellings if found.name == spelling), None)
        if found is None:
            raise UsageError(f"{self.name} has no spelling {spelling!r}", hint=_names(self.hf_spellings))
        return dict(tensors) if found == self.hf_spellings[0] else found.join(tensors, config)

    def hf_spelling(self, names: Collection[str], config: ModelConfig) -> HfSpelling:
        """The spelling of Hugging Face names: the one that has most of them in common."""
        if len(self.hf_spellings) == 1:
            return self.hf_spellings[0]
        canonical = [name for item in self.items(config) for name in item.parts]
        present = set(names)
        return max(self.hf_spellings, key=lambda spelling: len(spelling.names(canonical, config) & present))

    def spelling(self, name: str, experts: str | None = None, *, text: bool = False) -> Spelling:
        """The Megatron spelling called `name`.

        Args:
            name: `te`, `local`, or another that the family has.
            experts: `grouped` or `sequential`; None for what goes with the spelling.
            text: Without the prefix of a multimodal family, as a text model alone is named.

        Raises:
            UsageError: The family has no such spelling.
        """
        found = next((found for found in self.spellings if found.name == name), None)
        if found is None or experts not in (None, GROUPED, SEQUENTIAL):
            wrong = f"spelling {name!r}" if found is None else f"naming of experts {experts!r}"
            hint = _names(self.spellings) if found is None else f"{GROUPED} or {SEQUENTIAL}"
            raise UsageError(f"{self.name} has no {wrong}", hint=hint)
        return replace(found, experts=experts or found.experts, prefix="" if text else found.prefix or self.prefix)

    def spelling_of(self, names: Iterable[str]) -> Spelling:
        """The spelling that Megatron names are written in: the one that knows most of them."""
        written = {template(name) for name in names}
        return min(self._variants(), key=lambda spelling: len(written - self._templates(spelling)))

    def fits(self, names: Iterable[str]) -> bool:
        """Whether all of these Megatron names are in the table, and the marks of the family among them."""
        written = {template(name) for name in names}
        spelling = self.spelling_of(written)
        marks = {spelling.written(mark) for mark in self.marks}
        return marks <= written <= self._templates(spelling)

    def _variants(self) -> Iterator[Spelling]:
        """Every way to write the Megatron names, the usual ones first."""
        for other in (False, True):
            for base in self.spellings:
                usual = base.experts
                experts = usual if not other else SEQUENTIAL if usual == GROUPED else GROUPED
                for prefix in dict.fromkeys((base.prefix or self.prefix, "")):
                    yield replace(base, experts=experts, prefix=prefix)

    def _templates(self, spelling: Spelling) -> set[str]:
        """The table's names without numbers, as a spelling writes them."""
        return {template(spelling.written(row.megatron.format(i=0, e=0))) for row in self.rows}


def _names(spellings: Iterable[Spelling | HfSpelling]) -> str:
    return f"one of {', '.join(spelling.name for spelling in spellings)}"


def _matches(pattern: str, name: str, num_layers: int) -> bool:
    if pattern.endswith("*"):
        return name.startswith(pattern[:-1])
    head, _, tail = pattern.partition("{i}")
    match = re.fullmatch(f"{re.escape(head)}(0|[1-9][0-9]*){re.escape(tail)}", name)
    return match is not None and int(match[1]) < num_layers


def _resolve(row: Row, config: ModelConfig, index: int | None, expert: int | None) -> Item:
    layer = config.layers[index or 0]
    shapes = {name: tuple(dim.of(config, layer) for dim in shape) for name, shape in row.hf.items()}
    parts = {name.format(i=index, e=expert): shape for name, shape in shapes.items()}
    return Item(row, row.megatron.format(i=index, e=expert), index, parts, layer, expert)
