"""megatron-core's `TransformerConfig` from `ModelConfig` and `Parallelism`, for a model and for one of its layers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ckptkit.errors import UnsupportedError, UsageError
from ckptkit.families.config import LayerConfig, ModelConfig
from ckptkit.sharding.grid import Parallelism

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
}


def transformer_config(
    config: ModelConfig,
    grid: Parallelism,
    *,
    dtype: torch.dtype,
    device: torch.device,
    sequence_parallel: bool = False,
) -> TransformerConfig:
    """The model-wide `TransformerConfig`; its per-layer sizes are those of the first layer.

    Fusions are off because they need CUDA extensions, dropout is off, and no parameter is initialised: every one is
    loaded.

    Args:
        config: The model.
        grid: The parallel grid.
        dtype: Dtype of parameters and activations.
        device: Where the parameters live.
        sequence_parallel: Split the sequence over tensor parallel ranks outside of the linears.

    Raises:
        UnsupportedError: megatron-core has no such activation, or cannot express the biases.
    """
    from megatron.core.transformer.transformer_config import TransformerConfig

    first = config.layers[0]
    base = TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=first.num_heads,
        num_query_groups=first.num_kv_heads,
        kv_channels=first.head_dim,
        ffn_hidden_size=first.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_eps,
        qk_layernorm=config.qk_norm,
        add_bias_linear=config.mlp_bias,
        add_qkv_bias=config.qkv_bias,
        gated_linear_unit=config.gated,
        activation_func=activation(config.activation),
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
    )
    if config.out_bias and not config.qkv_bias:
        raise UnsupportedError("megatron-core cannot express an attention output bias without q, k and v biases")
    return base


def layer_config(base: TransformerConfig, layer: LayerConfig) -> TransformerConfig:
    """`base` with the sizes and the attention window of one layer."""
    sized = copy.copy(base)
    sized.num_attention_heads = layer.num_heads
    sized.num_query_groups = layer.num_kv_heads
    sized.kv_channels = layer.head_dim
    sized.ffn_hidden_size = layer.ffn_hidden_size
    # Megatron counts the tokens to the left of the current one, ckptkit and Hugging Face count that one too.
    sized.window_size = None if layer.window is None else (layer.window - 1, 0)
    return sized


def attention_config(base: TransformerConfig, qkv_bias: bool, out_bias: bool) -> TransformerConfig:
    """`base` for the attention, whose output bias megatron-core ties to that of the MLP."""
    own = copy.copy(base)
    own.add_qkv_bias = qkv_bias
    own.add_bias_linear = out_bias
    return own


def activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function that Hugging Face calls `name`.

    Raises:
        UnsupportedError: It is not one that the runtime knows.
    """
    if name not in ACTIVATIONS:
        raise UnsupportedError(f"activation {name!r} is not in the runtime", hint=f"known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def check_grid(config: ModelConfig, tp: int, padded_vocab_size: int) -> None:
    """Refuse a tensor parallel size that megatron-core cannot build, with the size to blame.

    Raises:
        UsageError: Heads, query groups, MLP width or vocabulary do not divide.
    """
    for number, layer in enumerate(config.layers):
        sizes = {"num_attention_heads": layer.num_heads, "ffn_hidden_size": layer.ffn_hidden_size}
        for name, size in sizes.items():
            if size % tp:
                raise UsageError(f"{name} {size} of layer {number} does not divide over --tp {tp}")
        if layer.num_kv_heads % tp and tp % layer.num_kv_heads:
            raise UsageError(
                f"--tp {tp} and {layer.num_kv_heads} query groups of layer {number} do not divide one another",
                hint="choose a tensor parallel size that divides the number of key/value heads, or is a multiple of it",
            )
    if padded_vocab_size % tp:
        raise UsageError(f"padded vocabulary {padded_vocab_size} does not divide over --tp {tp}")
