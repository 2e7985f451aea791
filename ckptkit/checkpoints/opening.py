"""Opening a checkpoint of any format: recognise it, describe its model, and bring its tensors under canonical names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.description import Given, checked_args, complete, describe, located
from ckptkit.checkpoints.huggingface import open_hf_files
from ckptkit.checkpoints.hybrid_model import as_gpt, holds_hybrid
from ckptkit.checkpoints.joining import join_shards
from ckptkit.checkpoints.locating import Place, find_place, is_hf_like
from ckptkit.checkpoints.recognition import refuse_foreign
from ckptkit.checkpoints.run_config import args_of_run_config
from ckptkit.checkpoints.vocabulary import stored_vocabulary
from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.families import family_of
from ckptkit.formats.dcp.reading import is_dcp
from ckptkit.formats.grouped_experts import ungrouped_experts
from ckptkit.formats.hf import HfFiles, open_hf, open_reference, read_shards
from ckptkit.formats.packed import PackedFiles, is_packed, open_packed
from ckptkit.formats.torch_dist import TorchDistFiles, is_torch_dist, open_torch_dist, ungrouped, without_group
from ckptkit.formats.torch_legacy import (
    OptimizerState,
    RankFile,
    RankKey,
    TorchFiles,
    is_torch_legacy,
    open_torch_legacy,
    rank_folder,
)
from ckptkit.formats.trainer_states.dcp import open_dcp_state
from ckptkit.formats.trainer_states.fsdp import is_fsdp, open_fsdp
from ckptkit.formats.trainer_states.module_state import ModuleState
from ckptkit.io.source import Seen
from ckptkit.megatron_args.fields import GRID_ARGS
from ckptkit.megatron_args.reading import grid_of
from ckptkit.sharding.grid import Parallelism, StatedGrid


def open_checkpoint(
    path: str | Path,
    *,
    hf_reference: str | Path | None = None,
    iteration: int | None = None,
    stored_grid: StatedGrid | None = None,
    vocab_size: int | None = None,
) -> Checkpoint:
    """Opens a checkpoint of any format; only headers are read.

    Args:
        path: A Hugging Face directory, a packed directory, a Megatron checkpoint (its root or one iteration), verl's
            `actor` folder, or a directory of torch.distributed.checkpoint with a Hugging Face model.
        hf_reference: A Hugging Face directory that supplies config.json, tokenizer and shard map; it outranks the
            sidecar. It need not hold weights.
        iteration: Number of the iteration, if `path` is the root of several.
        stored_grid: The grid of `mp_rank_*` files whose `args` do not say it.
        vocab_size: The true size of the vocabulary, where nothing else tells it from its padding.

    Raises:
        InputError: It is damaged, incomplete, or holds tensors that the family does not have.
        UnsupportedError: No family or format of ours.
        UsageError: What is said of it contradicts what it says itself, or has no meaning for it.
    """
    place = find_place(Path(path), iteration)
    reference = place.reference if hf_reference is None else Path(hf_reference)
    around = [place.root / "ckptkit", *([] if reference is None else [reference])]
    seen = Seen.of(place.folder, *(folder for folder in around if folder.is_dir()))
    files = None if reference is None else complete(open_reference(reference))[0]
    given = Given(files, stored_grid or StatedGrid(), vocab_size)
    checkpoint = _open(place, given)
    if files is not None:
        _take_extras(checkpoint, files)
    checkpoint.seen = seen
    if hf_reference is None and place.reference is not None:
        there = place.reference.relative_to(place.root).name or "the folder itself"
        checkpoint.notes.append(f"config and tokenizer are those of {there}")
    if checkpoint.format != "torch" and given.grid.sizes():
        raise UsageError(f"the --src sizes are about mp_rank files, and this is {checkpoint.format}", where=path)
    if vocab_size not in (None, checkpoint.config.vocab_size):
        told = f"--vocab-size {vocab_size}, but the checkpoint says {checkpoint.config.vocab_size}"
        raise UsageError(told, where=path, hint="drop --vocab-size")
    return checkpoint


def _take_extras(checkpoint: Checkpoint, reference: HfFiles) -> None:
    """Adds the reference's tensors that have no place in Megatron, unless the checkpoint has them itself."""
    held, family = checkpoint.sidecar.extras, checkpoint.family
    taken = {
        name: tensor
        for name, tensor in sorted(reference.tensors.items())
        if name not in held and family.is_extra(name, checkpoint.config)
    }
    if taken:
        checkpoint.sidecar = replace(checkpoint.sidecar, extras={**held, **taken})
        checkpoint.coverage["of the reference"] = len(taken)
        some = ", ".join(list(taken)[:3])
        checkpoint.notes.append(f"{len(taken)} of the tensors come from the reference, not the checkpoint: {some}")


