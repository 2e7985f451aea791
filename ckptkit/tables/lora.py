"""LoRA adapters: their rows follow from the rows of the linear layers. No family writes one.

An adapter adds `scale * B A` to the weight `W` of a linear layer, `[out, in]`; A is `[rank, in]`, B is `[out, rank]`.
So B has the rows of the weight: their layout in a Megatron tensor, and their division over ranks. A has its columns.

There are three layouts of Megatron names for a tensor that several Hugging Face weights make up (q, k and v; gate and
up):

- `canonical`: a pair of factors for each Hugging Face weight (`CanonicalLoRA` of Megatron-Bridge);
- `fused`: one pair (`LoRA` of Megatron-Bridge). All parts share A, and B is laid out as the weight is;
- `peft`: one pair again, under the names of PEFT (ms-swift, mcore-bridge).

DoRA keeps a length for each row of the weight, too. Only `fused` has a form for it: a vector with the layout of a bias
(`DoRA` of Megatron-Bridge), which is divided as the weight's rows are.

Source: `ParallelLinearAdapter` and `GroupedExpertLinearAdapter` in `peft/utils.py` and `canonical_lora.py` of
Megatron-Bridge (commit 067f987), which divide A by rank for column-parallel layers, and B by rows for all layers;
`ParallelLinearDoRAAdapter` in `peft/dora_layers.py` of the same commit; `LoraParallelLinear` in `tuners/lora.py` of
mcore-bridge, where only the factor beside the divided axis is divided.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from ckptkit.sharding.rules import COLUMN, REPLICATED, ROW, Split
from ckptkit.tables.family import Family
from ckptkit.tables.items import Item, Kind, ResolvedSlot
from ckptkit.tables.layouts import Layout, copy
from ckptkit.tables.model_config import ModelConfig

FUSED, CANONICAL, PEFT = "fused", "canonical", "peft"
LAYOUTS = (FUSED, CANONICAL, PEFT)
A, B = "A", "B"
SIDES = (A, B)
_WEIGHT = ".weight"
_MATRIX = re.compile(r"\.weight(?:\{e\})?$")
_WORDS = {"qkv": ("q", "k", "v"), "gate/up": ("gate", "up")}
_KINDS = 1 << 12
"""Kinds that are kept: a model has a few tens of them, and each has factors of a few ranks."""
_BESIDE, _MAGNITUDE = "adapter", "_magnitude"
_BRIDGE, _PEFT = {A: "linear_in", B: "linear_out"}, {A: "lora_A.default", B: "lora_B.default"}


@dataclass(frozen=True)
class Linear:
    """A linear layer of the Hugging Face model.

    Attributes:
        item: The Megatron tensor that its weight is part of.
        index: Which part.
        weight: Hugging Face name of the weight.
        shape: Shape of the weight, [out, in].
    """

    item: Item
    index: int
    weight: str
    shape: tuple[int, ...]

    @cached_property
    def module(self) -> str:
        """Hugging Face name of the layer."""
        return self.weight.removesuffix(_WEIGHT)

    @property
    def word(self) -> str:
        """The word for this part in the names of `canonical`, or an empty string for a tensor of one part."""
        return _word(self.item.kind, self.index)

    def key(self, side: str) -> str:
        """Name of one of its factors in `canonical`."""
        return self._keys[side]

    @cached_property
    def _keys(self) -> dict[str, str]:
        return {side: _inserted(self.item.key, _middle(CANONICAL, side, self.word)) for side in SIDES}


def is_linear(item: Item) -> bool:
    """Whether a Megatron tensor is the weight of linear layers."""
    return _holds_linears(item.kind) and not is_embedding(item)


@lru_cache(maxsize=_KINDS)
def _holds_linears(kind: Kind) -> bool:
    matrices = kind.parts and all(len(shape) == 2 for shape in kind.parts)
    named = all(name.endswith(_WEIGHT) for name in kind.row.hf)
    return bool(matrices) and named and _MATRIX.search(kind.row.megatron) is not None


def has_parts(item: Item) -> bool:
    """Whether a Megatron tensor is more than the weight of one linear layer."""
    return _has_parts(item.kind)


def _has_parts(kind: Kind) -> bool:
    return len(kind.parts) + len(kind.slots) > 1


def _word(kind: Kind, index: int) -> str:
    words = _WORDS.get(kind.row.layout.name)
    if words is not None:
        return words[index]
    return f"part{index}" if _has_parts(kind) else ""


def is_embedding(item: Item) -> bool:
    """Whether a Megatron tensor is a table that token ids are looked up in."""
    return item.row.first and item.row.split.padded


def linears(family: Family, config: ModelConfig) -> dict[str, Linear]:
    """Hugging Face name of a module -> the linear layer, for all of a model."""
    return {
        name.removesuffix(_WEIGHT): Linear(item, index, name, shape)
        for item in family.items(config)
        if is_linear(item)
        for index, (name, shape) in enumerate(item.parts.items())
    }


def single(linear: Linear, side: str, rank: int) -> Item:
    """The row of a factor of one linear layer, in `canonical`."""
    kind = _kind_of_single(linear.item.kind, linear.index, side, rank)
    name = f"{linear.module}.lora_{side}{_WEIGHT}"
    return linear.item._replace(kind=kind, key=linear.key(side), hf=(name,), slots=())


def fused(item: Item, side: str, rank: int, layout: str = FUSED) -> Item:
    """The row of a factor of a whole Megatron tensor, in `fused` or `peft`."""
    kind, slots = _kind_of_fused(item.kind, side, rank, layout)
    key = _inserted(item.key, _middle(layout, side))
    names = (key,) if side == A else _names(item, f".lora_{side}{_WEIGHT}")
    return item._replace(kind=kind, key=key, hf=names, slots=slots)


def magnitudes(item: Item) -> Item:
    """The row of the lengths of all rows of a Megatron tensor, which DoRA has in `fused`."""
    kind, slots = _kind_of_magnitudes(item.kind)
    key = _inserted(item.key, _BESIDE) + _MAGNITUDE
    return item._replace(kind=kind, key=key, hf=_names(item, ".lora_magnitude_vector"), slots=slots)


def has_magnitudes(item: Item) -> bool:
    """Whether there is a form for the lengths of the rows of a Megatron tensor.

    `DoRA` of Megatron-Bridge has none for experts: it asks a linear for its one weight. Rows that the model does not
    use, and those of vocabulary padding, have no length that could be trained.
    """
    unused = item.row.split.padded or any(slot.slot.repeats is None for slot in item.slots)
    return item.expert is None and not unused


def _names(item: Item, ending: str) -> tuple[str, ...]:
    return tuple([f"{name.removesuffix(_WEIGHT)}{ending}" for name in item.hf])


@lru_cache(maxsize=_KINDS)
def _kind_of_single(kind: Kind, index: int, side: str, rank: int) -> Kind:
    rows, columns = kind.parts[index]
    shape = (rank, columns) if side == A else (rows, rank)
    split = _split(kind.row.split, side, CANONICAL, whole=not _has_parts(kind))
    return _derived(kind, _middle(CANONICAL, side, _word(kind, index)), (shape,), copy, split)


@lru_cache(maxsize=_KINDS)
def _kind_of_fused(kind: Kind, side: str, rank: int, layout: str) -> tuple[Kind, tuple[ResolvedSlot, ...]]:
    middle, split = _middle(layout, side), _split(kind.row.split, side, layout, whole=True)
    if side == A:
        return _derived(kind, middle, ((rank, kind.parts[0][1]),), copy, split), ()
    return _by_rows(kind, middle, (rank,), split)


@lru_cache(maxsize=_KINDS)
def _kind_of_magnitudes(kind: Kind) -> tuple[Kind, tuple[ResolvedSlot, ...]]:
    base = kind.row.split
    return _by_rows(kind, _BESIDE, (), base if base.axis == 0 else replace(REPLICATED, expert=base.expert), _MAGNITUDE)


def _by_rows(
    kind: Kind, middle: str, rest: tuple[int, ...], split: Split, after: str = ""
) -> tuple[Kind, tuple[ResolvedSlot, ...]]:
    """A kind that has the rows of the weight in the weight's layout, and other axes behind them."""
    slots = tuple(
        # The delta of a part that the model does not use is zero, unless the part repeats another.
        ResolvedSlot(replace(slot, value=0.0), (shape[0], *rest), None)
        for slot, shape in zip(kind.row.slots, kind.slots, strict=True)
    )
    parts = tuple((shape[0], *rest) for shape in kind.parts)
    return _derived(kind, middle, parts, kind.row.layout, split, slots, after), slots


