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
from collections.abc import Iterator
from dataclasses import dataclass, replace

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

    @property
    def module(self) -> str:
        """Hugging Face name of the layer."""
        return self.weight.removesuffix(_WEIGHT)

    @property
    def word(self) -> str:
        """The word for this part in the names of `canonical`, or an empty string for a tensor of one part."""
        words = _WORDS.get(self.item.row.layout.name)
        if words is not None:
            return words[self.index]
        return f"part{self.index}" if has_parts(self.item) else ""

    def key(self, side: str) -> str:
        """Name of one of its factors in `canonical`."""
        return _inserted(self.item.key, _middle(CANONICAL, side, self.word))


def is_linear(item: Item) -> bool:
    """Whether a Megatron tensor is the weight of linear layers."""
    return (
        bool(item.parts)
        and _MATRIX.search(item.row.megatron) is not None
        and all(len(shape) == 2 and name.endswith(_WEIGHT) for name, shape in item.parts.items())
        and not is_embedding(item)
    )


def has_parts(item: Item) -> bool:
    """Whether a Megatron tensor is more than the weight of one linear layer."""
    return len(item.parts) + len(item.slots) > 1


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
    item, (rows, columns) = linear.item, linear.shape
    shape = (rank, columns) if side == A else (rows, rank)
    name = f"{linear.module}.lora_{side}{_WEIGHT}"
    split = _split(item.row.split, side, CANONICAL, whole=not has_parts(item))
    return _derived(item, _middle(CANONICAL, side, linear.word), {name: shape}, copy, split)


def fused(item: Item, side: str, rank: int, layout: str = FUSED) -> Item:
    """The row of a factor of a whole Megatron tensor, in `fused` or `peft`."""
    middle, split = _middle(layout, side), _split(item.row.split, side, layout, whole=True)
    if side == A:
        columns = next(iter(item.parts.values()))[1]
        return _derived(item, middle, {_inserted(item.key, middle): (rank, columns)}, copy, split)
    return _by_rows(item, middle, f".lora_{side}{_WEIGHT}", (rank,), split)


def magnitudes(item: Item) -> Item:
    """The row of the lengths of all rows of a Megatron tensor, which DoRA has in `fused`."""
    base = item.row.split
    split = base if base.axis == 0 else replace(REPLICATED, expert=base.expert)
    return _by_rows(item, "adapter", ".lora_magnitude_vector", (), split, "_magnitude")


def has_magnitudes(item: Item) -> bool:
    """Whether there is a form for the lengths of the rows of a Megatron tensor.

    `DoRA` of Megatron-Bridge has none for experts: it asks a linear for its one weight. Rows that the model does not
    use, and those of vocabulary padding, have no length that could be trained.
    """
    unused = item.row.split.padded or any(slot.slot.repeats is None for slot in item.slots)
    return item.expert is None and not unused


def _by_rows(item: Item, middle: str, ending: str, rest: tuple[int, ...], split: Split, after: str = "") -> Item:
    """A row that has the rows of the weight in the weight's layout, and other axes behind them."""
    parts = {f"{name.removesuffix(_WEIGHT)}{ending}": (shape[0], *rest) for name, shape in item.parts.items()}
    slots = tuple(
        # The delta of a part that the model does not use is zero, unless the part repeats another.
        ResolvedSlot(replace(slot.slot, value=0.0), (slot.shape[0], *rest), None)
        for slot in item.slots
    )
    return _derived(item, middle, parts, item.row.layout, split, slots, after)


def stored_layouts(item: Item) -> Iterator[tuple[str, int | None]]:
    """The ways in which an adapter of a Megatron tensor can be named: (layout, part of `canonical` or None)."""
    yield FUSED, None
    yield PEFT, None
    if has_parts(item):
        for index in range(len(item.parts)):
            yield CANONICAL, index


def part_of(item: Item, index: int) -> Linear:
    """A linear layer of a Megatron tensor."""
    name, shape = list(item.parts.items())[index]
    return Linear(item, index, name, shape)


def _middle(layout: str, side: str, word: str = "") -> str:
    if layout == PEFT:
        return _PEFT[side]
    return f"adapter.adapter_{word}.{_BRIDGE[side]}" if word else f"adapter.{_BRIDGE[side]}"


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
    item: Item,
    middle: str,
    parts: dict[str, tuple[int, ...]],
    layout: Layout,
    split: Split,
    slots: tuple[ResolvedSlot, ...] = (),
    after: str = "",
) -> Item:
    name = _inserted(item.row.megatron, middle) + after
    row = replace(item.row, megatron=name, hf={}, layout=layout, split=split, slots=())
    kind = Kind(row, item.kind.config, item.kind.model, (tuple(parts.values()), tuple(slot.shape for slot in slots)))
    return item._replace(kind=kind, key=_inserted(item.key, middle) + after, hf=tuple(parts), slots=slots)
