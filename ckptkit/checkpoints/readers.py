"""Reads each format into the canonical view: a function per format, and the table of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.description import Given, checked_args, describe, located
from ckptkit.checkpoints.fused_rows import as_table
from ckptkit.checkpoints.huggingface import open_hf_files
from ckptkit.checkpoints.hybrid_model import as_gpt, holds_hybrid
from ckptkit.checkpoints.joining import Shards, join_shards
from ckptkit.checkpoints.locating import Place
from ckptkit.checkpoints.lora.megatron import ADAPTER, choose_part, is_adapter_name, read_megatron
from ckptkit.checkpoints.lora.module_state import choose_part_of_state, keys_of_part, read_state_of_adapter
from ckptkit.checkpoints.lora.peft_directory import read_peft
from ckptkit.checkpoints.parts import join_parts
from ckptkit.checkpoints.recognition import fused_in, refuse_foreign, refuse_trainers_parts
from ckptkit.checkpoints.run_config import args_of_run_config
from ckptkit.checkpoints.second_weights import check_second_weights
from ckptkit.checkpoints.sidecar_contents import notes_of_originals, with_originals
from ckptkit.checkpoints.vocabulary import stored_vocabulary
from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.families import family_of
from ckptkit.formats.grouped_experts import ungrouped_experts
from ckptkit.formats.hf import HfFiles, open_hf, read_shards
from ckptkit.formats.packed import is_packed, open_packed
from ckptkit.formats.quantised.archive import dequantised
from ckptkit.formats.sidecar import EXTRAS, FOLDER
from ckptkit.formats.torch_dist import TorchDistFiles, open_torch_dist, ungrouped, without_group
from ckptkit.formats.torch_legacy import (
    OptimizerState,
    RankFile,
    RankKey,
    TorchFiles,
    open_torch_legacy,
    rank_folder,
)
from ckptkit.formats.trainer_states.dcp import open_dcp_state
from ckptkit.formats.trainer_states.fsdp import open_fsdp
from ckptkit.formats.trainer_states.module_state import ModuleState
from ckptkit.formats.wrapper_names import Wrapping, find_wrapping, fit_of_megatron
from ckptkit.megatron_args.fields import GRID_ARGS
from ckptkit.megatron_args.reading import grid_of
from ckptkit.megatron_args.unread import refuse_unread_layouts
from ckptkit.sharding.grid import Parallelism, StatedGrid
from ckptkit.sharding.pipeline_layout import layers_on, stages_of
from ckptkit.tables.bounds import check_counts
from ckptkit.tables.megatron_names import norms_from_local_spec
from ckptkit.tables.prediction import count_in_megatron, of_0_16
from ckptkit.tensors import Tensor

_ROTARY = re.compile(r"(?:.*\.)?rotary(?:_pos)?_emb\.inv_freq$")

Reader = Callable[[Place, Given], Checkpoint]
"""Opens the checkpoint at a place, with the facts that the user states about it."""


def _read_shards(place: Place, given: Given) -> Checkpoint:
    """A Hugging Face directory or a packed one, by the names of the tensors."""
    shards = read_shards(place.folder)
    wrapping = find_wrapping(shards.tensors, fit_of_megatron)
    if is_packed(map(wrapping.name, shards.tensors)):
        files = open_packed(place.folder, shards)
        place, tensors = Place(place.folder, place.folder), wrapping.removed(files.tensors, files.path)
        checkpoint = _whole(place, "packed", tensors, checked_args(files.args, files.path), given)
        return checkpoint.noting(*_told(wrapping))
    if given.reference is not None:
        raise UsageError("a Hugging Face directory takes no reference", where=place.folder, hint="drop --hf-reference")
    notes = check_second_weights(place.folder, shards)
    return open_hf_files(dequantised(open_hf(place.folder, shards), given.dtype)).noting(*notes)


def _read_torch(place: Place, given: Given) -> Checkpoint:
    files = open_torch_legacy(place.folder, place.root, pp=given.grid.pp, ep=given.grid.ep)
    files = replace(files, args=checked_args(files.args, files.path))
    grid = _grid_of_ranks(files, given.grid)
    checkpoint = join_ranks(place, files.ranks, grid, files.args, given)
    if checkpoint.lora is not None:
        return checkpoint
    if not files.args:
        note = f"there are no args: the folders and --src sizes give the grid {grid}"
        checkpoint = checkpoint.noting(note)
    return _without_optimizer(checkpoint, files.optimizer)


def join_ranks(
    place: Place, ranks: Mapping[RankKey, RankFile], grid: Parallelism, args: dict[str, Any], given: Given
) -> Checkpoint:
    """The model, or the adapter, whose shards ranks hold.

    Raises:
        InputError: Tensors are missing, unknown or mis-shaped.
    """
    found, wrapping = _unwrapped(ranks, place.folder)
    chosen, is_adapter = choose_part(found, given, place.folder)
    if is_adapter:
        return read_megatron(place, "torch", chosen, grid, args, given).noting(*_told(wrapping))
    with located(place.folder):
        chosen = ungrouped_experts(chosen)
    return _join(place, "torch", chosen, grid, args, given).noting(*_told(wrapping))


def _unwrapped(ranks: Mapping[RankKey, RankFile], path: Path) -> tuple[dict[RankKey, RankFile], Wrapping]:
    """The ranks' tensors under the names that the model gives them: what stands before them is the same on all."""
    names = dict.fromkeys(name for chunks in ranks.values() for chunk in chunks.values() for name in chunk)
    wrapping = find_wrapping(names, fit_of_megatron)
    found = {
        rank: {chunk: wrapping.removed(tensors, path) for chunk, tensors in chunks.items()}
        for rank, chunks in ranks.items()
    }
    return found, wrapping


