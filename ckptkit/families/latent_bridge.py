"""Latent attention as Megatron-Bridge's `MLAModelProvider` has it, and what its bridges set for scored experts.

Source: `DeepSeekV3Bridge`, `GLM45Bridge` and `GLM47FlashBridge` of Megatron-Bridge 0.6.2; `MLATransformerConfig` of
megatron-core 0.19.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptkit.errors import UnsupportedError
from ckptkit.tables.bridge import MLA_PROVIDER, BridgeProvider, OwnAttention
from ckptkit.tables.model_config import ModelConfig

_YARN = {"original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
"""Numbers of a yarn rope that Megatron-LM has no argument for -> what it takes."""


def _problem(config: ModelConfig, local: bool) -> str | None:
    ropes = {layer.rope for layer in config.layers}
    kind = next(iter(ropes)).kind
    if len(ropes) > 1 or kind not in ("default", "yarn"):
        return f"latent attention with {'several ropes' if len(ropes) > 1 else f'a {kind} rope'}"
    if kind == "yarn" and config.layers[0].rope.attention_factor is not None:
        return "latent attention with this yarn rope"
    return None


def _values(config: ModelConfig) -> dict[str, Any]:
    rope = config.layers[0].rope
    found: dict[str, Any] = {"rotary_base": rope.theta, "position_embedding_type": "rope"}
    if rope.kind == "yarn":
        found |= {
            "original_max_position_embeddings": rope.original_max_position,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
        }
    return found


def _args(values: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron-LM's arguments; its bridges make of a plain rope a yarn with a factor of 1."""
    if values.get("rope_type", "yarn") != "yarn" or values.get("rotary_scaling_factor", 40) == 1:
        return {"rope_type": "rope", "rotary_scaling_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
    for name, usual in _YARN.items():
        if values.get(name, usual) != usual:
            raise UnsupportedError(f"a yarn rope with {name} {values[name]!r} has no argument in Megatron-LM")
    return {}


EXPERTS = {
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_shared_expert_overlap": True,
}
"""What the bridges of all three families set for training."""
GLM_EXPERTS = {**EXPERTS, "moe_router_bias_update_rate": 0.0, "mtp_loss_scaling_factor": 0.3}

_ATTENTION = OwnAttention("kv_lora_rank", _problem, _values, _args)
DEEPSEEK_BRIDGE = BridgeProvider(
    MLA_PROVIDER, attention=_ATTENTION, with_experts={**EXPERTS, "moe_aux_loss_coeff": 1e-4}, blocks=True
)
GLM_LITE_BRIDGE = BridgeProvider(MLA_PROVIDER, attention=_ATTENTION, with_experts=GLM_EXPERTS, blocks=True)
