"""Megatron-Bridge's model providers, the dataclasses that its checkpoints name: from a `ModelConfig`, and to `args`.

A provider is a Transformer config of Megatron-Core and what its model's constructor asks for besides. The class and
the values are those that the bridge of the family makes of config.json in Megatron-Bridge 0.6.2; what it leaves at a
default is left out here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckptkit.errors import InputError, UnsupportedError
from ckptkit.megatron_args.known import NEUTRAL, NEUTRAL_OF_EXPERTS, WRITTEN
from ckptkit.sharding.grid import Parallelism
from ckptkit.tables.model_config import ModelConfig, Rope

VERSION = "0.6.2"
_GPT = "megatron.bridge.models.gpt_provider.GPTModelProvider"
_MISTRAL = "megatron.bridge.models.mistral.mistral_provider.MistralModelProvider"
_GEMMA3 = "megatron.bridge.models.gemma.gemma3_provider.Gemma3ModelProvider"
_LOCAL_SPEC = "megatron.bridge.models.gpt_provider.local_layer_spec"
_PROVIDERS = {
    "llama": _GPT,
    "qwen2": _GPT,
    "qwen3": _GPT,
    "qwen3_moe": _GPT,
    "mistral": _MISTRAL,
    "gemma3_text": _GEMMA3,
}
_SILU, _FAST_GELU = "torch.nn.functional.silu", "megatron.core.activations.fast_gelu"


@dataclass(frozen=True)
class Named:
    """A value that is a Python object: its dotted name."""

    name: str


@dataclass(frozen=True)
class Provider:
    """What Megatron-Bridge builds a model from.

    Attributes:
        target: Dotted name of the class.
        values: Field -> value of a plain type, or `Named`.
    """

    target: str
    values: dict[str, Any]


def provider_of(config: ModelConfig, grid: Parallelism, divisible_by: int, *, local: bool, grouped: bool) -> Provider:
    """The provider of a model on a grid.

    Args:
        config: The model; `dtype` is that of the stored parameters.
        grid: The parallel grid of the checkpoint.
        divisible_by: `make_vocab_size_divisible_by`.
        local: Whether layers are those of the local spec, without Transformer Engine.
        grouped: Whether experts are one module for all.

    Raises:
        UnsupportedError: Megatron-Bridge has no provider that builds this model.
    """
    target = _PROVIDERS.get(config.family)
    if target is None:
        raise UnsupportedError(f"none of Megatron-Bridge {VERSION}'s providers is known here for {config.architecture}")
    if problem := _problem(config, target, local):
        raise UnsupportedError(f"Megatron-Bridge {VERSION} has no {problem}")
    spec = {"transformer_layer_spec": Named(_LOCAL_SPEC)} if local else {}
    return Provider(
        target,
        {
            **_sizes(config),
            **_features(config),
            **(_gemma3(config) if target == _GEMMA3 else _rope(config.layers[0].rope)),
            **({} if target == _GEMMA3 else _windows(config, target)),
            **_experts(config, grouped),
            **_grid(grid),
            **_vocabulary(config, grid, divisible_by),
            **_dtype(config),
            **spec,
        },
    )


def _problem(config: ModelConfig, target: str, local: bool) -> str | None:
    """What of a model a provider cannot build."""
    rope, biases = config.layers[0].rope, (config.qkv_bias, config.out_bias, config.mlp_bias)
    if biases not in ((False, False, False), (True, False, False), (True, True, True)):
        return "model with biases on some linear layers only"
    if config.value_head:
        return "value heads for this class"
    if len({layer.moe for layer in config.layers}) > 1:
        return "provider with experts on some layers only"
    if target == _GEMMA3:
        return _gemma3_problem(config, local)
    if config.activation != "silu":
        return f"{config.architecture} with {config.activation}"
    if rope.kind == "yarn" and (target == _MISTRAL or rope.attention_factor is not None):
        return f"{config.architecture} with this yarn rope"
    if rope.kind not in ("default", "linear", "llama3", "yarn"):
        return f"{rope.kind} rope"
    return None


def _gemma3_problem(config: ModelConfig, local: bool) -> str | None:
    if local:
        return "Gemma 3 without Transformer Engine"
    if config.logit_softcap is not None or config.attention_softcap is not None:
        return "Gemma 3 with capped logits"
    if config.activation != "gelu_pytorch_tanh":
        return f"Gemma 3 with {config.activation}"
    if _local_per_global(config) is None:
        return "Gemma 3 whose local and global layers do not take turns in a fixed pattern"
    ropes = {layer.window is None: layer.rope for layer in config.layers}
    if ropes.get(False, Rope(1.0)).kind != "default" or ropes.get(True, Rope(1.0)).kind not in ("default", "linear"):
        return "Gemma 3 with these ropes"
    return None


def _local_per_global(config: ModelConfig) -> int | None:
    """Local layers before each global one; None if they do not lie so. Without a global layer, all of them."""
    glob = [number for number, layer in enumerate(config.layers) if layer.window is None]
    period = glob[0] + 1 if glob else config.num_layers + 1
    expected = list(range(period - 1, config.num_layers, period))
    return period - 1 if glob == expected and period > 1 else None


def _sizes(config: ModelConfig) -> dict[str, Any]:
    layer = config.layers[0]
    return {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": layer.ffn_hidden_size,
        "num_attention_heads": layer.num_heads,
        "num_query_groups": layer.num_kv_heads,
        "kv_channels": layer.head_dim,
        "seq_length": config.max_position_embeddings,
    }


def _features(config: ModelConfig) -> dict[str, Any]:
    return {
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.norm_eps,
        "layernorm_zero_centered_gamma": config.zero_centered_norms,
        "qk_layernorm": config.qk_norm,
        "add_bias_linear": config.mlp_bias,
        "add_qkv_bias": config.qkv_bias,
        "gated_linear_unit": config.gated,
        "activation_func": Named(_FAST_GELU if config.activation == "gelu_pytorch_tanh" else _SILU),
        "share_embeddings_and_output_weights": config.tied,
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": config.init_std,
    }


def _rope(rope: Rope) -> dict[str, Any]:
    found: dict[str, Any] = {"rotary_base": rope.theta}
    if rope.kind == "linear":
        found["seq_len_interpolation_factor"] = rope.factor
    if rope.kind == "llama3":
        found.update(rope_scaling=True, rope_scaling_factor=rope.factor)
    if rope.kind == "yarn":
        found.update(
            position_embedding_type="yarn",
            yarn_rotary_scaling_factor=rope.factor,
            yarn_original_max_position_embeddings=rope.original_max_position,
            yarn_beta_fast=rope.beta_fast,
            yarn_beta_slow=rope.beta_slow,
            yarn_mscale=rope.mscale,
            yarn_mscale_all_dim=rope.mscale_all_dim,
            yarn_correction_range_round_to_int=rope.truncate,
        )
    return found


def _windows(config: ModelConfig, target: str) -> dict[str, Any]:
    windows = [layer.window for layer in config.layers]
    window = next((window for window in windows if window is not None), None)
    if window is None:
        return {}
    found: dict[str, Any] = {"window_size": [window - 1, 0]}
    if target == _MISTRAL:
        found["cp_comm_type"] = "a2a"
    if None in windows:
        found["window_attn_skip_freq"] = [int(window is not None) for window in windows]
    return found


def _gemma3(config: ModelConfig) -> dict[str, Any]:
    ropes = {layer.window is None: layer.rope for layer in config.layers}
    layer, local = config.layers[0], _local_per_global(config)
    whole = ropes.get(True, Rope(1000000.0))
    return {
        "rotary_base": [ropes[False].theta, whole.theta],
        "rope_scaling_factor": whole.factor,
        "window_size": layer.window,
        "interleaved_attn_pattern": [local, 1],
        "softmax_scale": layer.head_dim**-0.5 if config.softmax_scale is None else config.softmax_scale,
    }


def _experts(config: ModelConfig, grouped: bool) -> dict[str, Any]:
    if not config.num_experts:
        return {}
    return {
        "num_moe_experts": config.num_experts,
        "moe_ffn_hidden_size": config.moe_ffn_hidden_size,
        "moe_router_topk": config.experts_per_token,
        "moe_router_pre_softmax": not config.norm_topk_prob,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 1e-3,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": grouped,
        "moe_permute_fusion": grouped,
    }


def _grid(grid: Parallelism) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": grid.tp,
        "pipeline_model_parallel_size": grid.pp,
        "virtual_pipeline_model_parallel_size": grid.vpp if grid.vpp > 1 else None,
        "num_layers_in_first_pipeline_stage": grid.first_stage_layers,
        "num_layers_in_last_pipeline_stage": grid.last_stage_layers,
        "account_for_embedding_in_pipeline_split": grid.embedding_in_split,
        "account_for_loss_in_pipeline_split": grid.loss_in_split,
        "expert_model_parallel_size": grid.ep,
        "expert_tensor_parallel_size": grid.etp,
    }


def _vocabulary(config: ModelConfig, grid: Parallelism, divisible_by: int) -> dict[str, Any]:
    """Padding, which Megatron-Bridge exports as part of the model, is asked for only where ranks need it."""
    return {
        "vocab_size": config.vocab_size,
        "make_vocab_size_divisible_by": divisible_by,
        "should_pad_vocab": config.vocab_size % grid.tp != 0,
    }


def _dtype(config: ModelConfig) -> dict[str, Any]:
    dtype = config.dtype or "float32"
    name = Named(f"torch.{dtype}")
    return {
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "params_dtype": name,
        "pipeline_dtype": name,
        "autocast_dtype": name,
    }


_SAME = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "seq_length",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "rotary_base",
    "softmax_scale",
    "window_size",
    "window_attn_skip_freq",
    "init_method_std",
    "bf16",
    "fp16",
    "moe_layer_freq",
    "moe_ffn_hidden_size",
    "moe_router_topk",
    "moe_router_pre_softmax",
    "vocab_size",
    "make_vocab_size_divisible_by",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "yarn_original_max_position_embeddings",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_correction_range_round_to_int",
    *(name for name in WRITTEN if name != "swiglu"),
    *NEUTRAL,
    *NEUTRAL_OF_EXPERTS,
)
_RENAMED = {
    "seq_length": "max_position_embeddings",
    "layernorm_epsilon": "norm_epsilon",
    "layernorm_zero_centered_gamma": "apply_layernorm_1p",
    "rope_scaling": "use_rope_scaling",
    "rope_scaling_factor": "rope_scaling_factor",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
    "yarn_rotary_scaling_factor": "rotary_scaling_factor",
    "yarn_mscale": "mscale",
    "yarn_mscale_all_dim": "mscale_all_dim",
    "num_moe_experts": "num_experts",
    "num_layers_in_first_pipeline_stage": "decoder_first_pipeline_num_layers",
    "num_layers_in_last_pipeline_stage": "decoder_last_pipeline_num_layers",
}
"""Field of a provider -> argument of Megatron-LM with the same meaning."""


def args_of_provider(provider: Provider) -> dict[str, Any]:
    """What Megatron-LM's `args` would say of the model that a provider builds.

    Raises:
        InputError: A value makes no sense.
        UnsupportedError: `args` cannot say it.
    """
    values = provider.values
    args = {key: values[key] for key in _SAME if key in values}
    args.update({new: values[old] for old, new in _RENAMED.items() if old in values})
    try:
        if "num_query_groups" in values:
            groups = values["num_query_groups"] or values["num_attention_heads"]
            args.update(num_query_groups=groups, group_query_attention=groups != values["num_attention_heads"])
        if "share_embeddings_and_output_weights" in values:
            args["untie_embeddings_and_output_weights"] = not values["share_embeddings_and_output_weights"]
        if "gated_linear_unit" in values and "activation_func" in values:
            args["swiglu"] = bool(values["gated_linear_unit"]) and values["activation_func"] == Named(_SILU)
        if provider.target == _GEMMA3 or "interleaved_attn_pattern" in values:
            args.update(_gemma3_args(values))
    except (TypeError, ValueError, KeyError, ZeroDivisionError) as error:
        raise InputError(f"the model section of run_config.yaml makes no sense ({error!r})") from None
    return args


def _gemma3_args(values: Mapping[str, Any]) -> dict[str, Any]:
    local, whole = values["rotary_base"]
    if local != 10000:
        raise UnsupportedError(f"local rotary base {local} in run_config.yaml", hint="give --hf-reference")
    if values.get("activation_func", Named(_FAST_GELU)) != Named(_FAST_GELU):
        name = getattr(values["activation_func"], "name", values["activation_func"])
        raise UnsupportedError(f"activation {name} of Gemma 3 in run_config.yaml", hint="give --hf-reference")
    pattern, factor = sum(values["interleaved_attn_pattern"]), values.get("rope_scaling_factor", 1.0)
    return {
        "rotary_base": whole,
        "rotary_seq_len_interpolation_factor": factor if factor != 1 else None,
        "use_rope_scaling": False,
        "rope_scaling_factor": 8.0,
        "window_size": [values["window_size"] - 1, 0],
        "window_attn_skip_freq": [int((number + 1) % pattern != 0) for number in range(values["num_layers"])],
    }
