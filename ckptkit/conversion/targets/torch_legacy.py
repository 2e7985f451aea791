"""Writes Megatron-LM's `mp_rank_*` files, one for each model parallel rank."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from ckptkit.checkpoints.lora.megatron import grouped_factors
from ckptkit.conversion.target import Target, WritableFormat
from ckptkit.errors import UsageError
from ckptkit.formats.torch_legacy import RankKey, Shards, lay_out_torch_legacy
from ckptkit.io.plan import OutputFile
from ckptkit.tables.megatron_names import rank_states


def _lay_out(target: Target) -> list[OutputFile]:
    source, grid, spelling = target.source, target.grid, target.spelling
    ranks: dict[RankKey, dict[str, Shards]] = {(rank.pp, rank.tp, rank.ep): {} for rank in grid.ranks()}
    if len(ranks) < grid.world_size:
        raise UsageError(
            f"{grid}: the torch format names files by TP, PP and EP rank, which would collide",
            hint="--etp at most --tp",
        )
    quirks = source.family.quirks
    states_of = lru_cache(lambda names: tuple([state for name in names for state in rank_states(name, quirks)]))
    stateful = spelling.extra_states and not quirks.local_only(source.config)
    for stage, rank, shards in source.shards(target.stages, grid, spelling, target.divisible_by):
        key = "model" if grid.vpp == 1 else f"model{stage.vp_stage}"
        if target.adapter is not None and source.config.num_experts:
            shards = Shards.of(grouped_factors(shards.tensors()))
        states = states_of(shards.names) if stateful else ()
        ranks[rank.pp, rank.tp, rank.ep][key] = replace(shards, states=states)
    return [*lay_out_torch_legacy(ranks, target.args, target.dtype), *target.sidecar]


FORMAT = WritableFormat(
    "torch",
    _lay_out,
    takes=frozenset(
        {"grid", "spec", "experts", "make_vocab_size_divisible_by", "megatron_model", "megatron_core", "adapter_layout"}
    ),
)