@dataclass(frozen=True)
class Stored:
    """A way in which an adapter of a Megatron tensor can be named.

    Attributes:
        layout: The layout.
        index: The part of the tensor in `canonical`, or None for all of it.
        names: Canonical names of A and B, with `{i}` and `{e}` as in rows.
        magnitudes: That of the lengths of rows, which DoRA has; None where the layout has no form for them.
    """

    layout: str
    index: int | None
    names: tuple[str, str]
    magnitudes: str | None


@lru_cache(maxsize=_KINDS)
def stored_layouts(kind: Kind) -> tuple[Stored, ...]:
    """The ways in which an adapter of the Megatron tensors of a kind can be named."""
    ways: list[tuple[str, int | None]] = [(FUSED, None), (PEFT, None)]
    if _has_parts(kind):
        ways += [(CANONICAL, index) for index in range(len(kind.parts))]
    found = []
    for layout, index in ways:
        word = "" if index is None else _word(kind, index)
        a, b = (_inserted(kind.row.megatron, _middle(layout, side, word)) for side in SIDES)
        lengths = _kind_of_magnitudes(kind)[0].row.megatron if layout == FUSED else None
        found.append(Stored(layout, index, (a, b), lengths))
    return tuple(found)


def part_of(item: Item, index: int) -> Linear:
    """A linear layer of a Megatron tensor."""
    return Linear(item, index, item.hf[index], item.kind.parts[index])


