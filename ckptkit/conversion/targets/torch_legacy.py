"""Writes Megatron-LM's `mp_rank_*` files, one for each model parallel rank."""

from __future__ import annotations

from collections.abc import Mapping

from ckptkit.conversion.target import Target, WritableFormat
from ckptkit.errors import UsageError
from ckptkit.formats.torch_legacy import RankKey, lay_out_torch_legacy
from ckptkit.io.plan import OutputFile
from ckptkit.tensors import Tensor


def _lay_out(target: Target) -> list[OutputFile]:
    source, grid, spelling = target.source, target.grid, target.spelling
    ranks: dict[RankKey, dict[str, Mapping[str, Tensor | None]]] = {
        (rank.pp, rank.tp, rank.ep): {} for rank in grid.ranks()
    }
    if len(ranks) < grid.world_size:
        raise UsageError(
            f"{grid}: the torch format names files by TP, PP and EP rank, which would collide",
            hint="--etp at most --tp",
        )
    stateful = spelling.extra_states and not source.family.quirks.local_only(source.config)
    for stage in target.stages:
        key = "model" if grid.vpp == 1 else f"model{stage.vp_stage}"
        for rank in (rank for rank in grid.ranks() if rank.pp == stage.pp_rank):
            chunk = source.chunk(stage, rank, grid, spelling, target.divisible_by)
            held = _with_extra_states(chunk, source.family.quirks.plain) if stateful else chunk
            ranks[rank.pp, rank.tp, rank.ep][key] = held
    return [*lay_out_torch_legacy(ranks, target.args, source.main_dtype), *target.sidecar]


_TE_MODULES = (".linear_qkv", ".linear_proj", ".linear_fc1", ".linear_fc2", "_layernorm", ".final_norm")


def _with_extra_states(chunk: Mapping[str, Tensor], plain: tuple[str, ...]) -> dict[str, Tensor | None]:
    """Adds the empty `_extra_state` of every Transformer Engine module, which its strict loading asks for.

    Args:
        chunk: The tensors of a model chunk.
        plain: Endings of modules that are not Transformer Engine's.
    """
    states: dict[str, Tensor | None] = {}
    for name in chunk:
        module = name.rsplit(".", 1)[0]
        if module.endswith(_TE_MODULES) and not module.endswith(plain):
            states[f"{module}._extra_state"] = None
        if module.endswith(".self_attention.linear_qkv"):
            states[f"{module.removesuffix('linear_qkv')}core_attention._extra_state"] = None
    return {**chunk, **states}


FORMAT = WritableFormat(
    "torch",
    _lay_out,
    takes=frozenset({"grid", "spec", "experts", "make_vocab_size_divisible_by", "megatron_model"}),
)
