"""Opening a checkpoint of any format: find it, recognise it, and hand it to its reader."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.description import Given, complete
from ckptkit.checkpoints.locating import Place, find_place
from ckptkit.checkpoints.lora.megatron import ADAPTER, MODEL
from ckptkit.checkpoints.readers import READERS
from ckptkit.dtypes import DType
from ckptkit.errors import InputError, UsageError
from ckptkit.formats.foreign import refuse_foreign_files
from ckptkit.formats.garbage import collection_paused
from ckptkit.formats.hf import HfFiles, open_reference
from ckptkit.formats.quantised.archive import dequantised
from ckptkit.formats.registry import format_of, is_huggingface
from ckptkit.formats.sidecar import FOLDER
from ckptkit.formats.torch_legacy import TRACKER
from ckptkit.io.source import Seen
from ckptkit.sharding.grid import StatedGrid


@collection_paused()
def open_checkpoint(
    path: str | Path,
    *,
    hf_reference: str | Path | None = None,
    iteration: int | None = None,
    stored_grid: StatedGrid | None = None,
    vocab_size: int | None = None,
    lora_alpha: float | None = None,
    part: str | None = None,
    base: Checkpoint | None = None,
    dtype: DType | None = None,
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
        lora_alpha: Alpha of a Megatron adapter; it outranks what files say.
        base: The model that an adapter is for; it says what `hf_reference` would say, unless there is a sidecar.
        part: `adapter` or `model`, the wanted part of a Megatron checkpoint that may hold both.
        dtype: The type that quantised weights are read as; None for BF16. Other weights keep theirs.

    Raises:
        InputError: It is damaged, incomplete, or holds tensors that the family does not have.
        UnsupportedError: No family or format of ours.
        UsageError: The options contradict the checkpoint, or do not apply to it.
    """
    place = find_place(Path(path), iteration, referenced=hf_reference is not None)
    reference = place.reference if hf_reference is None else Path(hf_reference)
    if part == ADAPTER and is_huggingface(place.folder):
        raise UsageError(
            "no adapter in it", where=path, hint="an adapter is a PEFT directory, or in a Megatron checkpoint"
        )
    around = [place.root / "ckptkit", *([] if reference is None else [reference])]
    seen = Seen.of(place.folder, *(folder for folder in around if folder.is_dir()))
    files = None if reference is None else complete(dequantised(open_reference(reference), dtype))[0]
    if base is not None and files is None and not (place.root / FOLDER).is_dir():
        files = HfFiles(base.path, base.sidecar.config, {}, {}, dict(base.sidecar.small))
    if files is not None and hf_reference is None and reference is not None and reference == place.root:
        files = _of_root(files)
    given = Given(files, stored_grid or StatedGrid(), vocab_size, lora_alpha, part, dtype)
    checkpoint = replace(_open(place, given), seen=seen).noting(*place.notes)
    if files is not None and checkpoint.lora is None:
        checkpoint = with_extras(checkpoint, files)
    if hf_reference is None and place.reference is not None:
        there = place.reference.relative_to(place.root).name or "the folder itself"
        checkpoint = checkpoint.noting(f"config and tokenizer are those of {there}")
    if checkpoint.lora is None and (lora_alpha is not None or part == ADAPTER):
        raise UsageError("no adapter in it", where=path, hint="drop --lora-alpha" if lora_alpha is not None else None)
    if checkpoint.lora is not None and part == MODEL:
        raise UsageError("an adapter, and no model", where=path, hint="give the model that it is for")
    if checkpoint.format != "torch" and given.grid.sizes():
        raise UsageError(f"--src-* applies only to mp_rank checkpoints; this is {checkpoint.format}", where=path)
    if vocab_size not in (None, checkpoint.config.vocab_size):
        what = f"--vocab-size {vocab_size}, but the checkpoint says {checkpoint.config.vocab_size}"
        raise UsageError(what, where=path, hint="drop --vocab-size")
    return checkpoint


def _open(place: Place, given: Given) -> Checkpoint:
    format = format_of(place.folder)
    if format is None:
        refuse_foreign_files(place.folder)
        raise InputError(
            "not a checkpoint that ckptkit knows",
            where=place.folder,
            hint="expected config.json and safetensors, a packed directory, mp_rank_* folders, a torch_dist folder, or"
            f" shards of FSDP{_found_below(place.folder)}",
        )
    return READERS[format.name](place, given)


def _found_below(folder: Path) -> str:
    """What could be meant instead, as the end of a hint."""
    above = folder.resolve().parent
    if format_of(above) is not None:
        return f"; give the folder above it: {above}"
    below = [item for item in sorted(folder.iterdir()) if item.is_dir() and format_of(item) is not None]
    return f"; give one of the folders in it: {', '.join(item.name for item in below[-4:])}" if below else ""


def _of_root(files: HfFiles) -> HfFiles:
    """The small files of a root, without the tracker file and what is in its folders."""
    small = {name: file for name, file in files.small.items() if "/" not in name and name != TRACKER}
    return replace(files, small=small, ignored=[])


def with_extras(checkpoint: Checkpoint, reference: HfFiles) -> Checkpoint:
    """Adds the reference's tensors that have no place in Megatron, unless the checkpoint has them itself."""
    held, family = checkpoint.sidecar.extras, checkpoint.family
    taken = {
        name: tensor
        for name, tensor in sorted(reference.tensors.items())
        if name not in held and family.is_extra(name, checkpoint.config)
    }
    if not taken:
        return checkpoint
    some = ", ".join(list(taken)[:3])
    return replace(
        checkpoint.noting(f"{len(taken)} of the tensors come from the reference, not the checkpoint: {some}"),
        sidecar=replace(checkpoint.sidecar, extras={**held, **taken}),
        coverage={**checkpoint.coverage, "of the reference": len(taken)},
    )
