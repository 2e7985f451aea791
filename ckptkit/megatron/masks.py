"""Which keys a block of queries sees."""

from __future__ import annotations

from typing import NamedTuple

import torch

QUERY_BLOCK = 1024
"""Query rows whose scores exist at a time; bounds memory at heads x QUERY_BLOCK x length elements."""


class Block(NamedTuple):
    """Neighbouring queries, and the keys that any of them sees.

    Attributes:
        queries: Where they are among the queries.
        keys: Where these are among the keys.
        hidden: Whether a query does not see a key, bool [queries, keys].
    """

    queries: slice
    keys: slice
    hidden: torch.Tensor


def causal_block(at: int, tokens: range, first: int, window: int | None, device: torch.device) -> Block:
    """The block of some neighbouring tokens.

    Args:
        at: Where the first of them is among the queries.
        tokens: Where they are among the keys.
        first: Where their sequence begins among the keys.
        window: Visible tokens including the current one, or None for all before it.
        device: Where the mask belongs; nothing is read from there.
    """
    seen = first if window is None else max(first, tokens.start - window + 1)
    rows, columns = (torch.arange(begin, tokens.stop, device=device) for begin in (tokens.start, seen))
    distance = rows[:, None] - columns
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return Block(slice(at, at + len(tokens)), slice(seen, tokens.stop), hidden)
