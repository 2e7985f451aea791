"""How a tensor splits over tensor parallel ranks, and how the shards join again.

A rule is data: tables name it, conversion applies it. Source: the partition rules of Megatron-Core's
`ColumnParallelLinear`, `RowParallelLinear` and `VocabParallelEmbedding`, and its gated MLP, whose fused gate/up
weight is split half by half. The tensors of an expert split by the same rules over the expert tensor parallel ranks,
and live on one expert parallel rank, which holds a contiguous block of experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ckptkit.errors import UsageError
from ckptkit.tensors import Tensor, hstack, vstack


@dataclass(frozen=True, eq=False)
class Split:
    """A way to split a tensor over `size` ranks.

    Attributes:
        name: For reports.
        cut: (tensor, rank, size) -> the shard of that rank.
        join: The shards of all ranks -> the tensor.
        replicated: Whether every rank holds the same bytes; then the copies must be equal.
        padded: Whether the first axis is the vocabulary, padded before it is cut.
        expert: Whether the ranks are the expert tensor parallel ones, on one expert parallel rank.
        axis: The axis that the ranks divide (-1: the last), or None if they do not.
        blocks: Equal parts along that axis which are divided each for itself: 2 for gate and up, 0 for unequal parts.
        copies: The shards of all ranks -> pairs of pieces of them that hold the same elements.
        by_part: Whether the layout has the rule, because it knows the parts which are divided each for itself.
    """

    name: str
    cut: Callable[[Tensor, int, int], Tensor]
    join: Callable[[Sequence[Tensor]], Tensor]
    replicated: bool = False
    padded: bool = False
    expert: bool = False
    axis: int | None = 0
    blocks: int = 1
    copies: Callable[[Sequence[Tensor]], Sequence[tuple[Tensor, Tensor]]] = lambda shards: ()
    by_part: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """The shard that `rank` of `size` ranks has of every tensor which a rule splits."""

    split: Split
    rank: int
    size: int

    def __call__(self, tensor: Tensor) -> Tensor:
        """The shard of `tensor`."""
        return self.split.cut(tensor, self.rank, self.size)


def _share(length: int, size: int, axis: str) -> int:
    if length % size:
        raise UsageError(
            f"{axis} of {length} do not divide over {size} tensor parallel ranks",
            hint="choose another --tp, or --etp if the tensor is an expert's",
        )
    return length // size


def _cut_rows(tensor: Tensor, rank: int, size: int) -> Tensor:
    share = _share(tensor.shape[0], size, "rows")
    return tensor.rows(rank * share, (rank + 1) * share)


def _cut_columns(tensor: Tensor, rank: int, size: int) -> Tensor:
    share = _share(tensor.shape[-1], size, "columns")
    return tensor.cols(rank * share, (rank + 1) * share)


def halves(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Upper and lower half of the rows: gate and up of a fused weight or bias."""
    middle = _share(tensor.shape[0], 2, "fused rows")
    return tensor.rows(0, middle), tensor.rows(middle, 2 * middle)


def _cut_gated(tensor: Tensor, rank: int, size: int) -> Tensor:
    return vstack([_cut_rows(half, rank, size) for half in halves(tensor)])


def _join_gated(shards: Sequence[Tensor]) -> Tensor:
    gates, ups = zip(*(halves(shard) for shard in shards), strict=True)
    return vstack([*gates, *ups])


def _unresolved(*given: object) -> Tensor:
    raise AssertionError("the rule of a row that is cut by part comes from its layout")


COLUMN = Split("column", _cut_rows, vstack)
ROW = Split("row", _cut_columns, hstack, axis=-1)
GATED_COLUMN = Split("gated column", _cut_gated, _join_gated, blocks=2)
REPLICATED = Split(
    "replicated", lambda tensor, rank, size: tensor, lambda shards: shards[0], replicated=True, axis=None
)
BY_PART = Split("by part", _unresolved, _unresolved, blocks=0, by_part=True)
"""Every part is cut for itself; which parts there are the layout of the row knows (`Item.split`)."""
VOCAB = Split("vocabulary", _cut_rows, vstack, padded=True)
EXPERT_GATED_COLUMN = replace(GATED_COLUMN, name="expert gated column", expert=True)
EXPERT_ROW = replace(ROW, name="expert row", expert=True)


def expert_home(expert: int, num_experts: int, ep: int) -> tuple[int, int]:
    """Expert parallel rank of a global expert, and its number there.

    Raises:
        UsageError: The experts do not divide over `ep` ranks.
    """
    if num_experts % ep:
        sizes = [size for size in range(1, num_experts + 1) if num_experts % size == 0]
        raise UsageError(
            f"{num_experts} experts do not divide over --ep {ep}", hint=f"--ep {', '.join(map(str, sizes[:6]))} would"
        )
    return divmod(expert, num_experts // ep)


def padded_vocab_size(vocab_size: int, divisible_by: int, tp: int) -> int:
    """Rows of Megatron's embedding: the next multiple of `divisible_by * tp`."""
    multiple = divisible_by * tp
    return -(-vocab_size // multiple) * multiple


def pad_rows(tensor: Tensor, rows: int) -> Tensor:
    """`tensor` with zero rows below it, `rows` in all."""
    missing = rows - tensor.shape[0]
    if missing == 0:
        return tensor
    padding = Tensor.full(tensor.dtype, (missing, *tensor.shape[1:]))
    return vstack([tensor, padding if tensor.cast is None else padding.astype(tensor.cast)])
