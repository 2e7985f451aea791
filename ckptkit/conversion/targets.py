"""Lays a checkpoint out in each format that can be written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from ckptkit.checkpoints.checkpoint import EMBEDDING, Checkpoint, check_grid, is_on, vocabulary_multiple
from ckptkit.checkpoints.run_config import run_config
from ckptkit.conversion.options import DEFAULT_SHARD_SIZE, Options
from ckptkit.errors import UnsupportedError, UsageError
from ckptkit.formats.hf import BIN_INDEX, INDEX, lay_out_like, lay_out_shards
from ckptkit.formats.packed import lay_out_packed
from ckptkit.formats.torch_dist import FOLDER, GlobalTensor, StageRanks, lay_out_torch_dist
from ckptkit.formats.torch_legacy import RankKey, lay_out_torch_legacy
from ckptkit.io.plan import OutputFile
from ckptkit.megatron_args.writing import to_args
from ckptkit.sharding.grid import Parallelism
from ckptkit.sharding.rules import padded_vocab_size
from ckptkit.sharding.stages import split_layers, stage_of_layer
from ckptkit.tables.hybrid_names import GPT, HYBRID, hybrid_args
from ckptkit.tables.spelling import Spelling
from ckptkit.tensors import Tensor
from ckptkit.version import __version__

if TYPE_CHECKING:
    pass


def to_hf(source: Checkpoint, options: Options) -> list[OutputFile]:
    """Hugging Face: unpack every item; the shard map and header bytes of the origin where they still fit."""
    headers = source.sidecar.headers if options.shard_size is None else {}
    tensors = source.hf_tensors(source.stored_names)
    files = lay_out_like(tensors, headers)
    stale = set() if files is not None else {INDEX, BIN_INDEX}
    files = files or lay_out_shards(tensors, options.shard_size or DEFAULT_SHARD_SIZE)
    taken = {file.path for file in files} | stale | {"config.json"}
    code = {path.name: path for path in source.family.code if "auto_map" in source.sidecar.config}
    small = [
        OutputFile.copy(name, str(path), path.stat().st_size)
        for name, path in sorted({**code, **source.sidecar.small}.items())
        if name not in taken
    ]
    return [*files, *small, _config_file(source)]


def _config_file(source: Checkpoint) -> OutputFile:
    """config.json verbatim unless a field that the conversion owns (the dtype) has changed."""
    path = source.sidecar.small.get("config.json")
    if path is not None and json.loads(path.read_bytes()) == source.sidecar.config:
        return OutputFile.copy("config.json", str(path), path.stat().st_size)
    return OutputFile.small("config.json", json.dumps(source.sidecar.config, indent=2).encode() + b"\n")


def to_packed(source: Checkpoint, options: Options) -> list[OutputFile]:
    """Megatron names, one rank's worth: the only stage of a grid of one."""
    grid, divisible_by = Parallelism(), 1 if options.divisible_by is None else _multiple(source, options)
    spelling = spelling_of(source, options)
    (stage,), (rank,) = split_layers(source.config.num_layers, grid), grid.ranks()
    tensors = source.chunk(stage, rank, grid, spelling, divisible_by)
    args = _args(source, grid, spelling, divisible_by)
    files = lay_out_packed(tensors, args, options.shard_size or DEFAULT_SHARD_SIZE)
    return [*files, *_sidecar(source, "packed", spelling, grid, divisible_by)]


def to_torch(source: Checkpoint, options: Options) -> list[OutputFile]:
    """Megatron-LM: each rank's file from its stages' chunks."""
    grid, spelling = options.grid, spelling_of(source, options)
    check_grid(source.config, grid)
    divisible_by = _multiple(source, options)
    ranks: dict[RankKey, dict[str, Mapping[str, Tensor | None]]] = {
        (rank.pp, rank.tp, rank.ep): {} for rank in grid.ranks()
    }
    if len(ranks) < grid.world_size:
        raise UsageError(
            f"{grid}: the torch format names files by TP, PP and EP rank, which would collide",
            hint="--etp at most --tp",
        )
    for stage in split_layers(source.config.num_layers, grid):
        key = "model" if grid.vpp == 1 else f"model{stage.vp_stage}"
        for rank in (rank for rank in grid.ranks() if rank.pp == stage.pp_rank):
            chunk = source.chunk(stage, rank, grid, spelling, divisible_by)
            te = spelling.extra_states and not source.family.local_only(source.config)
            ranks[rank.pp, rank.tp, rank.ep][key] = _with_extra_states(chunk, source.family.plain) if te else chunk
    files = lay_out_torch_legacy(ranks, _args(source, grid, spelling, divisible_by), source.main_dtype)
    return [*files, *_sidecar(source, "torch", spelling, grid, divisible_by)]


