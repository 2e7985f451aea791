"""The main job on one page: open -> translate -> shard -> plan -> move -> commit.

`open_checkpoint` gives the canonical view of any source; a target lays that view out as files; the plan is then
complete and can be shown, checked against the disk, and executed. Nothing on the way loads a tensor.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from ckptkit.checkpoints.sources import facts_of, open_source
from ckptkit.conversion.execution import carry_out
from ckptkit.conversion.options import ConversionResult, Execution, Options, dtype_called
from ckptkit.conversion.planning import make_plan
from ckptkit.sharding.grid import Parallelism, StatedGrid
from ckptkit.tables.hybrid_names import GPT

if TYPE_CHECKING:
    pass


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
    layout: str = "full",
    head: str | None = None,
    head_init: str | None = None,
    megatron_model: str = GPT,
    dry_run: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    threads: int | None = None,
    hash: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ConversionResult:
    """Converts a checkpoint of any format and grid to another.

    Args:
        src: A checkpoint of any format that `open_checkpoint` knows, or `org/model@revision` on the hub.
        dst: The directory to create.
        to: `hf`, `packed`, `torch` or `torch_dist`.
        grid: The grid of a `torch` or `torch_dist` output.
        spec: Megatron names as the `te` or the `local` layer spec has them.
        dtype: Casts floating point tensors (`bfloat16`, `float16`, `float32`).
        shard_size: Largest safetensors shard in bytes.
        make_vocab_size_divisible_by: As Megatron-LM's option; 128 for sharded formats, 1 for `packed`.
        hf_reference: Hugging Face directory that supplies config.json, tokenizer and shard map.
        iteration: Number of the source's iteration, if `src` is the root of several.
        stored_grid: The grid of `mp_rank_*` files whose `args` do not say it.
        vocab_size: The true size of the source's vocabulary, where nothing else tells it from its padding.
        strict_config: Refuse config features that Megatron's arguments cannot express.
        experts: Naming of Megatron's experts, `grouped` or `sequential`; by default what goes with `spec`.
        layout: `full`, or `text`: the text part of a multimodal model alone. Its other tensors stay in the sidecar of
            a Megatron output, and stay behind in a Hugging Face one. Or `legacy`: a split Llama's published layout.
        head: `value` turns a language model into a value model: one output per token in place of the logits.
        head_init: Its weights: `zeros` (the default), `normal`, or `file:PATH` of a safetensors file.
        megatron_model: Megatron-Core's model whose names and arguments are written: `gpt` or `hybrid`.
        dry_run: Plan only; nothing is written.
        overwrite: Replace an existing destination, atomically.
        resume: Go on from what a killed run left.
        threads: Threads that move bytes.
        hash: Also compute the SHA-256 of every output file.
        progress: Called with (bytes done, bytes in all).

    Raises:
        UsageError: The request cannot work.
        InputError: The source is damaged, incomplete, or contradicts itself.
        UnsupportedError: The source is sound, but no table converts it.
        StorageError: The destination cannot be written.
    """
    started = time.monotonic()
    options = Options(
        grid,
        spec,
        dtype_called(dtype),
        shard_size,
        make_vocab_size_divisible_by,
        strict_config,
        experts,
        layout,
        head,
        head_init,
        megatron_model,
    )
    with ExitStack() as stack:
        source = open_source(
            stack,
            src,
            hf_reference,
            headers_only=dry_run,
            iteration=iteration,
            stored_grid=stored_grid,
            vocab_size=vocab_size,
        )
        plan = make_plan(source, to, options)
        about = {**facts_of(source), "path": str(src), "origin": source.sidecar.origin}
        target = {"path": str(dst), "format": to, "grid": str(grid)}
        execution = Execution(dry_run, overwrite, resume, threads, hash, progress)
        return carry_out(plan, [source], about, target, execution, started)
