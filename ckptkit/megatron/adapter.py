"""The adapter of a split Llama: it maps the residual stream of the narrow layers to the width of the wide ones."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

from ckptkit.families.split_llama import LINEAR, RELU
from ckptkit.sharding.stages import Stage
from ckptkit.tables.model_config import Adapter, ModelConfig


class ParallelAdapter(MegatronModule):
    """The matrices of an adapter, split over the tensor parallel ranks.

    A single matrix is column-parallel and its output gathered; of two, the first is column-parallel and the second
    row-parallel, so that what is between them stays apart.

    Args:
        config: Megatron's config; its width is the wide one.
        adapter: Kind and narrow width.

    Attributes:
        after: Number of layers before it.
    """

    def __init__(self, config: TransformerConfig, adapter: Adapter) -> None:
        super().__init__(config=config)
        self.kind, self.after = adapter.kind, adapter.after
        narrow, wide = adapter.hidden_size, config.hidden_size
        common: dict[str, Any] = {"config": config, "init_method": config.init_method, "bias": False}
        self.linear_1 = ColumnParallelLinear(narrow, wide, gather_output=False, **common)
        if adapter.kind != LINEAR:
            self.linear_2 = RowParallelLinear(wide, wide, input_is_parallel=True, skip_bias_add=False, **common)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[sequence, batch, narrow] -> [sequence, batch, wide], split over the sequence as the input is."""
        columns, _ = self.linear_1(hidden_states)
        output: torch.Tensor
        if self.kind == LINEAR:
            output = gather_from_tensor_model_parallel_region(columns)
            return scatter_to_sequence_parallel_region(output) if self.config.sequence_parallel else output
        output, _ = self.linear_2(F.relu(columns) if self.kind == RELU else columns)
        return output


def add_adapter(block: TransformerBlock, adapter: Adapter, stage: Stage) -> None:
    """Put the adapter where the stage has it: before its layer `adapter.after`, or after its last one.

    Args:
        block: The layers of the stage; gets the attribute `adapter`.
        adapter: The adapter.
        stage: The stage, which holds the adapter.
    """
    module = ParallelAdapter(block.config, adapter)
    block.adapter = module
    if adapter.after not in stage.layers:
        block.register_forward_hook(lambda block, inputs, output: module(output))
        return
    layer = block.layers[adapter.after - stage.layers.start]

    def widen(layer: torch.nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if inputs:
            return (module(inputs[0]), *inputs[1:]), options
        return inputs, {**options, "hidden_states": module(options["hidden_states"])}

    # On the layer's input, so that recomputation of the layer's activations recomputes the adapter's, too.
    layer.register_forward_pre_hook(widen, with_kwargs=True)


def received_width(config: ModelConfig, stage: Stage, has_adapter: bool) -> int:
    """Width of the residual stream that enters a stage.

    Args:
        config: The model.
        stage: The stage.
        has_adapter: Whether the adapter is on it.
    """
    adapter = config.adapter
    if (
        adapter is None
        or stage.layers.start > adapter.after
        or (stage.layers.start == adapter.after and not has_adapter)
    ):
        return config.hidden_size
    return adapter.hidden_size