def _told(wrapping: Wrapping) -> list[str]:
    return [wrapping.note] if wrapping else []


def _without_frequencies(ranks: Mapping[RankKey, RankFile]) -> tuple[Mapping[RankKey, RankFile], list[str]]:
    """The ranks without the frequencies of rotary embeddings, which old writers kept and nothing loads; and a note."""
    found = {name for chunks in ranks.values() for chunk in chunks.values() for name in chunk if _ROTARY.match(name)}
    if not found:
        return ranks, []
    kept = {
        rank: {
            chunk: {name: tensor for name, tensor in tensors.items() if name not in found}
            for chunk, tensors in chunks.items()
        }
        for rank, chunks in ranks.items()
    }
    return kept, [f"{min(found)} and its like follow from the config, and are left out"]


def _of_0_16(ranks: Mapping[RankKey, RankFile]) -> Mapping[RankKey, RankFile]:
    """The ranks with the names that distributed checkpoints have, where Megatron-Core 0.19 gave others."""
    if not any(of_0_16(name) != name for chunks in ranks.values() for chunk in chunks.values() for name in chunk):
        return ranks
    return {
        rank: {chunk: {of_0_16(name): tensor for name, tensor in tensors.items()} for chunk, tensors in chunks.items()}
        for rank, chunks in ranks.items()
    }


