"""Tiny Gemma 4 text models of the four released shapes, and their weights as one rank of Megatron holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ckptkit.tables.model_config import ModelConfig

S, F = "sliding_attention", "full_attention"
_COMMON: dict[str, Any] = {
    "vocab_size": 250,
    "vocab_size_per_layer_input": 252,
    "hidden_size": 96,
    "intermediate_size": 144,
    "num_attention_heads": 8,
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": 12,
    "max_position_embeddings": 256,
    "final_logit_softcapping": 30.0,
    "hidden_size_per_layer_input": 0,
    "pad_token_id": None,
}
_LARGE = {
    **_COMMON,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "num_global_key_value_heads": 2,
    "attention_k_eq_v": True,
    "layer_types": [S, F, S, F],
}
_SMALL = {**_COMMON, "hidden_size_per_layer_input": 12, "num_hidden_layers": 8}

KINDS: dict[str, dict[str, Any]] = {
    "31B": _LARGE,
    "26B": {
        **_LARGE,
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
    },
    "E2B": {
        **_SMALL,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 4,
        "use_double_wide_mlp": True,
        "layer_types": [S, S, F, S, S, S, S, F],
    },
    "E4B": {
        **_SMALL,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 3,
        "layer_types": [S, S, F, S, F, S, S, F],
    },
}


def hf_model(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A randomised model of a kind, in evaluation mode, whose logits before the cap reach 20 to 40."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    torch.manual_seed(0)
    config = Gemma4TextConfig(**{**KINDS[kind], **changes})
    config._attn_implementation = config._experts_implementation = "eager"
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as `from_pretrained` does: the scales of the embeddings are rounded to it
    try:
        model = Gemma4ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    randomise(model)
    return model.eval()


def randomise(model: Any) -> None:
    """Fills every parameter and layer scalar: what transformers leaves at one hides mistakes."""
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("layer_scalar"):
                value.uniform_(0.6, 1.4)
            elif name.endswith(("router.scale", "per_expert_scale")):
                value.uniform_(0.5, 2.0)
            elif "norm" in name:
                # Outputs of layers as large as the embeddings, so that each of them counts.
                value.uniform_(*(2.0, 6.0) if "post_" in name else (0.5, 1.5))
            elif name in dict(model.named_parameters()):
                value.normal_(0.0, 0.5 if "embed" in name else value.shape[-1] ** -0.5)
            if name.endswith(("per_layer_projection.weight", "experts.down_proj")):
                # A norm follows, which hides a factor on all of its input as long as its epsilon is small beside it.
                value.mul_(0.01)


_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attn.q_norm.weight": "self_attention.q_layernorm.weight",
    "self_attn.k_norm.weight": "self_attention.k_layernorm.weight",
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "layer_scalar": "layer_scalar",
    "per_layer_input_gate.weight": "per_layer_input_gate.weight",
    "per_layer_projection.weight": "per_layer_projection.weight",
    "post_per_layer_input_norm.weight": "post_per_layer_input_norm.weight",
}
_DENSE = {
    "post_attention_layernorm.weight": "post_self_attn_layernorm.weight",
    "pre_feedforward_layernorm.weight": "pre_mlp_layernorm.weight",
    "post_feedforward_layernorm.weight": "post_mlp_layernorm.weight",
    "mlp.down_proj.weight": "mlp.linear_fc2.weight",
}
_MOE = {
    "post_attention_layernorm.weight": "self_attention.linear_proj.post_layernorm.weight",
    "pre_feedforward_layernorm.weight": "pre_shared_expert_layernorm.weight",
    "pre_feedforward_layernorm_2.weight": "pre_mlp_layernorm.weight",
    "post_feedforward_layernorm_1.weight": "mlp.post_shared_expert_layernorm.weight",
    "post_feedforward_layernorm_2.weight": "mlp.post_moe_layernorm.weight",
    "post_feedforward_layernorm.weight": "post_ffn_layernorm.weight",
    "mlp.down_proj.weight": "mlp.shared_experts.linear_fc2.weight",
    "router.proj.weight": "mlp.router.weight",
    "router.scale": "mlp.router.scale",
    "router.per_expert_scale": "mlp.router.per_expert_scale",
}
_TOP = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
    "model.embed_tokens_per_layer.weight": "per_layer_embedding.weight",
    "model.per_layer_model_projection.weight": "per_layer_model_proj.weight",
    "model.per_layer_projection_norm.weight": "per_layer_proj_norm.weight",
}


def local_state(tensors: Mapping[str, torch.Tensor], config: ModelConfig, dead: float = 7.0) -> dict[str, torch.Tensor]:
    """transformers' weights (or their gradients) under Megatron's local names, whole.

    Written out by hand, independent of the family table.

    Args:
        tensors: Names and values of transformers.
        config: The model.
        dead: What fills slots that nothing reads.
    """
    state = {ours: tensors[theirs] for theirs, ours in _TOP.items() if theirs in tensors}
    for number, layer in enumerate(config.layers):
        own = {name.split(".", 3)[3]: value for name, value in tensors.items() if f".layers.{number}." in name}
        names = {**_LAYER, **(_MOE if layer.moe else _DENSE)}
        here = {ours: own[theirs] for theirs, ours in names.items() if theirs in own}
        dense = "mlp.shared_experts" if layer.moe else "mlp"
        here[f"{dense}.linear_fc1.weight"] = torch.cat((own["mlp.gate_proj.weight"], own["mlp.up_proj.weight"]))
        here["self_attention.linear_qkv.weight"] = _fused(own, layer.num_kv_heads, layer.head_dim, dead)
        for expert in range(config.num_experts if layer.moe else 0):
            prefix = f"mlp.experts.local_experts.{expert}"
            here[f"{prefix}.linear_fc1.weight"] = own["experts.gate_up_proj"][expert]
            here[f"{prefix}.linear_fc2.weight"] = own["experts.down_proj"][expert]
        # Layers that attend to another one's keys have slots that nothing reads.
        here.setdefault("self_attention.k_layernorm.weight", torch.full((layer.head_dim,), dead))
        state |= {f"decoder.layers.{number}.{name}": value for name, value in here.items()}
    return state


def _fused(own: dict[str, torch.Tensor], groups: int, head_dim: int, dead: float) -> torch.Tensor:
    """Queries, key and value of each group."""
    query = own["self_attn.q_proj.weight"]
    unread = torch.full((groups * head_dim, query.size(1)), dead, dtype=query.dtype)
    key = own.get("self_attn.k_proj.weight", unread)
    value = own.get("self_attn.v_proj.weight", unread)
    parts = zip(query.chunk(groups), key.chunk(groups), value.chunk(groups), strict=True)
    return torch.cat([torch.cat(part) for part in parts])