def _open(place: Place, given: Given) -> Checkpoint:
    folder = place.folder
    if is_hf_like(folder):
        shards = read_shards(folder)
        if is_packed(shards.tensors):
            return _open_packed(open_packed(folder, shards), given)
        if given.reference is not None:
            raise UsageError("a Hugging Face directory takes no reference", where=folder, hint="drop --hf-reference")
        return open_hf_files(open_hf(folder, shards))
    if is_torch_legacy(folder):
        return _open_torch(open_torch_legacy(folder, place.root, pp=given.grid.pp, ep=given.grid.ep), given)
    if is_torch_dist(folder):
        return _open_torch_dist(open_torch_dist(folder, place.root), given)
    if is_dcp(folder):
        return _open_state(open_dcp_state(folder), given)
    if is_fsdp(folder):
        return _open_state(open_fsdp(folder), given)
    raise InputError(
        "not a checkpoint that ckptkit knows",
        where=folder,
        hint="expected config.json and safetensors, a packed directory, mp_rank_* folders, a torch_dist folder, or"
        " shards of FSDP",
    )


def _open_packed(files: PackedFiles, given: Given) -> Checkpoint:
    """A packed model is a grid of one rank: its one stage numbers layers as the whole model does."""
    ranks = {(0, 0, 0): {"model": files.tensors}}
    return _join(files.path, files.path, "packed", ranks, Parallelism(), checked_args(files.args, files.path), given)


def _open_torch(files: TorchFiles, given: Given) -> Checkpoint:
    files = replace(files, args=checked_args(files.args, files.path))
    told = _stated(files, given.grid)
    pp, tp, ep = (1 + max(numbers) for numbers in zip(*files.ranks, strict=True))
    grid = replace(told, tp=max(tp, told.tp), pp=max(pp, told.pp), ep=max(ep, told.ep), vpp=files.chunks)
    for names, who in (
        ({name for name in ("tp", "pp", "ep") if GRID_ARGS[name] in files.args}, "args"),
        (given.grid.sizes(), "--src"),
    ):
        if any(getattr(grid, name) != getattr(told, name) for name in names):
            kind = InputError if who == "args" else UsageError
            raise kind(f"{who} say {told}, the folders make {grid}", where=files.path)
    for rank in grid.ranks():
        if (rank.pp, rank.tp, rank.ep) not in files.ranks:
            name = rank_folder((rank.pp, rank.tp, rank.ep), grid.pp, grid.ep)
            raise InputError(f"{name} is missing (the others make {grid})", where=files.path)
    with located(files.path):
        ranks = ungrouped_experts(files.ranks)
    checkpoint = _join(files.path, files.root, "torch", ranks, grid, files.args, given)
    if not files.args:
        checkpoint.notes.append(f"there are no args: that the grid is {grid} is read off the folders and --src sizes")
    _leave_out(checkpoint, files.optimizer)
    return checkpoint


def _stated(files: TorchFiles, given: StatedGrid) -> Parallelism:
    """The grid that `args` tell, with what somebody says where they are silent.

    Raises:
        UsageError: Both speak, and differ.
    """
    with located(files.path):
        told = grid_of(files.args)
    for name, size in given.sizes().items():
        said = told.expert_tp if name == "etp" else getattr(told, name)
        if files.args.get(GRID_ARGS[name]) is not None and said != size:
            option = f"--src-{name.replace('_', '-')}"
            raise UsageError(f"{option} {size}, but args say {said}", where=files.path, hint=f"drop {option}")
    sizes: dict[str, Any] = {**given.sizes()}
    return replace(told, **sizes)


def _open_torch_dist(files: TorchDistFiles, given: Given) -> Checkpoint:
    """Distributed checkpoints hold whole tensors: they are joined as one rank's, and the grid is what `args` say."""
    ranks = {(0, 0, 0): {"model": files.tensors}}
    stored, notes = _dist_args(files, given)
    args = checked_args(stored, files.path)
    checkpoint = _join(files.path, files.root, "torch_dist", ranks, Parallelism(), args, given, stacked=files.stacked)
    checkpoint.notes += notes
    try:
        checkpoint.grid = grid_of(args)
    except UnsupportedError as error:
        checkpoint.notes.append(f"{error.what}; the tensors are whole all the same")
    _leave_out(checkpoint, files.optimizer)
    return checkpoint


def _dist_args(files: TorchDistFiles, given: Given) -> tuple[dict[str, Any], list[str]]:
    """`args`, or what run_config.yaml says in their place, and notes; a reference outranks what is not supported."""
    if files.args:
        return files.args, []
    try:
        return args_of_run_config(files.path), []
    except UnsupportedError as error:
        if given.reference is None:
            raise
        return {}, [f"the reference outranks run_config.yaml: {error.what}"]


