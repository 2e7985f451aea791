"""A tiny Qwen3-Next of transformers, and its weights under Megatron's names, written out by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ckptkit.tables.model_config import DeltaNet, LayerConfig, ModelConfig, Rope
from tests.models import randomise

SIZES: dict[str, Any] = {
    "vocab_size": 250,
    "hidden_size": 96,
    "intermediate_size": 144,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "max_position_embeddings": 512,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 40,
    "mlp_only_layers": [1],
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
}
DELTA = DeltaNet(key_heads=4, value_heads=8, key_dim=8, value_dim=12, kernel=4)
_LAYER = LayerConfig(12, 4, 16, 144, Rope(10000.0, partial=0.25), moe=True)
CONFIG = ModelConfig(
    "qwen3_next",
    "Qwen3NextForCausalLM",
    96,
    250,
    (
        replace(_LAYER, delta=DELTA),
        replace(_LAYER, delta=DELTA, moe=False),
        _LAYER,
        replace(_LAYER, delta=DELTA),
    ),
    False,
    1e-6,
    512,
    qk_norm=True,
    output_gate=True,
    num_experts=8,
    experts_per_token=3,
    moe_ffn_hidden_size=48,
    shared_expert_size=40,
    shared_expert_gate=True,
    zero_centered_norms=True,
)
_COPIED = {
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
    "self_attn.q_norm.weight": "self_attention.q_layernorm.weight",
    "self_attn.k_norm.weight": "self_attention.k_layernorm.weight",
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "linear_attn.A_log": "self_attention.A_log",
    "linear_attn.dt_bias": "self_attention.dt_bias",
    "linear_attn.conv1d.weight": "self_attention.conv1d.weight",
    "linear_attn.out_proj.weight": "self_attention.out_proj.weight",
    "mlp.down_proj.weight": "mlp.linear_fc2.weight",
    "mlp.gate.weight": "mlp.router.weight",
    "mlp.shared_expert.down_proj.weight": "mlp.shared_experts.linear_fc2.weight",
    "mlp.shared_expert_gate.weight": "mlp.shared_experts.gate_weight",
}
_TOP = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
    "lm_head.weight": "output_layer.weight",
}


def hf_model(dtype: torch.dtype = torch.float32) -> Any:
    """A randomised model with eager attention and experts."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(0)
    model = Qwen3NextForCausalLM(Qwen3NextConfig(**SIZES))
    randomise(model)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    return model.to(dtype).eval()


def local_state(tensors: Mapping[str, torch.Tensor], *, gradients: bool = False) -> dict[str, torch.Tensor]:
    """transformers' weights under Megatron's local names, whole.

    Args:
        tensors: Names and values of transformers, experts packed.
        gradients: Whether the values are gradients, which the 1 between the two gated norms does not move.
    """
    state = {ours: tensors[theirs] for theirs, ours in _TOP.items()}
    for number, layer in enumerate(CONFIG.layers):
        own = {name.split(".", 3)[3]: value for name, value in tensors.items() if f".layers.{number}." in name}
        here = {ours: own[theirs] for theirs, ours in _COPIED.items() if theirs in own}
        if layer.delta is None:
            here["self_attention.linear_qkv.weight"] = _qkv(own)
        else:
            here["self_attention.in_proj.weight"] = _in_proj(own)
            here["self_attention.out_norm.weight"] = own["linear_attn.norm.weight"] - (0.0 if gradients else 1.0)
        for stem, ours in (("mlp", "mlp"), ("mlp.shared_expert", "mlp.shared_experts")):
            if f"{stem}.up_proj.weight" in own:
                pair = own[f"{stem}.gate_proj.weight"], own[f"{stem}.up_proj.weight"]
                here[f"{ours}.linear_fc1.weight"] = torch.cat(pair)
        for expert in range(CONFIG.num_experts if layer.moe else 0):
            prefix = f"mlp.experts.local_experts.{expert}"
            here[f"{prefix}.linear_fc1.weight"] = own["mlp.experts.gate_up_proj"][expert]
            here[f"{prefix}.linear_fc2.weight"] = own["mlp.experts.down_proj"][expert]
        state |= {f"decoder.layers.{number}.{name}": value for name, value in here.items()}
    return state


def _qkv(own: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """For each group its queries, their gates, the key and the value; transformers has a query beside its gate."""
    query, gate = own["self_attn.q_proj.weight"].view(4, 3, 2, 16, 96).unbind(2)
    key, value = (own[f"self_attn.{name}_proj.weight"].view(4, 1, 16, 96) for name in "kv")
    return torch.cat((query, gate, key, value), dim=1).reshape(-1, 96)


def _in_proj(own: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """All queries, keys, values, gates, rates and decays; transformers has those of a key head together."""
    grouped = own["linear_attn.in_proj_qkvz.weight"].view(4, 64, 96).split([8, 8, 24, 24], dim=1)
    rates = own["linear_attn.in_proj_ba.weight"].view(4, 4, 96).split([2, 2], dim=1)
    return torch.cat([part.reshape(-1, 96) for part in (*grouped, *rates)])
