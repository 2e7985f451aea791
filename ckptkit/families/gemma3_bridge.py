"""Gemma 3 in Megatron-Bridge: a provider with two rotary bases, and local and global layers that take turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptkit.errors import UnsupportedError
from ckptkit.tables.bridge import ACTIVATIONS, BridgeProvider, OwnAttention
from ckptkit.tables.model_config import ModelConfig, Rope

_ACTIVATION = "gelu_pytorch_tanh"
_LOCAL_BASE, _GLOBAL_BASE = 10000, 1000000.0
"""Class defaults of the two rotary bases; `args` have no word for that of the local layers."""


def _problem(config: ModelConfig, local_spec: bool) -> str | None:
    if local_spec:
        return "Gemma 3 without Transformer Engine"
    if config.logit_softcap is not None or config.attention_softcap is not None:
        return "Gemma 3 with capped logits"
    if _local_per_global(config) is None:
        return "Gemma 3 whose local and global layers do not take turns in a fixed pattern"
    ropes = _ropes(config)
    if ropes.get(False, Rope(1.0)).kind != "default" or ropes.get(True, Rope(1.0)).kind not in ("default", "linear"):
        return "Gemma 3 with these ropes"
    return None


def _ropes(config: ModelConfig) -> dict[bool, Rope]:
    """Whether a layer is global -> its rotary embedding."""
    return {layer.window is None: layer.rope for layer in config.layers}


def _local_per_global(config: ModelConfig) -> int | None:
    """Local layers before each global one, or None without such a pattern. Without a global layer, all of them."""
    glob = [number for number, layer in enumerate(config.layers) if layer.window is None]
    period = glob[0] + 1 if glob else config.num_layers + 1
    expected = list(range(period - 1, config.num_layers, period))
    return period - 1 if glob == expected and period > 1 else None


def _values(config: ModelConfig) -> dict[str, Any]:
    ropes, layer = _ropes(config), config.layers[0]
    whole = ropes.get(True, Rope(_GLOBAL_BASE))
    return {
        "rotary_base": [ropes[False].theta, whole.theta],
        "rope_scaling_factor": whole.factor,
        "window_size": layer.window,
        "interleaved_attn_pattern": [_local_per_global(config), 1],
        "softmax_scale": layer.head_dim**-0.5 if config.softmax_scale is None else config.softmax_scale,
    }


def _args(values: Mapping[str, Any]) -> dict[str, Any]:
    local, whole = values["rotary_base"]
    if local != _LOCAL_BASE:
        raise UnsupportedError(f"local rotary base {local} in run_config.yaml", hint="give --hf-reference")
    activation = values.get("activation_func", ACTIVATIONS[_ACTIVATION])
    if activation != ACTIVATIONS[_ACTIVATION]:
        name = getattr(activation, "name", activation)
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


GEMMA3_BRIDGE = BridgeProvider(
    "megatron.bridge.models.gemma.gemma3_provider.Gemma3ModelProvider",
    activation=_ACTIVATION,
    attention=OwnAttention("interleaved_attn_pattern", _problem, _values, _args, lacks="global_head_dim"),
)
