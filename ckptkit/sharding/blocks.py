"""Tensors whose parts are cut separately: a rank holds its share of the first part, then its share of the next, ...

So the order of rows inside a shard depends on the number of shards. Where ranks outnumber the heads of a part, the
ranks that share a head may each hold a copy of it.

Source: `load_state_dict_to_megatron_llama` and `merge_megatron_ckpt_llama` of verl, for queries, keys and values; the
`in_proj` of Megatron-Core's linear attention, for parts that no two ranks share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ckptkit.errors import UsageError
from ckptkit.sharding.rules import Split
from ckptkit.tensors import Tensor, vstack


@dataclass(frozen=True)
class Block:
    """A part of a fused tensor.

    Attributes:
        heads: Number of its heads; a head is never divided between ranks.
        rows: Rows of each head.
        name: Word for the heads in messages.
    """

    heads: int
    rows: int
    name: str = "heads"


def in_blocks(
    blocks: Sequence[Block],
    pack: Callable[[Sequence[Tensor]], Tensor],
    unpack: Callable[[Tensor], Sequence[Tensor]],
    *,
    shared: bool,
) -> Split:
    """The rule for a fused tensor whose parts are cut each for itself.

    Args:
        blocks: Its parts.
        pack: The whole parts -> the fused tensor as the tables know it.
        unpack: The inverse.
        shared: Whether ranks may outnumber the heads of a part (not those of the part that has most).
    """
    most = max(block.heads for block in blocks)

    def heights(size: int) -> list[int]:
        """Rows that a rank has of each part."""
        for block in blocks:
            may_share = shared and block.heads < most and size % block.heads == 0
            if block.heads % size and not may_share:
                counts = dict.fromkeys(f"{other.heads} {other.name}" for other in blocks)
                raise UsageError(f"{' and '.join(counts)} do not divide over {size} ranks")
        return [max(block.heads // size, 1) * block.rows for block in blocks]

    def cut(tensor: Tensor, rank: int, size: int) -> Tensor:
        starts = [rank * block.heads // size * block.rows for block in blocks]
        pieces = zip(unpack(tensor), starts, heights(size), strict=True)
        return vstack([part.rows(start, start + height) for part, start, height in pieces])

    def parts(shard: Tensor, size: int) -> list[Tensor]:
        wanted = heights(size)
        if not shard.shape or shard.shape[0] != sum(wanted):
            raise ValueError(f"a shard is {list(shard.shape)}, not {sum(wanted)} rows")
        ends = [sum(wanted[: number + 1]) for number in range(len(wanted))]
        return [shard.rows(end - height, end) for end, height in zip(ends, wanted, strict=True)]

    def sharing(block: Block, size: int) -> int:
        """Ranks that hold the same head."""
        return max(size // block.heads, 1)

    def join(shards: Sequence[Tensor]) -> Tensor:
        by_part = zip(*(parts(shard, len(shards)) for shard in shards), strict=True)
        return pack([vstack(part[:: sharing(block, len(shards))]) for block, part in zip(blocks, by_part, strict=True)])

    def copies(shards: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        by_part = list(zip(*(parts(shard, len(shards)) for shard in shards), strict=True))
        steps = [sharing(block, len(shards)) for block in blocks]
        return [
            (part[rank - rank % step], part[rank])
            for rank in range(len(shards))
            for part, step in zip(by_part, steps, strict=True)
            if rank % step
        ]

    equal = len({block.heads * block.rows for block in blocks}) == 1
    return Split("by part", cut, join, blocks=len(blocks) if equal else 0, copies=copies)
