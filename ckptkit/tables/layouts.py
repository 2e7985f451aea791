"""How Hugging Face tensors lie in the rows of a Megatron tensor, in words that tables put together.

A Megatron tensor is made of *parts*. `stack` puts one part behind another; `interleave` cuts every part into as many
blocks as there are groups, and lets the blocks take turns. Most Hugging Face tensors are one part; one that is several
itself is declared with `by_head` (its parts take turns, head by head) or `flat` (they follow one another):

    qkv = interleave("qkv", GROUPS, heads=(HEADS, GROUPS, GROUPS), split=COLUMN)
    linear_attention = stack("in_proj", by_head(NK, KEYS, KEYS, VALUES, VALUES), by_head(NK, NV, NV), split=BY_PART)

A layout is also a word of a row: `qkv("self_attn.*_proj.weight", q=(Q, D), k=(KV, D), v=(KV, D))`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ckptkit.sharding.blocks import Block, in_blocks
from ckptkit.sharding.rules import COLUMN, GATED_COLUMN, Split
from ckptkit.tables.dims import GROUPS, HEADS, ONE, Dim, Shape
from ckptkit.tables.model_config import LayerConfig, ModelConfig
from ckptkit.tensors import Tensor, vstack


@dataclass(frozen=True, eq=False)
class Fused:
    """A Hugging Face tensor that holds several parts.

    Attributes:
        by: Into how many groups its rows fall; each holds a block of every part.
        heights: Rows of each part, over all groups.
    """

    by: Dim
    heights: tuple[Dim, ...]


def by_head(heads: Dim, *heights: Dim) -> Fused:
    """A Hugging Face tensor that holds, head by head, the head's rows of each part.

    Args:
        heads: How many heads there are.
        heights: Rows of each part, over all heads.
    """
    return Fused(heads, heights)


def flat(*heights: Dim) -> Fused:
    """A Hugging Face tensor that holds one part behind another.

    Args:
        heights: Rows of each part.
    """
    return Fused(ONE, heights)


@dataclass(frozen=True, eq=False)
class Layout:
    """How the parts of a Megatron tensor take turns in its rows.

    Attributes:
        name: For reports.
        by: Into how many groups the rows fall; each holds a block of every part.
        inside: The parts inside of the first Hugging Face tensors: None for a single part. The others have one each.
        heads: How many heads each part has, where rows of one head belong together. No rank divides a head.
        split: How such a tensor splits over tensor parallel ranks, unless its row says otherwise.
    """

    name: str
    by: Dim = ONE
    inside: tuple[Fused | None, ...] = ()
    heads: tuple[Dim, ...] = ()
    split: Split | None = None

    def __call__(self, pattern: str, **shapes: Shape) -> Parts:
        """Hugging Face tensors in this layout.

        Args:
            pattern: Their names, with a `*` where they differ.
            shapes: The word in place of the `*` -> the shape of that tensor, in the order of the layout.
        """
        return Parts(self, {pattern.replace("*", word): shape for word, shape in shapes.items()})

    def sized(self, config: ModelConfig, layer: LayerConfig, heights: Sequence[int]) -> SizedLayout:
        """The layout for one layer.

        Args:
            config: The model.
            layer: The layer.
            heights: Rows of each Hugging Face tensor, and of each slot behind them.
        """
        inside = [*self.inside, *(None for _ in heights)][: len(heights)]
        return SizedLayout(
            self.by.of(config, layer),
            tuple(
                (1, (height,))
                if fused is None
                else (fused.by.of(config, layer), tuple(dim.of(config, layer) for dim in fused.heights))
                for fused, height in zip(inside, heights, strict=True)
            ),
            tuple((dim.of(config, layer), dim.name) for dim in self.heads),
        )


@dataclass(frozen=True)
class Parts:
    """Hugging Face tensors of a row: names with shapes, in a layout."""

    layout: Layout
    shapes: Mapping[str, Shape]


@dataclass(frozen=True)
class SizedLayout:
    """A layout for one layer of a model.

    Attributes:
        groups: Into how many groups the rows of the Megatron tensor fall.
        tensors: For each Hugging Face tensor into how many groups its own rows fall, and the rows of its parts.
        heads: For each part the number of its heads and their name; empty: every row is a head.
    """

    groups: int
    tensors: tuple[tuple[int, tuple[int, ...]], ...]
    heads: tuple[tuple[int, str], ...] = ()

    @property
    def heights(self) -> list[int]:
        """Rows of each part."""
        return [height for _, heights in self.tensors for height in heights]

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Hugging Face tensors -> the Megatron tensor.

        Raises:
            ValueError: They differ in dtype or columns, or have other rows than the layout.
        """
        pairs = zip(tensors, self.tensors, strict=True)
        return _together(
            [part for tensor, (groups, heights) in pairs for part in _apart(tensor, groups, heights)], self.groups
        )

    def unpack(self, tensor: Tensor) -> list[Tensor]:
        """The Megatron tensor -> its Hugging Face tensors.

        Raises:
            ValueError: It has other rows than the layout.
        """
        parts = iter(_apart(tensor, self.groups, self.heights))
        return [_together([next(parts) for _ in heights], groups) for groups, heights in self.tensors]

    def by_part(self, *, shared: bool) -> Split:
        """The rule by which every part is cut for itself: a rank's rows are its share of each, one behind another.

        Args:
            shared: Whether ranks may outnumber the heads of a part, and then hold copies of one.
        """
        heights = self.heights
        heads = self.heads or tuple((height, "rows") for height in heights)
        blocks = [Block(n, height // n, name) for (n, name), height in zip(heads, heights, strict=True)]
        return in_blocks(
            blocks,
            pack=lambda parts: _together(parts, self.groups),
            unpack=lambda tensor: _apart(tensor, self.groups, heights),
            shared=shared,
        )


def _together(parts: Sequence[Tensor], groups: int) -> Tensor:
    """The blocks of parts, in turns."""
    if len(parts) == 1:
        return parts[0]
    return vstack(list(_blocks(parts, groups)))


def _blocks(parts: Iterable[Tensor], groups: int) -> Iterable[Tensor]:
    sized = [(part, part.shape[0] // groups) for part in parts]
    for group in range(groups):
        for part, size in sized:
            yield part.rows(group * size, (group + 1) * size)


def _apart(tensor: Tensor, groups: int, heights: Sequence[int]) -> list[Tensor]:
    """The parts whose blocks take turns in a tensor."""
    if len(heights) == 1:
        return [tensor]
    if not tensor.shape or tensor.shape[0] != sum(heights) or any(height % groups for height in heights):
        raise ValueError(
            f"{list(tensor.shape)} is not made of {groups} x {[height / groups for height in heights]} rows"
        )
    blocks: list[list[Tensor]] = [[] for _ in heights]
    at = 0
    for _ in range(groups):
        for part, height in zip(blocks, heights, strict=True):
            part.append(tensor.rows(at, at + height // groups))
            at += height // groups
    return [vstack(part) for part in blocks]


def stack(name: str, *inside: Fused | None, heads: tuple[Dim, ...] = (), split: Split | None = None) -> Layout:
    """One part behind another."""
    return Layout(name, ONE, inside, heads, split)


def interleave(
    name: str, by: Dim, *inside: Fused | None, heads: tuple[Dim, ...] = (), split: Split | None = None
) -> Layout:
    """For each group its block of every part."""
    return Layout(name, by, inside, heads, split)


copy = stack("copy")
gate_up = stack("gate/up", split=GATED_COLUMN)
qkv = interleave("qkv", GROUPS, heads=(HEADS, GROUPS, GROUPS), split=COLUMN)
"""Per key/value head: the query heads that share it, then its key, then its value.

Source: `Attention.get_query_key_value_tensors` of Megatron-Core, which views the rows so.
"""
