"""A `ModelConfig` as Megatron-LM's `args`, the flat record of a model that its checkpoints carry.

Names and meanings are those of `megatron/training/arguments.py`; `--use-checkpoint-args` reads them back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ckptkit.megatron_args.fields import GRID_FIELDS, PRECISION_FIELDS, fields_of, written
from ckptkit.sharding.grid import Parallelism
from ckptkit.tables.family import Family
from ckptkit.tables.model_config import Adapter, ModelConfig
from ckptkit.tables.spelling import GROUPED

RUN_ARGS: Mapping[str, Any] = {
    "multi_latent_attention": False,
    "heterogeneous_layers_config_path": None,
    "mtp_num_layers": None,
    "qk_l2_norm": False,
    "is_hybrid_model": False,
    "no_persist_layer_norm": False,
    "bias_swiglu_fusion": True,
    "bias_gelu_fusion": True,
    "init_method_xavier_uniform": False,
    "init_model_with_meta_device": False,
    "fp8_param_gather": False,
    "fp16_lm_cross_entropy": False,
    "overlap_p2p_comm": True,
    "cp_comm_type": ["p2p"],
    "config_logger_dir": "",
}
"""What Megatron-Bridge takes from `args` where there is no run_config.yaml: the defaults of Megatron-LM's parser.

Source: `mlm_compat` of Megatron-Bridge 0.6.2.
"""


def to_args(
    family: Family,
    config: ModelConfig,
    grid: Parallelism,
    padded_vocab_size: int,
    divisible_by: int,
    experts: str = GROUPED,
    *,
    local: bool = False,
) -> dict[str, Any]:
    """A model on a grid as plain values.

    Args:
        family: The model's family.
        config: The model.
        grid: The parallel grid of the checkpoint.
        padded_vocab_size: Rows of the stored embedding over all ranks.
        divisible_by: `--make-vocab-size-divisible-by`.
        experts: How expert tensors are named, `grouped` or `sequential`.
        local: Whether layers are those of the local spec, without Transformer Engine.
    """
    of_model = model_args(family, config)
    return {
        **of_model,
        **{name: value for name, value in RUN_ARGS.items() if name not in of_model},
        "transformer_impl": "local" if local else "transformer_engine",
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
