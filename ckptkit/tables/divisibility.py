"""Checks that the sizes of a model divide over a grid, before a conversion and before a model is built."""

from __future__ import annotations

from ckptkit.errors import UsageError
from ckptkit.sharding.grid import Parallelism
from ckptkit.sharding.rules import expert_home
from ckptkit.sharding.stages import split_layers
from ckptkit.tables.model_config import LayerConfig, ModelConfig


def check_divides(config: ModelConfig, grid: Parallelism, padded_vocab_size: int | None = None) -> None:
    """Checks that Megatron-Core can run a model on a grid.

    Args:
        config: The model.
        grid: The grid.
        padded_vocab_size: Rows of the embedding over all ranks, if known.

    Raises:
        UsageError: Heads, key/value heads, MLP widths, experts, layers or vocabulary do not divide. The message names
            the size.
    """
    for number, layer in enumerate(config.layers):
        _check_heads(layer, grid.tp, f"layer {number}")
        _check_delta(layer, grid.tp, f"layer {number}")
        if (not layer.moe or config.parallel_dense) and layer.ffn_hidden_size % grid.tp:
            raise UsageError(
                f"an MLP of width {layer.ffn_hidden_size} does not divide over --tp {grid.tp}",
                where=f"layer {number}",
                hint="choose another --tp",
            )
    _check_experts(config, grid)
    split_layers(config.num_layers, grid)
    if padded_vocab_size is not None and padded_vocab_size % grid.tp:
        raise UsageError(f"the padded vocabulary of {padded_vocab_size} does not divide over --tp {grid.tp}")


def sharing_problem(config: ModelConfig, grid: Parallelism) -> str | None:
    """The problem of a layer that uses the keys and values of a layer on another pipeline stage.

    Megatron's stages send the residual stream alone. Keys and values stay in their model chunk, unless a runtime sends
    them, too.

    Returns:
        The problem and the nearest split of the layers without it, in one sentence; None if there is no problem.
    """
    home = {number: stage for stage in split_layers(config.num_layers, grid) for number in stage.layers}
    apart = [
        (number, layer.kv_donor)
        for number, layer in enumerate(config.layers)
        if layer.kv_donor is not None and home[number] is not home[layer.kv_donor]
    ]
    if not apart:
        return None
    (number, donor), first = apart[0], min(layer.kv_donor for layer in config.layers if layer.kv_donor is not None)
    return (
        f"layer {number} uses the keys and values of layer {donor}, which is on another pipeline stage of {grid};"
        f" {_together(config.num_layers, first, grid)}"
    )


def _together(num_layers: int, first: int, grid: Parallelism) -> str:
    """A split that keeps layer `first` and all later layers on one stage."""
    by_layout = grid.pipeline_layout is not None
    given = {
        "--pipeline-model-parallel-layout": by_layout,
        "--vpp": grid.vpp > 1 and not by_layout,
        "--decoder-first-pipeline-num-layers": grid.first_stage_layers is not None,
    }
    less = " and ".join(option for option, there in given.items() if there)
    without = f" (without {less})" if less else ""
    for stages in range(min(grid.pp - 1, first), 0, -1):
        last = num_layers - first // stages * stages
        size = "" if stages == grid.pp - 1 else f"--pp {stages + 1} "
        return f"{size}--decoder-last-pipeline-num-layers {last}{without} keeps them together"
    return f"--pp 1{without} keeps them together"


def _check_heads(layer: LayerConfig, tp: int, where: str) -> None:
    heads, groups = layer.num_heads, layer.num_kv_heads
    if heads % tp:
        sizes = [size for size in range(1, heads + 1) if heads % size == 0]
        raise UsageError(
            f"{heads} attention heads do not divide over --tp {tp}",
            where=where,
            hint=f"--tp {', '.join(map(str, sizes[:6]))} would",
        )
    if groups % tp and tp % groups:
        raise UsageError(
            f"{groups} key/value heads and --tp {tp}: one must be a multiple of the other",
            where=where,
            hint="choose a --tp that divides the number of key/value heads, or is a multiple of it",
        )


def _check_delta(layer: LayerConfig, tp: int, where: str) -> None:
    if layer.delta is None:
        return
    keys, values = layer.delta.key_heads, layer.delta.value_heads
    if keys % tp or values % tp:
        sizes = [size for size in range(1, keys + 1) if keys % size == values % size == 0]
        raise UsageError(
            f"{keys} key heads and {values} value heads of a DeltaNet do not divide over --tp {tp}",
            where=where,
            hint=f"--tp {', '.join(map(str, sizes[:6]))} would",
        )


def _check_experts(config: ModelConfig, grid: Parallelism) -> None:
    if not config.num_experts:
        if grid.ep > 1:
            raise UsageError("--ep needs a model with experts, but this model has none")
        return
    expert_home(0, config.num_experts, grid.ep)
    if config.moe_ffn_hidden_size % grid.expert_tp:
        raise UsageError(
            f"experts of width {config.moe_ffn_hidden_size} do not divide over {grid.expert_tp} ranks",
            hint="choose another --etp (or --tp)",
        )
