"""megatron-core's `TransformerConfig` from `ModelConfig` and `Parallelism`, for a model and for one of its layers."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from ckptkit.errors import UnsupportedError
from ckptkit.megatron.activations import activation
from ckptkit.megatron.rotary import attention_factor
from ckptkit.megatron_args.fields import core_grid, core_sizes, delta_of, fields_of, written
from ckptkit.sharding.grid import Parallelism
from ckptkit.tables.model_config import SIGMOID, DeltaNet, LayerConfig, ModelConfig, Rope


@dataclass
class RuntimeConfig(TransformerConfig):
    """megatron-core's `TransformerConfig` and what the runtime's own modules read beside it.

    Attributes:
        norms_scale_in_fp32: Whether an RMSNorm multiplies by its weight before it rounds to the model's dtype.
        dense_beside_experts: Whether the shared expert is the dense MLP of a layer, whose width layers differ in.
        latent_norm_eps: Epsilon of the norms of latent vectors.
    """

    norms_scale_in_fp32: bool = False
    dense_beside_experts: bool = False
    latent_norm_eps: float = 1e-6


@dataclass
class LatentRuntimeConfig(RuntimeConfig, MLATransformerConfig):
    """The same for a model with latent attention."""


def transformer_config(
    config: ModelConfig,
    grid: Parallelism,
    *,
    dtype: torch.dtype,
    device: torch.device,
    sequence_parallel: bool = False,
    recompute: bool = False,
    cp: int = 1,
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
        cp: Context parallel size.

    Raises:
        UnsupportedError: megatron-core cannot express the biases or the router, or the runtime cannot cut sequences of
            this model.
    """
    if (delta := delta_of(config)) is not None and delta.key_heads % (grid.tp * cp):
        raise UnsupportedError(
            f"{delta.key_heads} key heads of a DeltaNet do not divide over {grid.tp} tensor and {cp} context parallel"
            " ranks"
        )
    if config.num_experts == 0:
        grid = replace(grid, ep=1, etp=None)  # megatron-core refuses expert ranks without experts
    kind = RuntimeConfig if config.latent is None else LatentRuntimeConfig
    base = kind(
        **written(fields_of(config), "core", config, config.layers[0]),
        **core_grid(grid),
        context_parallel_size=cp if delta is None else 1,
        add_bias_linear=config.mlp_bias and not config.num_experts,
        sequence_parallel=sequence_parallel,
        # Two stages that exchange activations and gradients in one batch would take one for the other.
        overlap_p2p_comm=grid.vpp > 1,
        batch_p2p_comm=grid.vpp == 1,
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
        # Of the families, only Gemma 4 normalises values, and only GPT-OSS has sinks; their norms round last.
        norms_scale_in_fp32=config.value_norm or config.sinks,
        dense_beside_experts=config.parallel_dense,
        **_recompute_fields(recompute),
        **({} if config.latent is None else {"latent_norm_eps": config.latent.norm_eps}),
        **_expert_fields(config),
    )
    if config.out_bias and not config.qkv_bias:
        raise UnsupportedError("megatron-core cannot express an attention output bias without q, k and v biases")
    base.context_parallel_size = cp  # 0.16.1's constructor refuses DeltaNets with it, whose exchange is ours
    base.moe_shared_expert_gate = config.shared_expert_gate
    base.mtp_num_layers = None  # `GPTModel` has only a loss for these layers; see `prediction_block`
    # megatron-core's constructor refuses biases of experts that several ranks share; `ExpertOutput` has them.
    base.add_bias_linear = config.mlp_bias
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


def _expert_fields(config: ModelConfig) -> dict[str, Any]:
    """How experts run.

    Tokens are gathered on all expert ranks: of the dispatchers, that one runs on CPUs as well as on GPUs.

    Raises:
        UnsupportedError: megatron-core has no such router.
    """
    if not config.num_experts:
        return {}
    if config.experts_per_token == 1 and config.norm_topk_prob:
        raise UnsupportedError("megatron-core does not run a single expert per token whose weight is renormalised to 1")
    if config.router_score == SIGMOID and not config.norm_topk_prob:
        raise UnsupportedError("megatron-core does not run a router with sigmoids whose weights are not renormalised")
    return {
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
        "moe_grouped_gemm": False,
        **({"moe_router_bias_update_rate": 0.0} if config.expert_bias else {}),  # no gradient moves it
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
    for name, size in core_sizes(layer).items():
        setattr(sized, name, size)
    if getattr(base, "dense_beside_experts", False):
        sized.moe_shared_expert_intermediate_size = layer.ffn_hidden_size
    # Megatron counts the tokens to the left of the current one, ckptkit and Hugging Face count that one too.
    sized.window_size = None if layer.window is None else (layer.window - 1, 0)
    if layer.delta is not None:
        _set_delta_sizes(sized, layer.delta)
    return sized


def _set_delta_sizes(sized: TransformerConfig, delta: DeltaNet) -> None:
    """The sizes of a gated DeltaNet, which megatron-core has for all layers alike."""
    sized.linear_num_key_heads, sized.linear_num_value_heads = delta.key_heads, delta.value_heads
    sized.linear_key_head_dim, sized.linear_value_head_dim = delta.key_dim, delta.value_dim
    sized.linear_conv_kernel_dim = delta.kernel


def attention_config(base: TransformerConfig, model: ModelConfig, rope: Rope) -> TransformerConfig:
    """`base` for the attention, whose output bias megatron-core ties to that of the MLP."""
    own: Any = copy.copy(base)
    own.add_qkv_bias = model.qkv_bias
    own.add_bias_linear = model.out_bias
    own.attention_output_gate = model.output_gate
    if rope.kind == "yarn":
        # megatron-core derives its factor on cosines and sines from three numbers; these give any factor.
        own.yarn_rotary_scaling_factor = math.exp(10.0)
        own.yarn_mscale, own.yarn_mscale_all_dim = attention_factor(rope) - 1.0, 0.0
    return own
