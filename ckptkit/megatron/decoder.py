"""Decoder layers: megatron-core's, in the sizes of a `LayerConfig`, and with what Gemma 4 has beyond it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from ckptkit.megatron.config import layer_config
from ckptkit.megatron.norms import RMSNorm
from ckptkit.tables.model_config import LayerConfig

BiasDropoutAdd = Callable[[bool, bool], Callable[..., torch.Tensor]]
"""megatron-core's `get_bias_dropout_add`."""
_INNER = ("transformer_layer", "mtp_model_layer")
"""The decoder layer in a layer of multi-token prediction, as 0.16 and 0.19 call it."""


class DecoderLayer(TransformerLayer):
    """megatron-core's `TransformerLayer` in the sizes of its own layer.

    Args:
        config: Megatron's model-wide config.
        layer: Sizes of this layer.
        activation: Hugging Face's name of the MLP's activation.
        options: Passed on.
    """

    def __init__(self, config: TransformerConfig, *, layer: LayerConfig, activation: str, **options: Any) -> None:
        super().__init__(config=layer_config(config, layer, activation), **options)


def inner_layer(layer: torch.nn.Module) -> Any:
    """The decoder layer inside a layer of multi-token prediction."""
    return next(getattr(layer, name) for name in _INNER if hasattr(layer, name))


def inner_layers(chunks: Iterable[Any]) -> Iterator[tuple[int, torch.nn.Module]]:
    """The decoder layers of multi-token prediction in some model chunks, numbered as if they followed the model's."""
    for chunk in chunks:
        if (block := getattr(chunk, "mtp", None)) is not None:
            for number, layer in enumerate(block.layers, chunk.config.num_layers):
                yield number, inner_layer(layer)


class NormedRowParallelLinear(RowParallelLinear):
    """megatron-core's `RowParallelLinear` with a norm after it, as Megatron-Bridge names it: `post_layernorm`.

    Args:
        input_size: Width of the input over all ranks.
        output_size: Width of the output.
        config: Megatron's config.
        options: Passed on.

    Attributes:
        adapted: The linear's output and its input -> its output with an adapter, before the norm; or None.
    """

    adapted: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        self.post_layernorm = RMSNorm(config, output_size, config.layernorm_epsilon)

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The normalised output, bias included: nothing is left to be added."""
        output, bias = super().forward(input_)
        if self.adapted is not None:
            output = self.adapted(output, input_)
        return self.post_layernorm(output if bias is None else output + bias), None
