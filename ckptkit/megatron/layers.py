"""Specs of decoder layers: megatron-core's local layer spec with what a `LayerConfig` needs put in."""

from __future__ import annotations

from typing import Any

from megatron.core.ssm.gated_delta_net import GatedDeltaNetSubmodules
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from ckptkit.errors import UnsupportedError
from ckptkit.megatron.attention import ExactAttention, GroupedQueryAttention
from ckptkit.megatron.compat import local_layer_spec, submodules_of, with_module
from ckptkit.megatron.context_parallel.attention import ContextParallelAttention
from ckptkit.megatron.decoder import DecoderLayer, NormedRowParallelLinear
from ckptkit.megatron.gated_delta_net import GatedDeltaNet, GatedNorm
from ckptkit.megatron.gemma4.attention import ValueNormAttention
from ckptkit.megatron.gemma4.layer import Gemma4Layer
from ckptkit.megatron.gemma4.moe import ParallelMoELayer, ScaledRouter
from ckptkit.megatron.latent_attention import LatentAttention, LatentNorm
from ckptkit.megatron.moe import ExpertOutput, Router
from ckptkit.megatron.norms import DeferredRMSNorm, RMSNorm
from ckptkit.tables.model_config import LayerConfig, ModelConfig


def block_spec(config: ModelConfig, layers: range, cp: int = 1) -> TransformerBlockSubmodules:
    """Specs of the decoder layers `layers` (global numbers) and of the final norm, for `cp` context parallel ranks."""
    specs = [layer_spec(config, number, layers, cp) for number in layers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)


def layer_spec(config: ModelConfig, number: int, stage: range, cp: int = 1) -> ModuleSpec:
    """Spec of one decoder layer: linears, MLP, experts and residual adds are megatron-core's, norms and attention ours.

    Args:
        config: The model.
        number: Global number of the layer.
        stage: Global numbers of the layers of its model chunk.
        cp: Context parallel ranks.

    Raises:
        UnsupportedError: The runtime has no such layer.
    """
    layer = config.layers[number]
    if layer.moe and config.post_norms != config.parallel_dense:
        raise UnsupportedError("experts with a norm after them are not in the runtime, but beside a dense MLP")
    submodules = local_layer_spec(
        config.qk_norm, config.num_experts if layer.moe else None, latent=config.latent is not None
    ).submodules
    submodules.input_layernorm = submodules.pre_mlp_layernorm = RMSNorm
    submodules.self_attention = _attention_spec(submodules.self_attention, config, layer, cp)
    mlp = submodules_of(submodules.mlp)
    if layer.moe:
        mlp.router = ScaledRouter if config.router_scales else Router
        if config.mlp_bias:
            submodules_of(mlp.experts).linear_fc2 = ExpertOutput
        if config.parallel_dense:
            submodules.pre_mlp_layernorm = DeferredRMSNorm
            submodules.mlp = with_module(submodules.mlp, ParallelMoELayer)
    elif config.post_norms and not config.layer_scalars:
        mlp.linear_fc2 = NormedRowParallelLinear
    params: dict[str, Any] = {"layer": layer, "activation": config.activation}
    if config.layer_scalars:
        return ModuleSpec(
            module=Gemma4Layer, params={"model": config, "number": number, "stage": stage}, submodules=submodules
        )
    return ModuleSpec(module=DecoderLayer, params=params, submodules=submodules)


def _attention_spec(stock: Any, config: ModelConfig, layer: LayerConfig, cp: int) -> ModuleSpec:
    if layer.delta is not None:
        linears = {"in_proj": ColumnParallelLinear, "out_proj": RowParallelLinear}
        return ModuleSpec(module=GatedDeltaNet, submodules=GatedDeltaNetSubmodules(out_norm=GatedNorm, **linears))
    parts = stock.submodules
    core = ContextParallelAttention if cp > 1 else ExactAttention
    parts.core_attention = ModuleSpec(module=core, params={"softcap": config.attention_softcap, "sinks": config.sinks})
    if config.latent is not None:
        parts.kv_layernorm = LatentNorm
        # megatron-core 0.19 refuses a norm that nothing uses
        parts.q_layernorm = IdentityOp if config.latent.query_rank is None else LatentNorm
        return ModuleSpec(module=LatentAttention, params={**stock.params, "layer": layer}, submodules=parts)
    if config.qk_norm:
        parts.q_layernorm = parts.k_layernorm = RMSNorm
    # Gemma 4's dense layers have this norm beside the linear, those with experts in it.
    if config.post_norms and (layer.moe or not config.layer_scalars):
        parts.linear_proj = NormedRowParallelLinear
    params = {**stock.params, "model": config, "layer": layer}
    module = ValueNormAttention if config.value_norm else GroupedQueryAttention
    return ModuleSpec(module=module, params=params, submodules=parts)
