"""`convert_to_packed`: a transformers model in, the same model for packed inputs out."""

from __future__ import annotations

import atexit
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptkit.checkpoints.checkpoint import EMBEDDING, Checkpoint, check_grid
from ckptkit.checkpoints.huggingface import open_hf_files
from ckptkit.checkpoints.sidecar_contents import originals_of
from ckptkit.dtypes import DTYPES_BY_TORCH_NAME
from ckptkit.errors import InputError, UsageError
from ckptkit.formats.hf import HfFiles
from ckptkit.sharding.grid import Parallelism
from ckptkit.sharding.stages import split_layers

if TYPE_CHECKING:
    import torch

    from ckptkit.megatron.in_memory import Memory
    from ckptkit.megatron.packed_inputs.model import PackedModel
    from ckptkit.megatron.replicas import Seat

PLACE = "the model in memory"


def convert_to_packed(
    hf_model: Any, grid: Parallelism | None = None, *, sequence_parallel: bool = False
) -> PackedModel:
    """The packed-input model of a transformers model: megatron-core's modules, loaded with its weights.

    The weights are copied; `hf_model` stays as it is. The process needs no process group: if there is none, one of this
    process alone is made. In a group of several, each process gets a whole model, to be sharded by FSDP2 or
    replicated; or, with a grid, its part of one: then all ranks call the model with the same inputs, but those of other
    replicas. Of a multimodal model it is the text part that runs; its other tensors come back with
    `PackedModel.to_hf_state_dict`.

    Args:
        hf_model: A model of transformers of a supported architecture, on the CPU or on a CUDA device, the same on
            every rank.
        grid: Tensor and expert parallel sizes; None for whole models. More ranks than it has are replicas.
        sequence_parallel: Split the sequence over tensor parallel ranks outside of the linears.

    Returns:
        The model on the same device, in the same dtype.

    Raises:
        UsageError: It has no weights yet or lies on several devices; megatron-core's groups are there for another grid;
            there is no process group for the grid, or its ranks do not divide; or the grid has pipeline stages.
        InputError: Its tensors are not those that its config describes, or their dtypes differ.
        UnsupportedError: No family, or no module of the runtime, for this architecture.
    """
    import torch

    from ckptkit.megatron.compat import import_megatron

    import_megatron()
    from ckptkit.megatron.in_memory import Memory
    from ckptkit.megatron.model import build_chunks, load_strict
    from ckptkit.megatron.packed_inputs.model import PackedModel

    if not isinstance(hf_model, torch.nn.Module) or not hasattr(hf_model, "config"):
        raise UsageError(f"convert_to_packed takes a model of transformers, not a {type(hf_model).__name__}")
    state = hf_model.state_dict()
    device, memory = _device(state), Memory()
    checkpoint = _open(hf_model, memory.add(state, PLACE)).without_prediction()
    _check(checkpoint, memory)
    grid = grid or Parallelism()
    _check_grid(checkpoint, grid, sequence_parallel)
    here = _join_groups(device, grid)
    checkpoint = replace(checkpoint, spelling=checkpoint.family.spelling("local", text=True))
    (stage,) = split_layers(checkpoint.config.num_layers, grid)
    recipes = checkpoint.chunk(stage, here.place, grid, checkpoint.spelling, divisible_by=1)
    (chunk,) = build_chunks(
        checkpoint.config,
        grid,
        recipes[checkpoint.spelling.written(EMBEDDING)].shape[0] * grid.tp,
        dtype=getattr(torch, checkpoint.main_dtype),
        device=device,
        sequence_parallel=sequence_parallel,
    )
    load_strict(chunk, recipes, where=PLACE, read=memory.read)
    extras = {name: memory.read(recipe) for name, recipe in checkpoint.sidecar.extras.items()}
    originals = originals_of(checkpoint.items, checkpoint.tensors)
    kept = {name: memory.read(recipe) for name, recipe in originals.items()}
    return PackedModel(chunk, checkpoint, extras, list(state), grid, here, kept)


def _check_grid(checkpoint: Checkpoint, grid: Parallelism, sequence_parallel: bool) -> None:
    """Whether a module can run on a grid.

    Raises:
        UsageError: It cannot.
    """
    if grid.pp > 1:
        raise UsageError(
            f"a module runs forwards in one piece, and {grid} has pipeline stages",
            hint="ckptkit.load_megatron runs them by megatron-core's schedules",
        )
    if sequence_parallel and grid.tp == 1:
        raise UsageError("sequence_parallel needs a grid of TP2 or more")
    if checkpoint.config.num_experts and grid.tp > 1 and not sequence_parallel:
        raise UsageError(
            "megatron-core trains experts on several tensor parallel ranks under sequence parallelism only",
            hint="pass sequence_parallel=True",
        )
    check_grid(checkpoint.config, grid)


def _device(state: dict[str, torch.Tensor]) -> torch.device:
    devices = {value.device for value in state.values()}
    if len(devices) != 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        found = ", ".join(sorted(map(str, devices))) or "no device: it has no tensors"
        raise UsageError(f"the model is on {found}", hint="load it onto the CPU, or onto one CUDA device")
    return next(iter(devices))


def _open(hf_model: Any, tensors: dict[str, Any]) -> Checkpoint:
    """The model as if its directory were opened: its config.json is the one that it would be saved with."""
    raw = json.loads(hf_model.config.to_json_string())
    raw["architectures"] = [type(hf_model).__name__]
    return open_hf_files(HfFiles(Path(PLACE), raw, tensors, {}, {}))


def _check(checkpoint: Checkpoint, memory: Memory) -> None:
    """Whether the model is one of its family's, in one dtype: the runtime has one, and a cast could not be undone."""
    import torch

    for comparison in checkpoint.comparisons:
        if not torch.equal(memory.read(comparison.left), memory.read(comparison.right)):
            raise InputError(f"not true of the model: {comparison.what}", where=PLACE)
    dtype = DTYPES_BY_TORCH_NAME[checkpoint.main_dtype]
    other = [f"{key} is {found.dtype}" for key, found in checkpoint.tensors.items() if found.dtype != dtype]
    if other:
        raise InputError(
            f"most of the model is {dtype}, but {', '.join(other[:3])}", where=PLACE, hint="cast it, e.g. with .float()"
        )


def _join_groups(device: torch.device, grid: Parallelism) -> Seat:
    """megatron-core's groups for the grid, as far as they are not there; and where this process sits."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from ckptkit.megatron import parallel
    from ckptkit.megatron.replicas import seat

    world = dist.get_world_size() if dist.is_initialized() else 1
    if world % grid.world_size:
        raise UsageError(
            f"{grid} needs a process group of a multiple of {grid.world_size} ranks, here are {world}",
            hint="start the program with torchrun, and call torch.distributed.init_process_group first",
        )
    if parallel_state.model_parallel_is_initialized():
        sizes = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_expert_model_parallel_world_size(),
            parallel_state.get_context_parallel_world_size(),
        )
        if sizes != (grid.tp, 1, grid.ep, 1):
            raise UsageError(
                "megatron-core's groups are there for TP{} x PP{} x EP{} x CP{}".format(*sizes) + f", not for {grid}",
                hint="convert where they are for this grid, or convert a checkpoint with `ckptkit convert`",
            )
    elif dist.is_initialized():
        parallel.create_groups(grid, device=device)
    else:
        parallel.initialize(Parallelism(), 0, store=dist.HashStore(), device=device)
        atexit.register(parallel.finalize)  # a group of NCCL must not meet the end of the process by itself
    return seat(grid, world // grid.world_size, dist.get_rank())
