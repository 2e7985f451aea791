"""Fitting the adapter of a split Llama that is there already: all other tensors pass through."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.sources import open_source
from ckptkit.conversion.execution import ConversionResult, Execution, How, carry_out, check_destination
from ckptkit.conversion.options import Options
from ckptkit.conversion.planning import make_plan
from ckptkit.dtypes import DTYPES_BY_TORCH_NAME
from ckptkit.errors import UnsupportedError, UsageError
from ckptkit.families.split_llama import ARCHITECTURE, FIRST, HALF, LAST, SPLIT_LLAMA, half
from ckptkit.steps import Tell, nobody
from ckptkit.surgery.build import ADAPTER, RECIPE
from ckptkit.surgery.initialisation import FITTED, Request, initialise


def refit(
    hybrid: str | Path,
    out: str | Path,
    *,
    last: str | Path,
    first: str | Path | None = None,
    init: str = "lstsq",
    options: Mapping[str, Any] | None = None,
    shard_size: int | None = None,
    **how: Unpack[How],
) -> ConversionResult:
    """Writes a split Llama again, with a fitted adapter.

    Args:
        hybrid: The split Llama: a checkpoint of any format, or `org/model@revision` on the hub.
        out: The Hugging Face directory to create.
        last: The whole wide Llama. The adapter is fitted to the input of its first layer that the split Llama has.
        first: The narrow Llama, whose first layers then feed the adapter; None for those of `hybrid` itself.
        init: `lstsq`, `ridge`, `ridge:STRENGTH` or `procrustes`.
        options: `calibration` and the other fields of `Calibration`.
        shard_size: Largest safetensors shard in bytes.
        how: How the plan is carried out (`dry_run`, `overwrite`, `resume`, `threads`, `hash`, `progress`, `tell`):
            see `Execution`.

    Raises:
        UsageError: The request cannot work.
        InputError: A source is damaged or incomplete.
        UnsupportedError: One of the models has another architecture, or the split Llama was not made from it.
        StorageError: The destination cannot be written.
    """
    started = time.monotonic()
    execution = Execution(**how)
    name = init.partition(":")[0]
    if name not in FITTED:
        raise UsageError(f"--adapter-init {init} is not fitted", hint=f"one of {', '.join(FITTED)}")
    with ExitStack() as stack:
        split = open_source(stack, hybrid, None, headers_only=execution.dry_run)
        if split.family is not SPLIT_LLAMA:
            raise UnsupportedError(f"{split.config.architecture} is no {ARCHITECTURE}", where=split.path)
        wide = open_source(stack, last, None, headers_only=execution.dry_run)
        narrow = split if first is None else open_source(stack, first, None, headers_only=execution.dry_run)
        _check_half(split, LAST, wide, "--last")
        if narrow is not split:
            _check_half(split, FIRST, narrow, "--first")
        read, given = [split, wide, narrow], Options(shard_size=shard_size)
        # The fit takes long, and is lost if nothing can be written then.
        rehearsed = _fitted(split, narrow, wide, init, {**(options or {}), "dry_run": True})
        check_destination(make_plan(rehearsed, "hf", given), read, out, execution)
        made = rehearsed
        fitting = time.monotonic()
        if not execution.dry_run:
            made = _fitted(split, narrow, wide, init, dict(options or {}), execution.tell)
        fitted = time.monotonic() - fitting
        plan = make_plan(made, "hf", given)
        facts = {"family": SPLIT_LLAMA.name, "architecture": ARCHITECTURE}
        source = {"path": str(hybrid), "format": split.format, **facts, "grid": str(split.grid)}
        source["recipe"] = made.sidecar.config[RECIPE]
        target = {"path": str(out), "format": "hf", "grid": str(made.grid)}
        return carry_out(plan, read, source, target, execution, started, fitted)


def _check_half(split: Checkpoint, key: str, model: Checkpoint, option: str) -> None:
    """Checks that `model` can be the origin of a half of `split`: equal sizes of layers, and the same tokens.

    Raises:
        UnsupportedError: It cannot.
    """
    if model.family is not HALF:
        raise UnsupportedError(f"{option}: {model.config.architecture} is no LlamaForCausalLM", where=model.path)
    own, whole = half(split.sidecar.config, key), model.config
    pairs = {
        "hidden_size": (own.hidden_size, whole.hidden_size),
        "vocab_size": (own.vocab_size, whole.vocab_size),
        "norm_eps": (own.norm_eps, whole.norm_eps),
        "layers": (own.layers[0], whole.layers[0]),
    }
    unequal = [f"{name} {one} and {other}" for name, (one, other) in pairs.items() if one != other]
    if own.num_layers > whole.num_layers:
        unequal.append(f"{own.num_layers} layers of {whole.num_layers}")
    if unequal:
        raise UnsupportedError(f"{option} is not what this half was made of: {'; '.join(unequal)}", where=model.path)


def _fitted(
    split: Checkpoint,
    first: Checkpoint,
    last: Checkpoint,
    init: str,
    options: dict[str, Any],
    tell: Tell = nobody,
) -> Checkpoint:
    """`split` with another adapter, recorded in its config.json."""
    adapter = split.config.adapter
    assert adapter is not None
    name, _, argument = init.partition(":")
    counts = {"num_first": adapter.after, "num_last": split.config.num_layers - adapter.after}
    request = Request(
        adapter.kind,
        adapter.hidden_size,
        split.config.hidden_size,
        argument=argument,
        first=first,
        last=last,
        options=options,
        tell=tell,
        **counts,
    )
    made = initialise(name, request)
    dtype = DTYPES_BY_TORCH_NAME[split.main_dtype]
    tensors = {f"{ADAPTER}{key}.weight": matrix.tensor(dtype) for key, matrix in made.matrices.items()}
    raw = dict(split.sidecar.config)
    raw[RECIPE] = {**raw.get(RECIPE, {}), "adapter_init": made.recipe}
    small = {name: path for name, path in split.sidecar.small.items() if name != "config.json"}
    return replace(
        split,
        tensors={**split.tensors, **tensors},
        sidecar=replace(split.sidecar, config=raw, small=small),
        notes=(*made.notes, *split.notes),
    )
