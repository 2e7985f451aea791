"""`load_hf`: a checkpoint of any format into a running model. Each rank reads its own bytes, strictly."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.element_types import check_element_types
from ckptkit.checkpoints.sources import open_source
from ckptkit.dtypes import DTYPES_BY_TORCH_NAME
from ckptkit.errors import InputError, UnsupportedError
from ckptkit.io.castable import check_cast
from ckptkit.io.plan import Plan
from ckptkit.io.reading import compare
from ckptkit.io.shares import shares
from ckptkit.io.stores.mirror import shown
from ckptkit.io.threads import Readers, read_all
from ckptkit.megatron.live.known import remember
from ckptkit.megatron.live.standing import Standing
from ckptkit.megatron.live.together import together
from ckptkit.megatron.model import check_fit
from ckptkit.tables.spelling import Spelling
from ckptkit.tensors import Tensor

_VOCABULARY = ("word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True)
class LoadedModel:
    """What `load_hf` read.

    Attributes:
        source: The checkpoint.
        format: Its format.
        tensors: Tensors of this rank that were filled.
        bytes_read: Their bytes.
        notes: Sentences about the checkpoint, and about what of it has no place in the model.
        seconds: Time of the call.
    """

    source: str
    format: str
    tensors: int
    bytes_read: int
    notes: list[str]
    seconds: float


@dataclass(frozen=True)
class _Fill:
    """A tensor of the model, and the recipe for its bytes."""

    name: str
    target: torch.Tensor
    recipe: Tensor


def load_hf(
    model: Any,
    src: str | Path,
    *,
    hf_reference: str | Path | None = None,
    iteration: int | None = None,
    threads: int | None = None,
) -> LoadedModel:
    """Fills a running Megatron model with the weights of a checkpoint; all ranks call this.

    Every rank reads the headers, and of the weights its own bytes alone, straight into the memory of its parameters, on
    the CPU or on CUDA. Weights of another type are cast to that of the parameter. Names and shapes must be those of the
    model, on every rank, before anything is read. An optimizer with copies of the weights must be told
    (`optimizer.reload_model_params()`).

    Args:
        model: A GPTModel of megatron-core or the list of its chunks, in whatever Megatron wraps them.
        src: A checkpoint of any format that `convert` reads, or `org/model@revision` on the hub.
        hf_reference: Hugging Face directory that describes a Megatron checkpoint without a sidecar.
        iteration: Number of the iteration, if `src` is the root of several.
        threads: Threads that read.

    Raises:
        UsageError: There is no running model.
        InputError: The checkpoint is damaged, or is not of this model.
        UnsupportedError: No family of ours, or a cast that does not exist.
        StorageError: The checkpoint cannot be read.
    """
    started = time.monotonic()
    standing = together(lambda: Standing.of(model))
    with ExitStack() as stack:
        checkpoint = together(lambda: open_source(stack, src, hf_reference, headers_only=False, iteration=iteration))
        spelling = _spelling(checkpoint, standing)
        fills = together(lambda: _fills(checkpoint, standing, spelling))
        together(lambda: _compare(checkpoint))
        together(lambda: _read(fills, threads))
        together(lambda: checkpoint.seen.check(checkpoint.seen.files))
    if checkpoint.format == "hf" or hf_reference is not None:
        remember(standing.chunks, Path(hf_reference or shown(str(checkpoint.path))))
    return LoadedModel(
        source=str(src),
        format=checkpoint.format,
        tensors=len(fills),
        bytes_read=sum(fill.recipe.nbytes for fill in fills),
        notes=_notes(checkpoint),
        seconds=time.monotonic() - started,
    )


def _notes(checkpoint: Checkpoint) -> list[str]:
    extras = sorted(checkpoint.sidecar.extras)
    if not extras:
        return list(checkpoint.notes)
    return [*checkpoint.notes, f"{len(extras)} tensors have no place in the model and are not loaded ({extras[0]})"]


def _spelling(checkpoint: Checkpoint, standing: Standing) -> Spelling:
    """How the model's names are spelled, from those of all ranks: the names of one may fit several spellings."""
    mine = {name for chunk in standing.tensors() for name in chunk}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine if standing.replica == 0 else set())
    return checkpoint.family.spelling_of(set().union(*everyone), checkpoint.config)


def _fills(checkpoint: Checkpoint, standing: Standing, spelling: Spelling) -> list[_Fill]:
    """The tensors of this rank and what goes into them.

    Raises:
        InputError: Names or shapes differ, or the checkpoint contradicts itself.
        UnsupportedError: A cast that does not exist.
    """
    if checkpoint.lora is not None:
        raise InputError("an adapter, not a model", where=checkpoint.path)
    if checkpoint.disagreements:
        raise InputError(
            f"the checkpoint contradicts itself: {'; '.join(checkpoint.disagreements)}",
            where=checkpoint.path,
            hint="pass hf_reference with the right config.json, which outranks the stored one",
        )
    check_element_types(checkpoint)
    if checkpoint.config.num_layers != standing.chunks[0].config.num_layers:
        raise InputError(
            f"{checkpoint.config.num_layers} layers, the model has {standing.chunks[0].config.num_layers}",
            where=checkpoint.path,
        )
    found = []
    for stage, expected in zip(standing.stages, standing.tensors(), strict=True):
        recipes = checkpoint.chunk(stage, standing.rank, standing.grid, spelling, _rows(expected))
        check_fit(expected, recipes, where=checkpoint.path)
        found += [_fill(name, expected[name], recipe) for name, recipe in recipes.items()]
    return found


def _rows(expected: Mapping[str, torch.Tensor]) -> int:
    """Rows of the vocabulary on this rank; with as many on each rank the padding is that of the model."""
    rows = (tensor.shape[0] for name, tensor in expected.items() if name.endswith(_VOCABULARY))
    return max(next(rows, 1), 1)


def _fill(name: str, target: torch.Tensor, recipe: Tensor) -> _Fill:
    dtype = DTYPES_BY_TORCH_NAME.get(str(target.dtype).removeprefix("torch."))
    if dtype is None:
        raise UnsupportedError(f"{name} has elements of type {target.dtype}")
    if recipe.out_dtype != dtype:
        recipe = recipe.astype(dtype)
        check_cast(recipe.dtype, dtype)
    return _Fill(name, target, recipe)


def _compare(checkpoint: Checkpoint) -> None:
    """This rank's part of the comparisons of copies that must be equal."""
    plan = Plan((), checkpoint.comparisons)
    for comparison in shares(plan, [], dist.get_world_size())[dist.get_rank()].comparisons:
        compare(comparison)


def _read(fills: list[_Fill], threads: int | None) -> None:
    def read(readers: Readers, fill: _Fill) -> bool:
        target = fill.target.detach()
        whole = target if target.is_contiguous() else torch.empty_like(target, memory_format=torch.contiguous_format)
        flat, done = whole.reshape(-1).view(torch.uint8), 0
        for chunk in readers.first.chunks(fill.recipe):
            flat[done : done + len(chunk)].copy_(torch.from_numpy(chunk))
            done += len(chunk)
        if whole is not target:
            target.copy_(whole)
        return True

    with torch.no_grad():
        read_all(fills, read, lambda fill: fill.recipe.nbytes, threads=threads)