def _open_state(state: ModuleState, given: Given) -> Checkpoint:
    """The state of a bare module: whole tensors under Hugging Face's names, or those of a packed model."""
    reference = given.reference
    if reference is None:
        raise UsageError(
            "the state of a bare module does not say which model it is",
            where=state.path,
            hint="give --hf-reference with the model's config.json",
        )
    if adapters := sorted(key for key in state.tensors if ".lora_" in key):
        hint = "merge them into the weights with peft (merge_and_unload) before they are saved"
        raise UnsupportedError(f"LoRA adapters beside the weights ({adapters[0]})", where=state.path, hint=hint)
    tensors = state.named(lambda names: max(_known(names, reference), sum(is_packed((name,)) for name in names)))
    if is_packed(tensors):
        ranks = {(0, 0, 0): {"model": tensors}}
        checkpoint = _join(state.path, state.path, state.format, ranks, Parallelism(), {}, given)
    else:
        checkpoint = open_hf_files(replace(reference, path=state.path, tensors=tensors, ignored=[]))
        checkpoint.format = state.format
    checkpoint.comparisons += state.comparisons
    checkpoint.coverage["replicas"] = checkpoint.coverage.get("replicas", 0) + len(state.comparisons)
    checkpoint.notes += [*state.notes, *_state_notes(checkpoint)]
    _leave_out(checkpoint, state.optimizer)
    return checkpoint


def _known(names: set[str], reference: HfFiles) -> int:
    """How many of these names a model has, however its experts are stored."""
    family = family_of(reference.config, reference.path / "config.json")
    config = family.parse(reference.config)
    canonical = [name for item in family.items(config) for name in item.parts]
    return max(len(names & spelling.names(canonical, config)) for spelling in family.hf_spellings)


def _state_notes(checkpoint: Checkpoint) -> list[str]:
    """Where a module's state is not all that its reference says of the model."""
    notes = []
    if checkpoint.config.dtype not in (None, dtype := checkpoint.main_dtype):
        told = checkpoint.config.dtype
        notes.append(f"the weights are {dtype}, config.json says {told} (--dtype {told} converts them)")
    return notes


def _leave_out(checkpoint: Checkpoint, optimizer: OptimizerState) -> None:
    checkpoint.optimizer = optimizer
    if optimizer:
        count = f"{optimizer.tensors:,} tensor{'s' * (optimizer.tensors != 1)}, " if optimizer.tensors else ""
        size = f"{count}{optimizer.nbytes:,} bytes"
        checkpoint.notes.append(f"the optimizer's state ({size}) is left out")


def _join(
    path: Path,
    root: Path,
    format: str,
    ranks: Mapping[RankKey, RankFile],
    grid: Parallelism,
    args: dict[str, Any],
    given: Given,
    *,
    stacked: bool = False,
) -> Checkpoint:
    """A Megatron checkpoint from the files of its ranks; `stacked` says whether its layers were."""
    stored_grid, hybrid = grid, holds_hybrid(ranks)
    if hybrid:
        ranks, args = as_gpt(ranks, args, path)
        grid = Parallelism(tp=grid.tp, ep=grid.ep, etp=grid.etp)
    names = {without_group(name) for chunks in ranks.values() for chunk in chunks.values() for name in chunk}
    refuse_foreign(names, path)
    vocabulary = stored_vocabulary(ranks, args)
    about = describe(root, args, names, given, vocabulary)
    if about.family.attention_of is not None:
        groups = [about.family.attention_of(layer) for layer in about.config.layers]
        ranks = {
            rank: {chunk: ungrouped(tensors, groups, stacked, path) for chunk, tensors in chunks.items()}
            for rank, chunks in ranks.items()
        }
    checkpoint = Checkpoint(
        path=path,
        format=format,
        family=about.family,
        config=about.config,
        sidecar=about.sidecar,
        items={item.key: item for item in about.family.items(about.config)},
        tensors={},
        spelling=about.family.spelling_of(names, about.config),
        grid=grid,
        args=args,
        notes=about.notes,
        disagreements=about.disagreements,
    )
    size, most = about.config.vocab_size, vocabulary.padded(about.config.vocab_size)
    join_shards(checkpoint, ranks, None if given.vocab_size == size else most)
    if vocabulary.rows > most:
        checkpoint.notes.append(f"{vocabulary.rows - size} rows beyond --vocab-size {size} are left out")
    checkpoint.grid = stored_grid
    if hybrid:
        checkpoint.notes.append("its tensors are those of Megatron-Core's HybridModel")
    return checkpoint
