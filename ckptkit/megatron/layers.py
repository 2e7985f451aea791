"""Decoder layers: megatron-core's local layer spec with what a `LayerConfig` needs put in."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from ckptkit.errors import UnsupportedError
from ckptkit.families.config import LayerConfig, ModelConfig
from ckptkit.megatron.attention import ExactAttention, GroupedQueryAttention
from ckptkit.megatron.compat import local_layer_spec, submodules_of
from ckptkit.megatron.config import layer_config
from ckptkit.megatron.moe import Router
from ckptkit.megatron.norms import RMSNorm


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


class NormedRowParallelLinear(RowParallelLinear):
    """megatron-core's `RowParallelLinear` with a norm after it, as Megatron-Bridge names it: `post_layernorm`.

    Args:
        input_size: Width of the input over all ranks.
        output_size: Width of the output.
        config: Megatron's config.
        options: Passed on.
    """

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        self.post_layernorm = RMSNorm(config, output_size, config.layernorm_epsilon)

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The normalised output, bias included: nothing is left to be added."""
        output, bias = super().forward(input_)
        return self.post_layernorm(output if bias is None else output + bias), None


def block_spec(config: ModelConfig, layers: range) -> TransformerBlockSubmodules:
    """Specs of the decoder layers `layers` (global numbers) and of the final norm."""
    specs = [layer_spec(config, config.layers[number]) for number in layers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)


def layer_spec(config: ModelConfig, layer: LayerConfig) -> ModuleSpec:
    """Spec of one decoder layer: linears, MLP, experts and residual adds are megatron-core's, norms and attention ours.

    Raises:
        UnsupportedError: The runtime has no such layer.
    """
    if layer.moe and config.post_norms:
        raise UnsupportedError("experts with a norm after them are not in the runtime")
    submodules = local_layer_spec(config.qk_norm, config.num_experts if layer.moe else None).submodules
    submodules.input_layernorm = submodules.pre_mlp_layernorm = RMSNorm
    submodules.self_attention = _attention_spec(submodules.self_attention, config, layer)
    mlp = submodules_of(submodules.mlp)
    if layer.moe:
        mlp.router = Router
    elif config.post_norms:
        mlp.linear_fc2 = NormedRowParallelLinear
    return ModuleSpec(
        module=DecoderLayer, params={"layer": layer, "activation": config.activation}, submodules=submodules
    )


def _attention_spec(stock: Any, config: ModelConfig, layer: LayerConfig) -> ModuleSpec:
    parts = stock.submodules
    parts.core_attention = ModuleSpec(module=ExactAttention, params={"softcap": config.attention_softcap})
    if config.qk_norm:
        parts.q_layernorm = parts.k_layernorm = RMSNorm
    if config.post_norms:
        parts.linear_proj = NormedRowParallelLinear
    params = {**stock.params, "model": config, "rope": layer.rope}
    return ModuleSpec(module=GroupedQueryAttention, params=params, submodules=parts)