def _grid_of_ranks(files: TorchFiles, given: StatedGrid) -> Parallelism:
    """The grid that the ranks' folders make, which `args` and the user must agree with.

    Raises:
        InputError: A rank is missing, or `args` give another grid.
        UsageError: The user gives another grid.
    """
    stated = _stated_grid(files, given)
    pp, tp, ep = (1 + max(numbers) for numbers in zip(*files.ranks, strict=True))
    sizes = {"tp": max(tp, stated.tp), "pp": max(pp, stated.pp), "ep": max(ep, stated.ep), "vpp": files.chunks}
    layout = stated.pipeline_layout  # which the folders must have as many stages as
    grid = replace(stated, **sizes, pipeline_layout=None)
    in_args = {name for name in ("tp", "pp", "ep") if GRID_ARGS[name] in files.args}
    in_options = {name for name in given.sizes() if name in sizes}
    if layout is not None:
        (in_options if given.pipeline_layout is not None else in_args).update({"pp", "vpp"})
    for names, who in ((in_args, "args"), (in_options, "--src")):
        if any(getattr(grid, name) != getattr(stated, name) for name in names):
            kind = InputError if who == "args" else UsageError
            raise kind(f"{who} say {stated}, the folders make {grid}", where=files.path)
    grid = replace(grid, pipeline_layout=layout)
    for rank in grid.ranks():
        if (rank.pp, rank.tp, rank.ep) not in files.ranks:
            name = rank_folder((rank.pp, rank.tp, rank.ep), grid.pp, grid.ep)
            raise InputError(f"{name} is missing (the others make {grid})", where=files.path)
    return grid


def _stated_grid(files: TorchFiles, given: StatedGrid) -> Parallelism:
    """The grid from `args`, completed by --src-* where an entry is missing.

    Raises:
        UsageError: Both give a size, and they differ.
    """
    with located(files.path):
        stated = grid_of(files.args)
    recorded = {name for name, arg in GRID_ARGS.items() if files.args.get(arg) is not None}
    if stated.pipeline_layout is not None:
        recorded |= {"vpp", "first_stage_layers", "last_stage_layers"}
    for name, size in given.sizes().items():
        stored = _stored_size(stated, name)
        if name in recorded and stored != size:
            option = f"--src-{name.replace('_', '-')}"
            raise UsageError(f"{option} {size}, but args say {stored}", where=files.path, hint=f"drop {option}")
    sizes: dict[str, Any] = {name: size for name, size in given.sizes().items() if name not in recorded}
    return replace(stated, **sizes)


def _stored_size(grid: Parallelism, name: str) -> int | str | None:
    """What a grid says of one of its sizes, with those that follow from others."""
    layout, rank = grid.pipeline_layout, {"first_stage_layers": 0, "last_stage_layers": grid.pp - 1}.get(name)
    if layout is not None and rank is not None:
        return sum(len(layers) for layers in layers_on(stages_of(layout))[rank :: grid.pp])
    size: int | str | None = grid.expert_tp if name == "etp" else getattr(grid, name)
    return size


def _read_torch_dist(place: Place, given: Given) -> Checkpoint:
    """Distributed checkpoints hold whole tensors: they are joined like one rank's, and the grid comes from `args`."""
    wanted = {ADAPTER: is_adapter_name}.get(given.part or "", lambda key: True)
    files = open_torch_dist(place.folder, place.root, wanted)
    stored, notes = _dist_args(files, given)
    args = checked_args(stored, files.path)
    wrapping = find_wrapping(files.tensors, fit_of_megatron)
    tensors = join_parts(wrapping.removed(files.tensors, files.path), files.path)
    chosen, is_adapter = choose_part({(0, 0, 0): {"model": tensors}}, given, files.path)
    tensors = chosen[0, 0, 0]["model"]
    if is_adapter:
        written = grid_of(args)
        adapter = read_megatron(
            place, "torch_dist", chosen, Parallelism(), args, given, stacked=files.stacked, stored=written
        )
        return adapter.noting(*notes, *_told(wrapping))
    norms = norms_from_local_spec(tensors)
    tensors = {norms.get(name, name): tensor for name, tensor in tensors.items()}
    checkpoint = _whole(place, "torch_dist", tensors, args, given, stacked=files.stacked)
    checkpoint = checkpoint.noting(*notes, *_told(wrapping))
    try:
        checkpoint = replace(checkpoint, grid=grid_of(args))
    except (InputError, UnsupportedError) as error:
        checkpoint = checkpoint.noting(f"{error.what}; the tensors are still whole")
    return _without_optimizer(checkpoint, files.optimizer)


