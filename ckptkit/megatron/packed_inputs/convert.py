"""`convert_to_packed`: a transformers model in, the same model for packed inputs out."""

from __future__ import annotations

import atexit
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.huggingface import open_hf_files
from ckptkit.dtypes import DTYPES_BY_TORCH_NAME
from ckptkit.errors import InputError, UsageError
from ckptkit.formats.hf import HfFiles
from ckptkit.sharding.grid import Parallelism
from ckptkit.sharding.stages import split_layers

if TYPE_CHECKING:
    import torch

    from ckptkit.megatron.in_memory import Memory
    from ckptkit.megatron.packed_inputs.model import PackedModel

PLACE = "the model in memory"


def convert_to_packed(hf_model: Any) -> PackedModel:
    """The packed-input model of a transformers model: megatron-core's modules, loaded with its weights.

    The weights are copied; `hf_model` stays as it is. The process needs no process group: if there is none, one of this
    process alone is made. In a group of several, each process gets a whole model, to be sharded by FSDP2 or
    replicated. Of a multimodal model it is the text part that runs; its other tensors come back with
    `PackedModel.to_hf_state_dict`.

    Args:
        hf_model: A model of transformers of a supported architecture, on the CPU or on a CUDA device.

    Returns:
        The model on the same device, in the same dtype.

    Raises:
        UsageError: It has no weights yet or lies on several devices, or megatron-core's groups are there for a grid.
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
    _join_groups(device)
    grid = Parallelism()
    checkpoint = replace(checkpoint, spelling=checkpoint.family.spelling("local", text=True))
    (stage,), (rank,) = split_layers(checkpoint.config.num_layers, grid), grid.ranks()
    recipes = checkpoint.chunk(stage, rank, grid, checkpoint.spelling, divisible_by=1)
    (chunk,) = build_chunks(
        checkpoint.config,
        grid,
        checkpoint.config.vocab_size,
        dtype=getattr(torch, checkpoint.main_dtype),
        device=device,
    )
    load_strict(chunk, recipes, where=PLACE, read=memory.read)
    extras = {name: memory.read(recipe) for name, recipe in checkpoint.sidecar.extras.items()}
    return PackedModel(chunk, checkpoint, extras, list(state))


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


def _join_groups(device: torch.device) -> None:
    """megatron-core's groups for a whole model on every process, as far as they are not there."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from ckptkit.megatron import parallel

    if parallel_state.model_parallel_is_initialized():
        sizes = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_expert_model_parallel_world_size(),
            parallel_state.get_context_parallel_world_size(),
        )
        if sizes != (1, 1, 1, 1):
            raise UsageError(
                "megatron-core's groups are there for TP{} x PP{} x EP{} x CP{}".format(*sizes),
                hint="convert where they are for one rank, or convert a checkpoint with `ckptkit convert`",
            )
    elif dist.is_initialized():
        parallel.create_groups(Parallelism(), device=device)
    else:
        parallel.initialize(Parallelism(), 0, store=dist.HashStore(), device=device)
        atexit.register(parallel.finalize)  # a group of NCCL must not meet the end of the process by itself
