"""The run over packed rows: all lengths in one row, as models are trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

from ckptkit.verification.tokens import group_by_length

if TYPE_CHECKING:
    import torch

    from ckptkit.megatron.packed_inputs.batch import PackedBatch

Experts = Mapping[int, "torch.Tensor"]


class Forward(Protocol):
    """Runs a packed batch."""

    def __call__(self, batch: PackedBatch, *, replay: Experts | None) -> torch.Tensor | None:
        """Logits [total_nnz, vocabulary], or None where others hold them."""


def run_packed(
    rows: list[list[int]], forward: Forward, replay: Mapping[int, Experts], tokens_per_pass: int
) -> dict[int, torch.Tensor]:
    """Run rows of all lengths packed together, in their order.

    Args:
        rows: Token ids.
        forward: Runs a packed batch with experts to replay by layer, or None.
        replay: Length of a row -> layer -> experts of the rows of that length, [rows, length, experts per token];
            empty for the routers' own choice.
        tokens_per_pass: Upper bound of the tokens in a batch, unless one row is longer.

    Returns:
        Length -> logits [rows of that length, length, vocabulary], as `runs.run_by_length` gives them.
    """
    import torch

    from ckptkit.megatron.packed_inputs.batch import PackedBatch

    groups = group_by_length(rows)
    place = {number: at for numbers in groups.values() for at, number in enumerate(numbers)}
    found: dict[int, torch.Tensor] = {}
    for numbers in _batches(rows, tokens_per_pass):
        batch = PackedBatch.of_rows([rows[number] for number in numbers])
        experts = _experts([(len(rows[number]), place[number]) for number in numbers], replay)
        logits = forward(batch, replay=experts)
        if logits is not None:
            found.update(zip(numbers, logits.split(batch.lengths), strict=True))
    return {length: torch.stack([found[number] for number in numbers]) for length, numbers in groups.items() if found}


def _batches(rows: list[list[int]], limit: int) -> Iterator[list[int]]:
    batch: list[int] = []
    filled = 0
    for number, row in enumerate(rows):
        if batch and filled + len(row) > limit:
            yield batch
            batch, filled = [], 0
        batch.append(number)
        filled += len(row)
    if batch:
        yield batch


def _experts(places: list[tuple[int, int]], replay: Mapping[int, Experts]) -> dict[int, torch.Tensor] | None:
    """Experts of the rows at (length, place among the rows of that length), packed: layer -> [1, tokens, ...]."""
    import torch

    if not replay:
        return None
    layers = replay[places[0][0]]
    return {layer: torch.cat([replay[length][layer][at] for length, at in places])[None] for layer in layers}
