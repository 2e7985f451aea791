"""Decoder layers: megatron-core's local layer spec with what a `LayerConfig` needs put in."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from ckptkit.families.config import LayerConfig, ModelConfig
from ckptkit.megatron.attention import ExactAttention, GroupedQueryAttention
from ckptkit.megatron.compat import local_layer_spec
from ckptkit.megatron.config import layer_config
from ckptkit.megatron.norms import RMSNorm


class DecoderLayer(TransformerLayer):
    """megatron-core's `TransformerLayer` in the sizes of its own layer.

    Args:
        config: Megatron's model-wide config.
        layer: Sizes of this layer.
        options: Passed on.
    """

    def __init__(self, config: TransformerConfig, *, layer: LayerConfig, **options: Any) -> None:
        super().__init__(config=layer_config(config, layer), **options)


def block_spec(config: ModelConfig, layers: range) -> TransformerBlockSubmodules:
    """Specs of the decoder layers `layers` (global numbers) and of the final norm."""
    specs = [layer_spec(config, config.layers[number]) for number in layers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)


def layer_spec(config: ModelConfig, layer: LayerConfig) -> ModuleSpec:
    """Spec of one decoder layer: linears, MLP and residual adds are megatron-core's, norms and core attention ours."""
    submodules = local_layer_spec(config.qk_norm).submodules
    submodules.input_layernorm = RMSNorm
    submodules.pre_mlp_layernorm = RMSNorm
    attention = submodules.self_attention
    attention.submodules.core_attention = ExactAttention
    if config.qk_norm:
        attention.submodules.q_layernorm = attention.submodules.k_layernorm = RMSNorm
    submodules.self_attention = ModuleSpec(
        module=GroupedQueryAttention,
        params={**attention.params, "model": config, "rope": layer.rope},
        submodules=attention.submodules,
    )
    return ModuleSpec(module=DecoderLayer, params={"layer": layer}, submodules=submodules)
