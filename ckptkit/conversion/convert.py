"""The main job on one page: open -> change -> lay out -> plan -> move -> commit.

`open_source` reads the headers of any checkpoint and gives its canonical view. `make_plan` applies the changes, lets
the output format lay out its files (`conversion/target.py`), and returns the complete plan. `carry_out` checks the plan
against the disk, moves the bytes and commits the result. No step loads a tensor.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from ckptkit.checkpoints.lora.megatron import ADAPTER, MODEL
from ckptkit.checkpoints.sidecar_contents import ORIGINAL
from ckptkit.checkpoints.sources import facts_of, fetched_for, open_source
from ckptkit.conversion.execution import ConversionResult, Execution, How, carry_out
from ckptkit.conversion.options import FULL, Options, dtype_called
from ckptkit.conversion.original import of_original, with_scales_read
from ckptkit.conversion.planning import make_plan
from ckptkit.conversion.quantising import quantise_called
from ckptkit.conversion.targets import format_called
from ckptkit.errors import UsageError
from ckptkit.sharding.grid import Parallelism, StatedGrid
from ckptkit.tables.hybrid_names import GPT
from ckptkit.tables.prediction import CORE_0_16


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: str,
    grid: Parallelism = Parallelism(),  # noqa: B008  frozen
    spec: str = "te",
    dtype: str | None = None,
    shard_size: int | None = None,
    make_vocab_size_divisible_by: int | None = None,
    hf_reference: str | Path | None = None,
    iteration: int | None = None,
    stored_grid: StatedGrid | None = None,
    vocab_size: int | None = None,
    strict_config: bool = False,
    experts: str | None = None,
    layout: str = FULL,
    head: str | None = None,
    head_init: str | None = None,
    megatron_model: str = GPT,
    megatron_core: str = CORE_0_16,
    adapter: str | Path | None = None,
    adapter_layout: str | None = None,
    part: str | None = None,
    lora_alpha: float | None = None,
    lossy: bool = False,
    quantise: str | None = None,
    **how: Unpack[How],
) -> ConversionResult:
    """Converts a checkpoint of any format and grid to another.

    Args:
        src: A checkpoint of any format that `open_checkpoint` knows, or `org/model@revision` on the hub.
        dst: The directory to create.
        to: `hf`, `packed`, `torch` or `torch_dist`; for an adapter `peft`, `torch` or `torch_dist`.
        grid: The grid of a `torch` or `torch_dist` output.
        spec: Whose Megatron names to write: those of the `te` or the `local` layer spec, or of another writer that the
            family knows.
        dtype: Casts floating point tensors (`bfloat16`, `float16`, `float32`, `float64`).
        shard_size: Largest safetensors shard in bytes.
        make_vocab_size_divisible_by: As Megatron-LM's option; 128 for sharded formats, 1 for `packed`.
        hf_reference: Hugging Face directory that supplies config.json, tokenizer and shard map.
        iteration: Number of the source's iteration, if `src` is the root of several.
        stored_grid: The grid of `mp_rank_*` files whose `args` do not record it.
        vocab_size: True size of the source's vocabulary, for a checkpoint that does not record it beside the padding.
        strict_config: Refuse config features that Megatron's arguments cannot express.
        experts: Naming of Megatron's experts, `grouped` or `sequential`. The default goes with `spec`.
        layout: `full`; `text`, the text part of a multimodal model alone; or `legacy`, the published layout of a split
            Llama. With `text`, the other tensors go into the sidecar of a Megatron output, and are left out of a
            Hugging Face output.
        head: `value` turns a language model into a value model: one output per token in place of the logits.
        head_init: Weights of the new head: `zeros` (the default), `normal`, or `file:PATH` of a safetensors file.
        megatron_model: The model class of Megatron-Core whose names and arguments are written: `gpt` or `hybrid`.
        megatron_core: The release of Megatron-Core whose names files of ranks get: `0.16`, or `0.19`, in which layers
            of multi-token prediction have others. Distributed checkpoints of both have the same.
        adapter: An adapter of any format that is written beside the model's weights, or None.
        adapter_layout: Names of an adapter in Megatron: `fused` (the default), `canonical` or `peft`.
        part: `model` or `adapter`, the part to take of a source that holds both. With `adapter` the source gives its
            model.
        lora_alpha: Alpha of a Megatron adapter that does not record it.
        lossy: Whether the factors of an adapter may be rounded, where their scales differ by other ratios than powers
            of two.
        quantise: How a Hugging Face output is quantised: `fp8-block`, `fp8-block-ue8m0` (scales are powers of two),
            `mxfp4`, `int4`; `like:REFERENCE`, as a quantised directory is; or `original`, as the directory was from
            which the sidecar keeps the scales. With these two, a tensor that is still what it was keeps its codes and
            scales.
        how: How the plan is carried out (`dry_run`, `overwrite`, `resume`, `threads`, `hash`, `progress`): see
            `Execution`.

    Raises:
        UsageError: The request cannot work.
        InputError: The source is damaged, incomplete, or contradicts itself.
        UnsupportedError: The source is sound, but no table converts it.
        StorageError: The destination cannot be written.
    """
    started = time.monotonic()
    execution = Execution(**how)
    options = Options(
        grid=grid,
        spec=spec,
        experts=experts,
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
        megatron_model=megatron_model,
        megatron_core=megatron_core,
        shard_size=shard_size,
        dtype=dtype_called(dtype),
        strict_config=strict_config,
        layout=layout,
        head=head,
        head_init=head_init,
        adapter_layout=adapter_layout,
        lossy=lossy,
    )
    if adapter is not None and part == ADAPTER:
        raise UsageError("--part adapter and --adapter exclude each other", hint="the source gives its model")
    with ExitStack() as stack:
        wanted = quantise_called(quantise, stack, headers_only=execution.dry_run)
        source = open_source(
            stack,
            src,
            hf_reference,
            headers_only=execution.dry_run,
            iteration=iteration,
            stored_grid=stored_grid,
            vocab_size=vocab_size,
            lora_alpha=lora_alpha if adapter is None else None,
            part=part if adapter is None else MODEL,
            dtype=options.dtype,
        )
        if quantise == ORIGINAL or format_called(to).megatron:
            source = with_scales_read(source, headers_only=execution.dry_run, threads=execution.threads)
        options = replace(options, quantise=of_original(wanted, source))
        added = None
        if adapter is not None:
            added = open_source(
                stack, adapter, None, headers_only=execution.dry_run, base=source, part=ADAPTER, lora_alpha=lora_alpha
            )
        plan = make_plan(source, to, options, added)
        opened = [source] if added is None else [source, added]
        source_facts = {**facts_of(source), "path": str(src), "origin": source.sidecar.origin}
        target_facts = {"path": str(dst), "format": to, "grid": str(grid), **plan.facts}
        also = [] if wanted is None or wanted.like is None else [wanted.like.path]
        result = carry_out(plan, opened, source_facts, target_facts, execution, started, also=also)
        if fetched := fetched_for(*opened):
            result.source["fetched"] = fetched
        return result
