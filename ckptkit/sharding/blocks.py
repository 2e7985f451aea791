"""Queries, keys and values in blocks: each rank's queries, then its keys, then its values.

Megatron-Core lays one query group after the other, so that any cut between rows is a cut between groups; here what lies
inside a shard depends on how many shards there are. Where ranks outnumber key/value heads, the ranks that share a head
each hold a copy of it.

Source: `load_state_dict_to_megatron_llama` and `merge_megatron_ckpt_llama` of verl.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ckptkit.errors import UsageError
from ckptkit.sharding.rules import Split
from ckptkit.tensors import Tensor, vstack

Pack = Callable[[Sequence[Tensor]], Tensor]
Unpack = Callable[[Tensor], Sequence[Tensor]]


def query_key_value_blocks(heads: int, kv_heads: int, head_dim: int, pack: Pack, unpack: Unpack) -> Split:
    """The rule for a fused tensor of queries, keys and values.

    Args:
        heads: Attention heads.
        kv_heads: Key/value heads.
        head_dim: Rows of a head.
        pack: Queries, keys and values -> the fused tensor as the tables know it.
        unpack: The inverse.
    """

    def blocks(size: int) -> tuple[int, int]:
        """Rows of a rank's queries, and of its keys (or values)."""
        if heads % size or (kv_heads % size and size % kv_heads):
            raise UsageError(f"{heads} attention and {kv_heads} key/value heads do not divide over {size} ranks")
        return heads // size * head_dim, max(kv_heads // size, 1) * head_dim

    def cut(tensor: Tensor, rank: int, size: int) -> Tensor:
        query, key, value = unpack(tensor)
        wide, narrow = blocks(size)
        start = rank * kv_heads // size * head_dim
        return vstack(
            [query.rows(rank * wide, (rank + 1) * wide), *(part.rows(start, start + narrow) for part in (key, value))]
        )

    def parts(shard: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
        wide, narrow = blocks(size)
        if not shard.shape or shard.shape[0] != wide + 2 * narrow:
            raise ValueError(f"a shard is {list(shard.shape)}, not {wide + 2 * narrow} rows")
        return shard.rows(0, wide), shard.rows(wide, wide + narrow), shard.rows(wide + narrow, wide + 2 * narrow)

    def sharing(size: int) -> int:
        """Ranks that hold the same key/value heads."""
        return max(size // kv_heads, 1)

    def join(shards: Sequence[Tensor]) -> Tensor:
        queries, keys, values = zip(*(parts(shard, len(shards)) for shard in shards), strict=True)
        step = sharing(len(shards))
        return pack([vstack(queries), vstack(keys[::step]), vstack(values[::step])])

    def copies(shards: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        _, keys, values = zip(*(parts(shard, len(shards)) for shard in shards), strict=True)
        step = sharing(len(shards))
        return [
            (part[rank - rank % step], part[rank])
            for rank in range(len(shards))
            if rank % step
            for part in (keys, values)
        ]

    return Split("query, key and value blocks", cut, join, copies=copies)
