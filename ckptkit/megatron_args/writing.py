"""A `ModelConfig` as Megatron-LM's `args`, the flat record of a model that its checkpoints carry.

Names and meanings are those of `megatron/training/arguments.py`; `--use-checkpoint-args` reads them back.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ckptkit.megatron_args.fields import GRID_FIELDS, PRECISION_FIELDS, fields_of, written
from ckptkit.sharding.grid import Parallelism
from ckptkit.tables.family import Family
from ckptkit.tables.model_config import Adapter, ModelConfig
from ckptkit.tables.spelling import GROUPED


def to_args(
    family: Family,
    config: ModelConfig,
    grid: Parallelism,
    padded_vocab_size: int,
    divisible_by: int,
    experts: str = GROUPED,
) -> dict[str, Any]:
    """A model on a grid as plain values.

    Args:
        family: The model's family.
        config: The model.
        grid: The parallel grid of the checkpoint.
        padded_vocab_size: Rows of the stored embedding over all ranks.
        divisible_by: `--make-vocab-size-divisible-by`.
        experts: How expert tensors are named, `grouped` or `sequential`.
    """
    return {
        **model_args(family, config),
        **_grid_args(grid),
        **({"moe_grouped_gemm": experts == GROUPED} if config.num_experts else {}),
        **({"adapter_first": grid.adapter_first} if config.adapter is not None else {}),
        "padded_vocab_size": padded_vocab_size,
        "vocab_size": config.vocab_size,
        "make_vocab_size_divisible_by": divisible_by,
    }


def model_args(family: Family, config: ModelConfig) -> dict[str, Any]:
    """The arguments that describe a model, without those of its grid and its vocabulary."""
    layer = config.layers[-1 if config.adapter is not None else 0]
    return {
        **written(fields_of(config), "args", config, layer),
        **_adapter_args(config),
        **family_args(family, config),
        **written(PRECISION_FIELDS, "args", config, layer),
    }


def family_args(family: Family, config: ModelConfig) -> dict[str, Any]:
    """The arguments that only this family has. Megatron-LM has none for them: the names are the family's own."""
    to_args = family.quirks.to_args
    return {} if to_args is None else to_args(config)


def _adapter_args(config: ModelConfig) -> dict[str, Any]:
    """Our own extra arguments. They mark that every other size is the wide half's."""
    if config.adapter is None:
        return {}
    return {f"adapter_{field.name}": getattr(config.adapter, field.name) for field in fields(Adapter)}


def _grid_args(grid: Parallelism) -> dict[str, Any]:
    args: dict[str, Any] = {}
    for field in (field for field in GRID_FIELDS if field.is_written(grid)):
        args[field.args] = field.value(grid)
        if field.ours == "vpp":  # the other way to ask for virtual stages
            args["num_layers_per_virtual_pipeline_stage"] = None
    return args
