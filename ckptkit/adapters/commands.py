"""`adapter merge` and `adapter export`, from paths to a finished output."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from ckptkit.adapters.merging import Weighted, with_adapters
from ckptkit.checkpoints.lora.megatron import ADAPTER, MODEL
from ckptkit.checkpoints.sources import facts_of, open_source
from ckptkit.conversion.adapters import PEFT_FORMAT
from ckptkit.conversion.execution import ConversionResult, Execution, How, carry_out
from ckptkit.conversion.options import Options, dtype_called
from ckptkit.conversion.planning import make_plan
from ckptkit.errors import UsageError
from ckptkit.sharding.grid import Parallelism

PRECISIONS = ("float32", "float64")


def merge_adapters(
    base: str | Path,
    adapters: Sequence[tuple[str | Path, float]],
    out: str | Path,
    *,
    to: str,
    precision: str = PRECISIONS[0],
    grid: Parallelism = Parallelism(),  # noqa: B008  frozen
    dtype: str | None = None,
    shard_size: int | None = None,
    spec: str = "te",
    experts: str | None = None,
    make_vocab_size_divisible_by: int | None = None,
    hf_reference: str | Path | None = None,
    lora_alpha: float | None = None,
    source: dict[str, Any] | None = None,
    **how: Unpack[How],
) -> ConversionResult:
    """Writes a model with adapters in its weights: W + scale * B A, summed in float32 and rounded once.

    Args:
        base: The model, of any format. Of a Megatron checkpoint with an adapter beside the weights, the weights.
        adapters: (adapter of any format, weight): the adapters are added in this order.
        out: The directory to create.
        to: `hf`, `packed`, `torch` or `torch_dist`.
        precision: Type of the sums, `float32` or `float64`.
        grid: The grid of a `torch` or `torch_dist` output.
        dtype: Type of the output; by default that of the model.
        shard_size: As for `convert`.
        spec: As for `convert`.
        experts: As for `convert`.
        make_vocab_size_divisible_by: As for `convert`.
        hf_reference: Hugging Face directory that describes a Megatron model.
        lora_alpha: Alpha of a Megatron adapter that does not record it.
        source: Further options of `open_checkpoint` for the model.
        how: As for `convert`.

    Raises:
        UsageError: The request cannot work.
        InputError: A source is damaged, or an adapter is for another model.
        UnsupportedError: An adapter cannot be merged.
        StorageError: The destination cannot be written.
    """
    started, execution = time.monotonic(), Execution(**how)
    if precision not in PRECISIONS:
        raise UsageError(f"--precision {precision}", hint=f"one of {', '.join(PRECISIONS)}")
    if not adapters:
        raise UsageError("no adapter to merge", hint="name at least one")
    options = Options(
        grid=grid,
        spec=spec,
        experts=experts,
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
        shard_size=shard_size,
        dtype=dtype_called(dtype),
    )
    with ExitStack() as stack:
        model = open_source(stack, base, hf_reference, headers_only=execution.dry_run, part=MODEL, **(source or {}))
        opened = [
            open_source(stack, path, None, headers_only=False, base=model, part=ADAPTER, lora_alpha=lora_alpha)
            for path, _ in adapters
        ]
        weighted = [Weighted(adapter, weight) for adapter, (_, weight) in zip(opened, adapters, strict=True)]
        merged, lossy = with_adapters(model, weighted, dtype=options.dtype, double=precision == PRECISIONS[1])
        plan = make_plan(merged, to, options)
        checks = [check for adapter in opened for check in adapter.comparisons]
        notes = [f"{adapter.path.name}: {note}" for adapter in opened for note in adapter.notes]
        plan = replace(
            plan,
            comparisons=(*plan.comparisons, *checks),
            lossy=(*plan.lossy, *lossy),
            notes=(*plan.notes, *notes, *(_told(one) for one in weighted)),
        )
        source_facts = {**facts_of(model), "path": str(base), "origin": model.sidecar.origin}
        target_facts = {"path": str(out), "format": to, "grid": str(grid)}
        return carry_out(plan, [model, *opened], source_facts, target_facts, execution, started)


def _told(one: Weighted) -> str:
    assert one.adapter.lora is not None
    weight = "" if one.weight == 1 else f" times {one.weight:g}"
    return f"{len(one.adapter.lora.linears):,} linear layers have {one.adapter.path.name}{weight} in them"


def export_adapter(
    checkpoint: str | Path,
    out: str | Path,
    *,
    hf_reference: str | Path | None = None,
    lora_alpha: float | None = None,
    dtype: str | None = None,
    source: dict[str, Any] | None = None,
    **how: Unpack[How],
) -> ConversionResult:
    """Takes the adapter out of a Megatron checkpoint, as a PEFT directory. Of the weights nothing is read.

    Args:
        checkpoint: A Megatron checkpoint, with or without the weights of the model.
        out: The directory to create.
        hf_reference: The model that the adapter is for, unless the checkpoint has a sidecar.
        lora_alpha: Alpha, unless the checkpoint records it.
        dtype: Type of the factors; by default the stored one.
        source: Further options of `open_checkpoint`.
        how: As for `convert`.

    Raises:
        UsageError: Nothing says which model the adapter is for.
        InputError: There is no adapter, it is damaged, or nothing says its alpha.
        UnsupportedError: PEFT cannot express it.
        StorageError: The destination cannot be written.
    """
    started, execution = time.monotonic(), Execution(**how)
    with ExitStack() as stack:
        adapter = open_source(
            stack,
            checkpoint,
            hf_reference,
            headers_only=execution.dry_run,
            lora_alpha=lora_alpha,
            part=ADAPTER,
            **(source or {}),
        )
        plan = make_plan(adapter, PEFT_FORMAT, Options(dtype=dtype_called(dtype)))
        source_facts = {**facts_of(adapter), "path": str(checkpoint), "origin": adapter.sidecar.origin}
        target_facts = {"path": str(out), "format": PEFT_FORMAT, "grid": str(Parallelism())}
        return carry_out(plan, [adapter], source_facts, target_facts, execution, started)
