"""Gemma 4 in Megatron-Bridge: one provider for models with experts, and another for dense ones.

Both have two rotary bases, and layers with a window before each one without. The dense one names the sizes of full
attention as `args` do; the other one has its own names.

Source: `Gemma4ModelProvider` and `Gemma4DenseProvider` of Megatron-Bridge 0.6.2, and what its `Gemma4Bridge` sets. Its
own run_config.yaml of a model with experts names a layer spec that its loader refuses; here it is left to the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptkit.errors import UnsupportedError
from ckptkit.families.gemma4_config import to_args
from ckptkit.tables.bridge import ACTIVATIONS, BridgeProvider, OwnAttention
from ckptkit.tables.config_fields import FULL, SLIDING
from ckptkit.tables.config_json import layer_types_of, window_of
from ckptkit.tables.model_config import ModelConfig

_MODULE = "megatron.bridge.models.gemma.gemma4_provider"
_ACTIVATION = "gelu_pytorch_tanh"


def _problem(config: ModelConfig, local_spec: bool) -> str | None:
    """A feature that neither class has, or None."""
    if config.qkv_bias:  # on all linear layers: on some, no provider has them
        return "Gemma 4 with biases"
    if config.layers[0].window is None:
        return "Gemma 4 whose first layer has no window"
    ropes = {layer.window is None: layer.rope for layer in config.layers}
    if ropes[False].kind != "default" or ropes[True].kind != "proportional":
        return "Gemma 4 with these ropes"
    return None


def _problem_with_experts(config: ModelConfig, local_spec: bool) -> str | None:
    if local_spec:
        return "Gemma 4 with experts without Transformer Engine"
    if config.per_layer_input_size or any(layer.kv_donor is not None for layer in config.layers):
        return "Gemma 4 with experts and embeddings for each layer or shared keys and values"
    if problem := _problem(config, local_spec):
        return problem
    types, period = layer_types_of(config), _windows_before(config) + 1
    if types != [FULL if number % period == 0 else SLIDING for number in range(1, config.num_layers + 1)]:
        return "Gemma 4 with experts whose layers with and without windows do not take turns in a fixed pattern"
    return None


def _windows_before(config: ModelConfig) -> int:
    """Layers with a window before the first one without; the last layer of every Gemma 4 has none."""
    return layer_types_of(config).index(FULL)


def _dense_values(config: ModelConfig) -> dict[str, Any]:
    args = to_args(config)
    if not config.per_layer_input_size:
        del args["per_layer_embed_vocab_size"]  # there is no such table
    return {
        **args,
        "qk_layernorm": False,  # its layers have these norms in any case
        "window_size": [_window(config) - 1, 0],
        "window_attn_skip_freq": [int(layer.window is not None) for layer in config.layers],
    }


def _window(config: ModelConfig) -> int:
    window = window_of(config)
    assert window is not None  # the first layer has one
    return window


def _expert_values(config: ModelConfig) -> dict[str, Any]:
    args = to_args(config)
    return {
        "rotary_base": [args["sliding_window_rope_base"], args["full_attention_rope_base"]],
        "window_size": _window(config),
        "interleaved_attn_pattern": [_windows_before(config), 1],
        "softmax_scale": config.softmax_scale,
        "attention_k_eq_v": args["attention_k_eq_v"],
        "global_head_dim": args["global_kv_channels"],
        "num_global_key_value_heads": args["num_global_query_groups"],
        "global_rotary_percent": args["full_attention_rope_partial_factor"],
        "final_logit_softcapping": args["final_logit_softcapping"],
        "moe_shared_expert_intermediate_size": config.layers[0].ffn_hidden_size,
        "moe_shared_expert_gate": False,
        "moe_shared_expert_overlap": False,
        "moe_router_pre_softmax": True,  # its router normalises what it chose by itself
        "moe_router_dtype": "fp32",
    }


_OF_ATTENTION = {
    "use_rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "rotary_seq_len_interpolation_factor": None,
    "softmax_scale": 1.0,
    "qk_layernorm": True,
}
"""Arguments of every Gemma 4; the dense provider leaves q/k norms and the scale to its layers."""


def _checked(values: Mapping[str, Any]) -> None:
    """Whether a stored provider is one of a text model with Gemma's activation.

    Raises:
        UnsupportedError: It is not.
    """
    if values.get("vision_config") is not None:
        raise UnsupportedError("the towers of a Gemma 4 in run_config.yaml", hint="give --hf-reference")
    activation = values.get("activation_func", ACTIVATIONS[_ACTIVATION])
    if activation != ACTIVATIONS[_ACTIVATION]:
        name = getattr(activation, "name", activation)
        raise UnsupportedError(f"activation {name} of Gemma 4 in run_config.yaml", hint="give --hf-reference")


def _dense_args(values: Mapping[str, Any]) -> dict[str, Any]:
    _checked(values)
    full = values.get("num_global_query_groups")
    skip = values["window_attn_skip_freq"]
    return {
        **_OF_ATTENTION,
        "rotary_base": values["full_attention_rope_base"],
        "window_size": [values["window_size"][0], 0],
        "window_attn_skip_freq": skip if isinstance(skip, int) else _last_is_full([bool(slides) for slides in skip]),
        "global_kv_channels": values["global_kv_channels"],
        "num_global_query_groups": values["num_query_groups"] if full is None else full,
        "attention_k_eq_v": values["attention_k_eq_v"],
        "sliding_window_rope_base": values["sliding_window_rope_base"],
        "full_attention_rope_base": values["full_attention_rope_base"],
        "full_attention_rope_partial_factor": values["full_attention_rope_partial_factor"],
        "num_kv_shared_layers": values["num_kv_shared_layers"],
        "use_double_wide_mlp": values["use_double_wide_mlp"],
        "per_layer_embed_vocab_size": values.get("per_layer_embed_vocab_size", 0),
        "per_layer_embed_dim": values["per_layer_embed_dim"],
        "final_logit_softcapping": values["final_logit_softcapping"],
    }


def _expert_args(values: Mapping[str, Any]) -> dict[str, Any]:
    _checked(values)
    (local, whole), period = values["rotary_base"], sum(values["interleaved_attn_pattern"])
    full = values.get("num_global_key_value_heads")
    slides = [number % period != 0 for number in range(1, values["num_layers"] + 1)]
    return {
        **_OF_ATTENTION,
        "rotary_base": whole,
        "window_size": [values["window_size"] - 1, 0],
        "window_attn_skip_freq": _last_is_full(slides),
        "ffn_hidden_size": values["moe_shared_expert_intermediate_size"],
        "moe_shared_expert_intermediate_size": values["moe_shared_expert_intermediate_size"],
        "moe_router_pre_softmax": False,
        "global_kv_channels": values["global_head_dim"],
        "num_global_query_groups": values["num_query_groups"] if full is None else full,
        "attention_k_eq_v": values["attention_k_eq_v"],
        "sliding_window_rope_base": local,
        "full_attention_rope_base": whole,
        "full_attention_rope_partial_factor": values["global_rotary_percent"],
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        "per_layer_embed_vocab_size": 0,
        "per_layer_embed_dim": 0,
        "final_logit_softcapping": values["final_logit_softcapping"],
    }


def _last_is_full(slides: list[bool]) -> list[int]:
    """1 for each layer with a window; Hugging Face gives the last layer none, whatever the pattern."""
    return [*map(int, slides[:-1]), 0]


GEMMA4_BRIDGE = BridgeProvider(
    f"{_MODULE}.Gemma4ModelProvider",
    activation=_ACTIVATION,
    attention=OwnAttention("global_head_dim", _problem_with_experts, _expert_values, _expert_args),
    when=lambda config: bool(config.num_experts),
    other=BridgeProvider(
        f"{_MODULE}.Gemma4DenseProvider",
        activation=_ACTIVATION,
        attention=OwnAttention("per_layer_embed_dim", _problem, _dense_values, _dense_args),
    ),
)
