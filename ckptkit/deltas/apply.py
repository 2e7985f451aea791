"""Applying a delta: a conversion of OLD in which changed tensors are made while their bytes pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.sources import facts_of, open_source
from ckptkit.conversion.execution import READ_BACK, ConversionResult, Execution, How, carry_out
from ckptkit.conversion.options import Options
from ckptkit.conversion.planning import make_plan
from ckptkit.dtypes import DTYPES_BY_TORCH_NAME
from ckptkit.errors import InputError
from ckptkit.formats.delta.manifest import CHANGED, UNCHANGED, Change, Manifest
from ckptkit.formats.delta.reading import Delta, open_delta, stored_in
from ckptkit.io.stores.address import refuse_address
from ckptkit.sharding.grid import Parallelism, StatedGrid
from ckptkit.tensors import Tensor

if TYPE_CHECKING:
    from ckptkit.io.threads import Readers

_WRONG_BASE = "apply it to the checkpoint that it was made from"


def apply_delta(
    old: str | Path,
    delta: str | Path,
    out: str | Path,
    *,
    to: str = "hf",
    grid: Parallelism = Parallelism(),  # noqa: B008  frozen
    spec: str = "te",
    shard_size: int | None = None,
    make_vocab_size_divisible_by: int | None = None,
    hf_reference: str | Path | None = None,
    iteration: int | None = None,
    stored_grid: StatedGrid | None = None,
    vocab_size: int | None = None,
    lora_alpha: float | None = None,
    **how: Unpack[How],
) -> ConversionResult:
    """Applies a delta to the checkpoint that it was made from, and writes the result in any format.

    Before anything is written, the tensors of OLD are hashed, and the delta's own bytes are checked. Before the result
    is committed, it is opened as a checkpoint and hashed. Config, tokenizer and other small files are those of OLD.

    Args:
        old: The checkpoint, in any format and on any grid, or `org/model@revision` on the hub.
        delta: The directory of the delta.
        out: The directory to create.
        to: As for `convert`, and so are the others.
        grid: The grid of a `torch` or `torch_dist` output.
        spec: Whose Megatron names to write.
        shard_size: Largest safetensors shard in bytes.
        make_vocab_size_divisible_by: As Megatron-LM's option.
        hf_reference: Hugging Face directory that describes OLD.
        iteration: Number of OLD's iteration.
        stored_grid: The grid of OLD, where its `args` do not record it.
        vocab_size: True size of OLD's vocabulary.
        lora_alpha: Alpha of OLD, a Megatron adapter that does not record it.
        how: How the plan is carried out (`dry_run`, `overwrite`, `resume`, `threads`, `hash`, `progress`): see
            `Execution`. A dry run hashes nothing.

    Raises:
        UsageError: The request cannot work.
        InputError: OLD is not the base of the delta, or one of them is damaged.
        UnsupportedError: OLD or the delta is sound, but cannot be read or written.
        StorageError: The destination cannot be written.
    """
    started = time.monotonic()
    execution = Execution(**how)
    refuse_address(out, READ_BACK)
    options = Options(
        grid=grid,
        spec=spec,
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
        shard_size=shard_size,
    )
    opened = open_delta(Path(delta))
    with ExitStack() as stack:
        base = open_source(
            stack,
            old,
            hf_reference,
            headers_only=execution.dry_run,
            iteration=iteration,
            stored_grid=stored_grid,
            vocab_size=vocab_size,
            lora_alpha=lora_alpha,
        )
        tensors = base.hf_tensors(())
        _check_headers(base, opened, tensors)
        result = _applied(base, opened, tensors).noting(*_notes(opened.manifest, execution.dry_run))
        plan = make_plan(result, to, options)
        if not execution.dry_run:
            _check_bytes(base, opened, tensors, execution)
        source = {**facts_of(base), "path": f"{old} + {delta}", "origin": base.sidecar.origin}
        target = {"path": str(out), "format": to, "grid": str(grid)}
        check = _result_check(opened.manifest, execution.threads)
        return carry_out(plan, [base], source, target, execution, started, also=[opened.path], check=check)


def _notes(manifest: Manifest, dry_run: bool) -> list[str]:
    notes = [f"the result's hash is {manifest.new}"]
    if dry_run:
        notes.append("a dry run reads no weights: neither OLD nor the delta was hashed")
    return notes


def _check_headers(base: Checkpoint, delta: Delta, tensors: Mapping[str, Tensor]) -> None:
    """Checks that OLD has the tensors that the delta was made from, by name, type and shape."""
    if base.config.architecture != delta.manifest.architecture:
        what = f"a {base.config.architecture}, and the delta is of a {delta.manifest.architecture}"
        raise InputError(what, where=base.path, hint=_WRONG_BASE)
    expected = {change.name: change.old for change in delta.manifest.changes if change.old is not None}
    if odd := sorted(expected.keys() ^ tensors.keys()):
        whose = "it has no" if odd[0] in expected else "the delta knows no"
        raise InputError(f"not the base of the delta: {whose} {odd[0]}", where=base.path, hint=_WRONG_BASE)
    for name, tensor in tensors.items():
        side = expected[name]
        if (str(tensor.out_dtype), tensor.shape) != (side.dtype, side.shape):
            what = f"{name} is {tensor.out_dtype}{list(tensor.shape)}, not {side.dtype}{list(side.shape)}"
            raise InputError(f"not the base of the delta: {what}", where=base.path, hint=_WRONG_BASE)


def _applied(base: Checkpoint, delta: Delta, tensors: Mapping[str, Tensor]) -> Checkpoint:
    """OLD with the tensors of NEW in their places."""
    changes = [change for change in delta.manifest.changes if change.coding != UNCHANGED]
    new = {change.name: delta.applied(change, tensors.get(change.name)) for change in changes if change.new is not None}
    current, dtype = {**tensors, **new}, DTYPES_BY_TORCH_NAME[base.main_dtype]
    packed, placed = dict(base.tensors), set[str]()
    for key, item in base.items.items():
        if not (here := item.parts.keys() & new.keys()):
            continue
        placed |= here
        held = {slot.hf: found for slot, found, _ in item.dropped(base.tensors[key]) if slot.hf is not None}
        packed[key] = item.pack([current[name] for name in item.parts], held, dtype)
    extras = dict(base.sidecar.extras)
    for change in changes:
        if change.name in placed:
            continue
        if not base.family.is_extra(change.name, base.config):
            what = f"{change.name} is {change.coding}, and every {base.config.architecture} has it"
            raise InputError(what, where=delta.path, hint="make the delta from checkpoints of one model")
        if change.new is None:
            extras.pop(change.name, None)
        else:
            extras[change.name] = new[change.name]
    return replace(base, tensors=packed, sidecar=replace(base.sidecar, extras=extras))


@dataclass(frozen=True)
class _Task:
    """A tensor to check before anything is written: that of OLD, or the bytes that the delta holds of one."""

    change: Change
    tensor: Tensor
    is_old: bool


def _check_bytes(base: Checkpoint, delta: Delta, tensors: Mapping[str, Tensor], execution: Execution) -> None:
    """Checks the hashes of OLD and the bytes of the delta."""
    # Imported here because it imports NumPy: header-only commands start faster without it.
    from ckptkit.io.threads import read_all

    tasks = [
        *(_Task(change, delta.stored[change.name], False) for change in delta.manifest.changes if change.stored),
        *(_Task(change, tensors[change.name], True) for change in delta.manifest.changes if change.old is not None),
    ]

    def check(readers: Readers, task: _Task) -> bool:
        change = task.change
        if not task.is_old and change.coding == CHANGED:
            tiles = delta.tiles(change)
            for number in range(tiles.tiling.count):
                tiles.data(number)
            return True
        side = change.old if task.is_old else change.new
        if side is None or readers.first.sha256(task.tensor) != side.sha256:
            if task.is_old:
                what = f"not the base of the delta: {change.name} has other bytes"
                raise InputError(what, where=base.path, hint=_WRONG_BASE)
            where = stored_in(task.tensor)
            raise InputError(f"{change.name} is damaged", where=where, hint="fetch or make the delta again")
        return True

    read_all(tasks, check, lambda task: task.tensor.nbytes, threads=execution.threads, progress=execution.progress)


def _result_check(manifest: Manifest, threads: int | None) -> Callable[[Path], None]:
    """What checks that a directory holds NEW, before it is committed."""

    def check(folder: Path) -> None:
        from ckptkit.inspection.hashing import hash_checkpoint

        found = hash_checkpoint(folder, only="tensors", threads=threads)
        if found.model == manifest.new:
            return
        wanted: dict[str, Any] = {change.name: change.new for change in manifest.changes if change.new is not None}
        there = {item.name: item for item in found.tensors}
        name = min(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))
        what = f"the result is not what the delta was made from: {name} differs"
        raise InputError(what, where=folder, hint="nothing was put in place; make the delta again")

    return check
