"""megatron-core's `TransformerConfig` from `ModelConfig` and `Parallelism`, for a model and for one of its layers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from ckptkit.errors import UnsupportedError
from ckptkit.megatron.activations import activation
from ckptkit.sharding.grid import Parallelism
from ckptkit.tables.model_config import LayerConfig, ModelConfig


@dataclass
class RuntimeConfig(TransformerConfig):
    """megatron-core's `TransformerConfig` and what the runtime's own modules read beside it.

    Attributes:
        norms_scale_in_fp32: Whether an RMSNorm multiplies by its weight before it rounds to the model's dtype.
    """

    norms_scale_in_fp32: bool = False


def transformer_config(
    config: ModelConfig,
    grid: Parallelism,
    *,
    dtype: torch.dtype,
    device: torch.device,
    sequence_parallel: bool = False,
    recompute: bool = False,
) -> RuntimeConfig:
    """The model-wide `TransformerConfig`; its per-layer sizes are those of the first layer, its activation is unset.

    Fusions are off because they need CUDA extensions, dropout is off, and no parameter is initialised: every one is
    loaded.

    Args:
        config: The model.
        grid: The parallel grid.
        dtype: Dtype of parameters and activations.
        device: Where the parameters live.
        sequence_parallel: Split the sequence over tensor parallel ranks outside of the linears.
        recompute: Keep only the inputs of layers in training, and compute their activations again backwards.

    Raises:
        UnsupportedError: megatron-core cannot express the biases or the router.
    """
    first = config.layers[0]
    base = RuntimeConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=first.num_heads,
        num_query_groups=first.num_kv_heads,
        kv_channels=first.head_dim,
        ffn_hidden_size=first.ffn_hidden_size,
        softmax_scale=config.softmax_scale,
        normalization="RMSNorm",
        layernorm_zero_centered_gamma=config.zero_centered_norms,
        layernorm_epsilon=config.norm_eps,
        qk_layernorm=config.qk_norm,
        add_bias_linear=config.mlp_bias,
        add_qkv_bias=config.qkv_bias,
        gated_linear_unit=config.gated,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=config.init_std,
        tensor_model_parallel_size=grid.tp,
        pipeline_model_parallel_size=grid.pp,
        virtual_pipeline_model_parallel_size=grid.vpp if grid.vpp > 1 else None,
        num_layers_in_first_pipeline_stage=grid.first_stage_layers,
        num_layers_in_last_pipeline_stage=grid.last_stage_layers,
        account_for_embedding_in_pipeline_split=grid.embedding_in_split,
        account_for_loss_in_pipeline_split=grid.loss_in_split,
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu_initialization=device.type == "cpu",
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        # Of the families, only Gemma 4 normalises values; its norms round last.
        norms_scale_in_fp32=config.value_norm,
        **_recompute_fields(recompute),
        **_expert_fields(config, grid),
    )
    if config.out_bias and not config.qkv_bias:
        raise UnsupportedError("megatron-core cannot express an attention output bias without q, k and v biases")
    # What stages send one another may be wider or narrower than the model: Megatron's schedules then send shapes, too.
    # megatron-core's own check of this field only knows of experts.
    base.variable_seq_lengths = (
        config.adapter is not None
        or bool(config.per_layer_input_size)
        or any(layer.kv_donor is not None for layer in config.layers)
    )
    return base


def _recompute_fields(recompute: bool) -> dict[str, Any]:
    if not recompute:
        return {}
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def _expert_fields(config: ModelConfig, grid: Parallelism) -> dict[str, Any]:
    """What a `TransformerConfig` says of experts.

    Tokens are gathered on all expert ranks: of the dispatchers, that one runs on CPUs as well as on GPUs.

    Raises:
        UnsupportedError: megatron-core has no such router.
    """
    if not config.num_experts:
        return {}
    if config.experts_per_token == 1 and config.norm_topk_prob:
        raise UnsupportedError("megatron-core does not run a single expert per token whose weight is renormalised to 1")
    return {
        "num_moe_experts": config.num_experts,
        "moe_ffn_hidden_size": config.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": config.layers[0].ffn_hidden_size if config.parallel_dense else None,
        "moe_router_topk": config.experts_per_token,
        # Softmax over the chosen experts equals softmax over all of them, renormalised.
        "moe_router_pre_softmax": not config.norm_topk_prob,
        "moe_router_score_function": "softmax",
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
        "moe_grouped_gemm": False,
        "expert_model_parallel_size": grid.ep,
        "expert_tensor_parallel_size": grid.expert_tp,
    }


def layer_config(base: TransformerConfig, layer: LayerConfig, activation_name: str) -> TransformerConfig:
    """`base` with the sizes, the attention window and the activation of one layer.

    Args:
        base: The model-wide config.
        layer: The layer.
        activation_name: Hugging Face's name of the activation; a learned one gets parameters of its own.

    Raises:
        UnsupportedError: The runtime does not know this activation.
    """
    sized = copy.copy(base)
    sized.activation_func = activation(activation_name, base.params_dtype)
    sized.hidden_size = layer.hidden_size or base.hidden_size
    sized.layernorm_epsilon = base.layernorm_epsilon if layer.norm_eps is None else layer.norm_eps
    sized.num_attention_heads = layer.num_heads
    sized.num_query_groups = layer.num_kv_heads
    sized.kv_channels = layer.head_dim
    sized.ffn_hidden_size = layer.ffn_hidden_size
    if base.moe_shared_expert_intermediate_size is not None:
        sized.moe_shared_expert_intermediate_size = layer.ffn_hidden_size
    # Megatron counts the tokens to the left of the current one, ckptkit and Hugging Face count that one too.
    sized.window_size = None if layer.window is None else (layer.window - 1, 0)
    return sized


def attention_config(base: TransformerConfig, qkv_bias: bool, out_bias: bool) -> TransformerConfig:
    """`base` for the attention, whose output bias megatron-core ties to that of the MLP."""
    own = copy.copy(base)
    own.add_qkv_bias = qkv_bias
    own.add_bias_linear = out_bias
    return own