def _dist_args(files: TorchDistFiles, given: Given) -> tuple[dict[str, Any], list[str]]:
    """`args`, or what run_config.yaml says in their place, and notes; a reference outranks what is not supported."""
    if files.args:
        return files.args, []
    try:
        return args_of_run_config(files.path), []
    except UnsupportedError as error:
        if given.reference is None:
            raise
        args = args_of_run_config(files.path, layout_alone=True)
        return args, [f"the reference outranks run_config.yaml: {error.what}"]


def _read_dcp(place: Place, given: Given) -> Checkpoint:
    return _read_state(open_dcp_state(place.folder, keys_of_part(given.part)), place, given)


def _read_fsdp(place: Place, given: Given) -> Checkpoint:
    return _read_state(open_fsdp(place.folder, keys_of_part(given.part)), place, given)


def _read_state(state: ModuleState, place: Place, given: Given) -> Checkpoint:
    """The state of a bare module: whole tensors under Hugging Face's names, those of a packed model, or an adapter."""
    reference = given.reference
    if reference is None:
        raise UsageError(
            "the state of a bare module does not say which model it is",
            where=state.path,
            hint="give --hf-reference with the model's config.json",
        )
    state, is_adapter = choose_part_of_state(state, given.part)
    if is_adapter:
        checkpoint, wrapping = read_state_of_adapter(state, place, reference, given)
    else:
        checkpoint, wrapping = _read_state_of_model(state, reference, given)
    replicas = checkpoint.coverage.get("replicas", 0) + len(state.comparisons)
    checkpoint = replace(
        checkpoint.noting(*state.notes, *_told(wrapping)),
        comparisons=(*checkpoint.comparisons, *state.comparisons),
        coverage={**checkpoint.coverage, "replicas": replicas},
    )
    return _without_optimizer(checkpoint, state.optimizer)


def _read_state_of_model(state: ModuleState, reference: HfFiles, given: Given) -> tuple[Checkpoint, Wrapping]:
    refuse_trainers_parts(state.tensors, state.path)
    tensors, wrapping = state.named(lambda names: max(_known(names, reference, state), fit_of_megatron(names)))
    if is_packed(tensors):
        place = Place(state.path, state.path)  # a sidecar would be beside the weights, wherever the reference is
        checkpoint = _whole(place, state.format, tensors, {}, given)
    else:
        files = replace(reference, path=state.path, tensors=tensors, ignored=[])
        checkpoint = replace(open_hf_files(files), format=state.format)
    return checkpoint.noting(*_dtype_notes(checkpoint)), wrapping


def _known(names: set[str], reference: HfFiles, state: ModuleState) -> int:
    """How many of these names a model has, however its experts are stored."""
    family = family_of(reference.config, reference.path / "config.json")
    config = family.parse(reference.config)
    check_counts(config, state.tensors.values(), state.path)
    canonical = [name for item in family.items(config) for name in item.hf]
    return max(len(names & spelling.names(canonical, config)) for spelling in family.hf_spellings)


def _dtype_notes(checkpoint: Checkpoint) -> list[str]:
    """That the weights of a module have another type than its reference says."""
    stated, dtype = checkpoint.config.dtype, checkpoint.main_dtype
    if stated in (None, dtype):
        return []
    return [f"the weights are {dtype}, config.json says {stated} (--dtype {stated} converts them)"]


def _without_optimizer(checkpoint: Checkpoint, optimizer: OptimizerState) -> Checkpoint:
    """The checkpoint, which notes how much of the optimizer's state is beside it."""
    checkpoint = replace(checkpoint, optimizer=optimizer)
    if not optimizer:
        return checkpoint
    count = f"{optimizer.tensors:,} tensor{'s' * (optimizer.tensors != 1)}, " if optimizer.tensors else ""
    return checkpoint.noting(f"the optimizer's state ({count}{optimizer.nbytes:,} bytes) is left out")


