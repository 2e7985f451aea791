"""Writes the packed format: the whole model as one Megatron rank would hold it, in safetensors files."""

from __future__ import annotations

from ckptkit.conversion.options import DEFAULT_SHARD_SIZE
from ckptkit.conversion.target import Target, WritableFormat
from ckptkit.formats.packed import lay_out_packed
from ckptkit.io.plan import OutputFile


def _lay_out(target: Target) -> list[OutputFile]:
    (stage,), (rank,) = target.stages, target.grid.ranks()
    tensors = target.source.chunk(stage, rank, target.grid, target.spelling, target.divisible_by)
    files = lay_out_packed(tensors, target.args, target.options.shard_size or DEFAULT_SHARD_SIZE)
    return [*files, *target.sidecar]


FORMAT = WritableFormat(
    "packed",
    _lay_out,
    takes=frozenset({"spec", "experts", "make_vocab_size_divisible_by", "megatron_model", "shard_size"}),
    fits=lambda spelling: not spelling.blocks,
)
