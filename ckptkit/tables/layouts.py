"""Layouts: how Hugging Face tensors lie in the rows of a Megatron tensor.

A Megatron tensor consists of *parts*. `stack` puts one part after another. `interleave` cuts every part into one block
for each group; then the first block of each part comes, then the second of each, and so on. Most Hugging Face tensors
are one part. A Hugging Face tensor that itself holds several parts is declared with `by_head` (its parts take turns,
head by head) or with `flat` (they follow one another):

    qkv = interleave("qkv", GROUPS, heads=(HEADS, GROUPS, GROUPS), split=COLUMN)
    linear_attention = stack("in_proj", by_head(NK, KEYS, KEYS, VALUES, VALUES), by_head(NK, NV, NV), split=BY_PART)

Rows call a layout with the names and shapes of their tensors:
`qkv("self_attn.*_proj.weight", q=(Q, D), k=(KV, D), v=(KV, D))`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ckptkit.sharding.blocks import Block, in_blocks
from ckptkit.sharding.rules import COLUMN, GATED_COLUMN, Split
from ckptkit.tables.dims import GROUPS, HEADS, ONE, Dim, Shape
from ckptkit.tables.model_config import LayerConfig, ModelConfig
from ckptkit.tensors import Tensor, vstack


@dataclass(frozen=True, eq=False)
class Fused:
    """A Hugging Face tensor that holds several parts.

    Attributes:
        by: Number of groups of its rows; each group holds a block of every part.
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
    """A Hugging Face tensor that holds one part after another.

    Args:
        heights: Rows of each part.
    """
    return Fused(ONE, heights)


@dataclass(frozen=True, eq=False)
class Layout:
    """The order of the parts in the rows of a Megatron tensor.

    Attributes:
        name: For reports.
        by: Number of groups of the rows; each group holds a block of every part.
        inside: For each Hugging Face tensor, in order: the parts inside it, or None for a single part. Tensors beyond
            the end of this list are single parts.
        heads: Number of heads of each part, if its rows belong to heads. A head is never divided between ranks.
        split: The default rule that splits such a tensor over tensor parallel ranks.
        keys: Names of the parts, if distributed checkpoints hold each as a tensor of its own.
    """

    name: str
    by: Dim = ONE
    inside: tuple[Fused | None, ...] = ()
    heads: tuple[Dim, ...] = ()
    split: Split | None = None
    keys: tuple[str, ...] = ()

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
            heights: Rows of each Hugging Face tensor, then of each slot.
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
    """The Hugging Face tensors of a row: names -> shapes, and their layout."""

    layout: Layout
    shapes: Mapping[str, Shape]


@dataclass(frozen=True)
class SizedLayout:
    """A layout for one layer of a model.

    Attributes:
        groups: Number of groups of the Megatron tensor's rows.
        tensors: For each Hugging Face tensor: (number of groups of its rows, rows of each of its parts).
        heads: For each part: (number of its heads, their name in messages). Empty: every row is a head of its own.
    """

    groups: int
    tensors: tuple[tuple[int, tuple[int, ...]], ...]
    heads: tuple[tuple[int, str], ...] = ()

    @property
    def heights(self) -> list[int]:
        """Rows of each part."""
        return [height for _, heights in self.tensors for height in heights]

    @cached_property
    def plain(self) -> bool:
        """Whether every Hugging Face tensor is one part."""
        return all(len(heights) == 1 for _, heights in self.tensors)

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Hugging Face tensors -> the Megatron tensor.

        Raises:
            ValueError: They differ in dtype or columns, or their numbers of rows do not fit the layout.
        """
        if self.plain:
            return _together(tensors, self.groups)
        pairs = zip(tensors, self.tensors, strict=True)
        return _together(
            [part for tensor, (groups, heights) in pairs for part in _apart(tensor, groups, heights)], self.groups
        )

    def parts(self, tensor: Tensor) -> list[Tensor]:
        """The Megatron tensor -> its parts.

        Raises:
            ValueError: Its number of rows does not fit the layout.
        """
        return _apart(tensor, self.groups, self.heights)

    def unpack(self, tensor: Tensor) -> list[Tensor]:
        """The Megatron tensor -> its Hugging Face tensors.

        Raises:
            ValueError: Its number of rows does not fit the layout.
        """
        parts = iter(self.parts(tensor))
        return [_together([next(parts) for _ in heights], groups) for groups, heights in self.tensors]

    def by_part(self, *, shared: bool) -> Split:
        """A rule that cuts every part separately. A rank holds its share of the first part, then of the second, ...

        Args:
            shared: Whether ranks may outnumber the heads of a part. Then several ranks hold a copy of one head.
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
    """Cuts each part into `groups` blocks, and puts the blocks together in turns."""
    if len(parts) == 1:
        return parts[0]
    return vstack(parts if groups == 1 else list(_blocks(parts, groups)))


def _blocks(parts: Iterable[Tensor], groups: int) -> Iterable[Tensor]:
    sized = [(part, part.shape[0] // groups) for part in parts]
    for group in range(groups):
        for part, size in sized:
            yield part.rows(group * size, (group + 1) * size)


def _apart(tensor: Tensor, groups: int, heights: Sequence[int]) -> list[Tensor]:
    """The inverse of `_together`."""
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


def stack(
    name: str,
    *inside: Fused | None,
    heads: tuple[Dim, ...] = (),
    split: Split | None = None,
    keys: tuple[str, ...] = (),
) -> Layout:
    """A layout with one part after another."""
    return Layout(name, ONE, inside, heads, split, keys)


def interleave(
    name: str, by: Dim, *inside: Fused | None, heads: tuple[Dim, ...] = (), split: Split | None = None
) -> Layout:
    """A layout with, for each group, its block of every part."""
    return Layout(name, by, inside, heads, split)


copy = stack("copy")
gate_up = stack("gate/up", split=GATED_COLUMN)
qkv = interleave("qkv", GROUPS, heads=(HEADS, GROUPS, GROUPS), split=COLUMN)
"""For each key/value head: the query heads that share it, then its key, then its value.

Source: the view of the rows in `Attention.get_query_key_value_tensors` of Megatron-Core.
"""