def _middle(layout: str, side: str, word: str = "") -> str:
    if layout == PEFT:
        return _PEFT[side]
    return f"{_BESIDE}.adapter_{word}.{_BRIDGE[side]}" if word else f"{_BESIDE}.{_BRIDGE[side]}"


def _inserted(name: str, middle: str) -> str:
    """A name with a module between the linear layer and its weight."""
    module, last, ending = name.rpartition(_WEIGHT)
    return f"{module}.{middle}{last}{ending}"


def _split(base: Split, side: str, layout: str, *, whole: bool) -> Split:
    """How a factor divides over tensor parallel ranks, from how the weight does.

    Args:
        base: The rule of the weight.
        side: The factor.
        layout: The layout of the names.
        whole: Whether the factor has the rows of the whole Megatron tensor, and not those of one part.
    """
    by_columns, by_rows = base.axis == -1, base.axis == 0
    if side == A:
        found = ROW if by_columns else REPLICATED if layout == PEFT else COLUMN
    elif by_rows:
        found = base if whole else COLUMN
    else:
        found = REPLICATED if layout == PEFT else COLUMN
    return found if found is base else replace(found, expert=base.expert)


def _derived(
    kind: Kind,
    middle: str,
    parts: tuple[tuple[int, ...], ...],
    layout: Layout,
    split: Split,
    slots: tuple[ResolvedSlot, ...] = (),
    after: str = "",
) -> Kind:
    name = _inserted(kind.row.megatron, middle) + after
    row = replace(kind.row, megatron=name, hf={}, layout=layout, split=split, slots=())
    return Kind(row, kind.config, kind.model, (parts, tuple(slot.shape for slot in slots)))