def to_torch_dist(source: Checkpoint, options: Options) -> list[OutputFile]:
    """Megatron-Core's distributed checkpoint: whole tensors, in the chunks that the ranks of the grid would write."""
    grid, divisible_by = options.grid, _multiple(source, options)
    check_grid(source.config, grid)
    spelling = source.family.spelling("te", text=options.layout == "text")
    spelling = replace(spelling, hybrid=options.model == HYBRID)
    stages = split_layers(source.config.num_layers, grid)
    homes = stage_of_layer(stages)
    tensors = []
    for key, item in source.items.items():
        split = item.row.split
        on = homes[item.layer][0] if item.layer is not None else next(s for s in stages if is_on(item, s, grid))
        pp_rank = on.pp_rank
        whole = source.padded(key, grid.tp, divisible_by)
        tensors.append(GlobalTensor(spelling.written(key), whole, split.axis, split.blocks, pp_rank))
    args = _args(source, grid, spelling_of(source, options), divisible_by)
    ranks = StageRanks(grid.tp, grid.ep, grid.etp)
    family, layers = source.family, source.config.layers
    files = lay_out_torch_dist(
        tensors,
        args,
        dtype=source.main_dtype,
        ranks=ranks,
        spec="local" if family.local_only(source.config) else options.spec,
        groups=[family.attention_of(layer) for layer in layers] if family.attention_of is not None else [],
        plain=family.plain,
        stacked=False if spelling.hybrid else None,
    )
    return [*files, *bridge_config(source, options)[0], *_sidecar(source, "torch_dist", spelling, grid, divisible_by)]


def bridge_config(source: Checkpoint, options: Options) -> tuple[list[OutputFile], str | None]:
    """What Megatron-Bridge needs besides, or why it gets nothing."""
    if options.model == HYBRID:
        return [], "only GPTModel is described to it"
    spelling, divisible_by = spelling_of(source, options), _multiple(source, options)
    try:
        file = run_config(source, options.grid, divisible_by, spelling, FOLDER, text=options.layout == "text")
    except UnsupportedError as error:
        return [], error.what
    return [file], None


def spelling_of(source: Checkpoint, options: Options) -> Spelling:
    """The spelling that is written."""
    spelling = source.family.spelling(options.spec, options.experts, text=options.layout == "text")
    return replace(spelling, hybrid=options.model == HYBRID)


TARGETS: dict[str, Callable[[Checkpoint, Options], list[OutputFile]]] = {
    "hf": to_hf,
    "packed": to_packed,
    "torch": to_torch,
    "torch_dist": to_torch_dist,
}


SHARDED = ("torch", "torch_dist")


DISTRIBUTED_SPECS = ("te", "local")
"""Whose modules a torch_dist checkpoint can be for: its keys are the same, and only its extra states differ."""


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


def _multiple(source: Checkpoint, options: Options) -> int:
    """What the vocabulary is padded to a multiple of, times TP."""
    spelling = spelling_of(source, options)
    return vocabulary_multiple(source.config.vocab_size, options.grid.tp, spelling, options.divisible_by)


def _args(source: Checkpoint, grid: Parallelism, spelling: Spelling, divisible_by: int) -> dict[str, Any]:
    rows = padded_vocab_size(source.tensors[EMBEDDING].shape[0], divisible_by, grid.tp)
    config = replace(source.config, dtype=source.main_dtype)
    args = to_args(source.family, config, grid, rows, divisible_by, spelling.experts)
    if not spelling.hybrid:
        return args
    stages = sorted(split_layers(config.num_layers, grid), key=lambda stage: (stage.vp_stage, stage.pp_rank))
    return hybrid_args(args, [layer.moe for layer in config.layers], [stage.layers for stage in stages])


def _sidecar(
    source: Checkpoint, format: str, spelling: Spelling, grid: Parallelism, divisible_by: int
) -> list[OutputFile]:
    small = {name: path for name, path in source.sidecar.small.items() if name != "config.json"}
    manifest = {
        "tool": f"ckptkit {__version__}",
        "format": format,
        "family": source.family.name,
        "architecture": source.config.architecture,
        "spec": spelling.name,
        "experts": spelling.experts,
        "megatron_model": HYBRID if spelling.hybrid else GPT,
        "prefix": spelling.prefix,
        "grid": asdict(grid),
        "make_vocab_size_divisible_by": divisible_by,
    }
    files = replace(source.sidecar, small=small).lay_out(manifest)
    config = _config_file(source)
    return [*files, replace(config, path=f"ckptkit/hf/{config.path}")]
