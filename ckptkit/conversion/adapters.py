"""The plan of a conversion whose source is an adapter."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from math import lcm

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.lora.dora import unlike_peft
from ckptkit.checkpoints.lora.layouts import laid_out
from ckptkit.checkpoints.lora.sources import RECORD
from ckptkit.conversion.bridge_adapter import target_modules
from ckptkit.conversion.changes import cast_floats
from ckptkit.conversion.options import Options
from ckptkit.conversion.target import Adapted, Target, WritableFormat
from ckptkit.errors import UsageError
from ckptkit.formats.peft import CONFIG
from ckptkit.formats.sidecar import FOLDER
from ckptkit.io.plan import OutputFile, Plan
from ckptkit.tables.lora import CANONICAL, FUSED, PEFT
from ckptkit.tables.model_config import ModelConfig
from ckptkit.tables.spelling import SEQUENTIAL

PEFT_FORMAT = "peft"
_OF_ADAPTERS = ("grid", "spec", "experts", "make_vocab_size_divisible_by", "dtype", "adapter_layout", "lossy")


def make_adapter_plan(source: Checkpoint, format: WritableFormat, options: Options) -> Plan:
    """The complete plan of a conversion of an adapter.

    Raises:
        UsageError: The format or an option is for models, or the grid cannot hold the adapter.
        UnsupportedError: Megatron cannot express the adapter.
    """
    _check_options(options, format)
    source, lossy = cast_adapter(source, options)
    if not format.megatron:
        files = format.lay_out(Target(source, options, format))
    else:
        source, adapted, lost = in_layout(source, Target(source, options, format))
        lossy += lost
        target = Target(source, options, format, adapted)
        files = [*format.lay_out(target), *beside(target)]
    return Plan(tuple(files), source.comparisons, tuple(lossy), source.notes, dict(source.coverage))


def cast_adapter(source: Checkpoint, options: Options) -> tuple[Checkpoint, list[str]]:
    """An adapter in the type that `--dtype` asks for, and a sentence for each loss."""
    if options.dtype is None:
        return source, []
    config = source.sidecar.config
    source, lossy = cast_floats(source, options.dtype)
    # The dtype in config.json is that of the base, and stays.
    return replace(source, sidecar=replace(source.sidecar, config=config)), lossy


def in_layout(source: Checkpoint, target: Target) -> tuple[Checkpoint, Adapted, list[str]]:
    """An adapter in the layout of Megatron that is asked for.

    Args:
        source: The adapter.
        target: The output that it goes into.

    Returns:
        The adapter in that layout, the facts about it, and a sentence for each loss.

    Raises:
        UsageError: The grid cannot hold it, or its scales ask for `lossy`.
        UnsupportedError: Megatron cannot express it.
    """
    assert source.lora is not None
    options, grid = target.options, target.grid
    check_heads(source.config, options.adapter_layout, grid.tp)
    layout = options.adapter_layout or FUSED
    multiple = 1 if layout == PEFT else lcm(grid.tp, grid.expert_tp)
    sequential = target.spelling.experts == SEQUENTIAL
    adapter, record, lost = laid_out(source, layout, multiple, sequential=sequential, lossy=options.lossy)
    items = [linear.item for linear in source.lora.linears.values()]
    unlike = unlike_peft(items, source.config, grid.tp) if source.lora.config.dora else []
    return adapter.noting(*(f"not the DoRA of peft: {text}" for text in unlike)), Adapted(record, source.lora), lost


def _check_options(options: Options, format: WritableFormat) -> None:
    if not format.megatron and format.name != PEFT_FORMAT:
        raise UsageError(
            f"--to {format.name} is for models, and the source is an adapter",
            hint=f"use --to {PEFT_FORMAT}, or `ckptkit adapter merge` to put it into its model",
        )
    if not format.sharded and format.megatron:
        raise UsageError(f"--to {format.name} has no form for an adapter", hint="use --to torch or torch_dist")
    if not format.megatron and options.adapter_layout is not None:
        raise UsageError("--adapter-layout is about Megatron's names", hint="drop it")
    for option in fields(Options):
        if option.name not in _OF_ADAPTERS and getattr(options, option.name) != getattr(Options(), option.name):
            flag = f"--{option.name.replace('_', '-')}"
            raise UsageError(f"{flag} is about models, and the source is an adapter", hint="drop it")


def check_heads(config: ModelConfig, layout: str | None, tp: int) -> None:
    """Ranks that share a key/value head have no whole heads of an adapter of keys alone.

    Args:
        config: The model.
        layout: The layout of the adapter.
        tp: Tensor parallel size.

    Raises:
        UsageError: There are such ranks, and k has an adapter of its own.
    """
    heads = min(layer.num_kv_heads for layer in config.layers)
    if layout == CANONICAL and tp > heads:
        raise UsageError(
            f"--adapter-layout {CANONICAL}: at --tp {tp} ranks share key/value heads, of which there are {heads}",
            hint=f"use --adapter-layout {FUSED}, or a smaller --tp",
        )


def beside(target: Target) -> list[OutputFile]:
    """The record of the way back, and for `peft` the config by which others know alpha."""
    assert target.adapter is not None
    record = target.adapter.record
    text = json.dumps(record.to_json(), indent=2, sort_keys=True)
    files = [OutputFile.small(f"{FOLDER}/{RECORD}", text.encode() + b"\n")]
    if record.layout == PEFT:
        raw = {
            "peft_type": "LORA",
            "r": record.rank,
            "lora_alpha": record.alpha,
            "use_rslora": False,
            "target_modules": target_modules(target.source, target.adapter.lora, target.spelling.prefix, record),
        }
        files.append(OutputFile.small(CONFIG, json.dumps(raw, indent=2, sort_keys=True).encode() + b"\n"))
    return files