def _whole(
    place: Place,
    format: str,
    tensors: dict[str, Tensor],
    args: dict[str, Any],
    given: Given,
    *,
    stacked: bool = False,
) -> Checkpoint:
    """A Megatron checkpoint of whole tensors: a grid of one rank, whose one stage numbers layers as the model does."""
    return _join(place, format, {(0, 0, 0): {"model": tensors}}, Parallelism(), args, given, stacked=stacked)


def _join(
    place: Place,
    format: str,
    ranks: Mapping[RankKey, RankFile],
    grid: Parallelism,
    args: dict[str, Any],
    given: Given,
    *,
    stacked: bool = False,
) -> Checkpoint:
    """A Megatron checkpoint from the files of its ranks; `stacked` says whether its layers were."""
    path, stored_grid, hybrid = place.folder, grid, holds_hybrid(ranks)
    if hybrid:
        ranks, args = as_gpt(ranks, args, path)
        grid = Parallelism(tp=grid.tp, ep=grid.ep, etp=grid.etp)
    ranks, rotary = _without_frequencies(ranks)
    ranks = _of_0_16(ranks)
    names = {without_group(name) for chunks in ranks.values() for chunk in chunks.values() for name in chunk}
    refuse_foreign(names, path)
    fused = fused_in(names)
    with located(path):
        predicts = count_in_megatron(names) > 0
        told = {name: value for name, value in args.items() if name != "mtp_num_layers" or not predicts}
        refuse_unread_layouts(told, sharded=format == "torch")
    vocabulary = stored_vocabulary(ranks, args)
    about = describe(place.root, args, names if fused is None else fused.usual(names), given, vocabulary)
    family, config = about.family, about.config
    table = family if fused is None else fused.table(family)
    stored = [tensor for chunks in ranks.values() for chunk in chunks.values() for tensor in chunk.values()]
    check_counts(config, stored, path)
    if groups := family.attention_groups(config):
        ranks = {
            rank: {chunk: ungrouped(tensors, groups, stacked, path) for chunk, tensors in chunks.items()}
            for rank, chunks in ranks.items()
        }
    items = {item.key: item for item in table.items(config)}
    spelling = table.spelling_of(names, config)
    size, most = config.vocab_size, vocabulary.padded(config.vocab_size)
    most_rows = None if given.vocab_size == size else most
    joined = join_shards(Shards(path, table, config, items, spelling, grid, ranks, most_rows, most))
    tensors = with_originals(items, joined.tensors, about.sidecar.originals)
    notes = [*about.notes, *joined.notes, *rotary, *notes_of_originals(items, tensors)]
    if fused is not None:
        items, tensors = as_table(family, config, items, tensors)
        notes.append(f"its ranks fuse layers ({fused.args} of Megatron-Core 0.19), which are taken apart")
    if both := sorted(joined.towers.keys() & about.sidecar.extras.keys()):
        what = f"{len(both)} tensors are in the checkpoint and in {FOLDER}/{EXTRAS}: the checkpoint's count"
        notes.append(f"{what} ({both[0]})")
    if vocabulary.rows > most:
        notes.append(f"{vocabulary.rows - size} rows beyond --vocab-size {size} are left out")
    if hybrid:
        notes.append("its tensors are those of Megatron-Core's HybridModel")
    return Checkpoint(
        path=path,
        format=format,
        family=family,
        config=config,
        sidecar=replace(about.sidecar, extras={**about.sidecar.extras, **joined.towers}),
        items=items,
        tensors=tensors,
        spelling=spelling,
        grid=stored_grid,
        padded_vocab_size=joined.padded_vocab_size,
        padding=joined.padding,
        args=args,
        comparisons=joined.comparisons,
        coverage=joined.coverage,
        notes=tuple(notes),
        disagreements=tuple(about.disagreements),
    )


READERS: Mapping[str, Reader] = {
    "hf": _read_shards,
    "peft": read_peft,
    "torch": _read_torch,
    "torch_dist": _read_torch_dist,
    "dcp": _read_dcp,
    "fsdp": _read_fsdp,
}
"""Name of a format in `formats/registry.py` -> its reader."""
