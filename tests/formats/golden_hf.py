"""The golden models of `megatron_ranks` as Hugging Face checkpoints: fused tensors are taken apart with torch alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tests.formats.megatron_ranks import (
    EXPERT_FFN,
    EXPERTS,
    FFN,
    GROUPS,
    HEADS,
    HIDDEN,
    LAYERS,
    VOCAB,
    WIDTH,
    is_gpt_oss,
    is_moe,
    is_tied,
    weights,
)

_NAMES = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.router.weight": "mlp.gate.weight",
}
_NAMES_OF_GPT_OSS = {
    **_NAMES,
    "self_attention.linear_proj.bias": "self_attn.o_proj.bias",
    "self_attention.core_attention.softmax_offset": "self_attn.sinks",
    "mlp.router.weight": "mlp.router.weight",
    "mlp.router.bias": "mlp.router.bias",
}


def config_json(model: str, dtype: str = "float32") -> dict[str, Any]:
    """config.json of `gpt_oss`, or of a model whose name starts with `qwen3`."""
    if is_gpt_oss(model):
        return _gpt_oss_config(dtype)
    moe = is_moe(model, 0)
    experts = {
        "num_experts": EXPERTS,
        "moe_intermediate_size": EXPERT_FFN,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    }
    return {
        "architectures": ["Qwen3MoeForCausalLM" if moe else "Qwen3ForCausalLM"],
        "model_type": "qwen3_moe" if moe else "qwen3",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": WIDTH,
        "max_position_embeddings": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": is_tied(model),
        "torch_dtype": dtype,
        **(experts if moe else {}),
    }


def _gpt_oss_config(dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": EXPERT_FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": WIDTH,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }


def hf_weights(model: str, dtype: str = "float32") -> dict[str, Any]:
    """Hugging Face name -> values of every tensor."""
    found: dict[str, Any] = _experts_of_gpt_oss(dtype) if is_gpt_oss(model) else {}
    names = _NAMES_OF_GPT_OSS if is_gpt_oss(model) else _NAMES
    for name, values in weights(model, dtype).items():
        if is_gpt_oss(model) and ".experts." in name:
            continue
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
        prefix, rest = (f"model.layers.{match[1]}.", match[2]) if match else ("", name)
        found.update({prefix + key: part.contiguous() for key, part in _parts(rest, values, names)})
    return found


def _experts_of_gpt_oss(dtype: str) -> dict[str, Any]:
    """One tensor for all experts of a layer: weights [expert, in, out], outputs of gate and up in turns."""
    import torch

    whole, found = weights("gpt_oss", dtype), {}
    for layer in range(LAYERS):
        for number, name in ((1, "gate_up_proj"), (2, "down_proj")):
            for kind, ending in (("weight", ""), ("bias", "_bias")):
                stem = f"decoder.layers.{layer}.mlp.experts.linear_fc{number}.{kind}"
                stacked = torch.stack([whole[f"{stem}{expert}"] for expert in range(EXPERTS)])
                if number == 1:
                    stacked = stacked.unflatten(1, (2, EXPERT_FFN)).transpose(1, 2).flatten(1, 2)
                values = stacked.transpose(1, 2) if kind == "weight" else stacked
                found[f"model.layers.{layer}.mlp.experts.{name}{ending}"] = values.contiguous()
    return found


def _parts(name: str, values: Any, names: dict[str, str]) -> list[tuple[str, Any]]:
    if name == "self_attention.linear_qkv.weight":
        groups = values.view(GROUPS, HEADS // GROUPS + 2, WIDTH, HIDDEN)
        parts = (groups[:, :-2], groups[:, -2], groups[:, -1])
        return [
            (f"self_attn.{kind}_proj.weight", part.reshape(-1, HIDDEN)) for kind, part in zip("qkv", parts, strict=True)
        ]
    if name == "self_attention.linear_qkv.bias":
        groups = values.view(GROUPS, HEADS // GROUPS + 2, WIDTH)
        parts = (groups[:, :-2], groups[:, -2], groups[:, -1])
        return [(f"self_attn.{kind}_proj.bias", part.reshape(-1)) for kind, part in zip("qkv", parts, strict=True)]
    if name == "mlp.linear_fc1.weight":
        gate, up = values.chunk(2)
        return [("mlp.gate_proj.weight", gate), ("mlp.up_proj.weight", up)]
    if expert := re.fullmatch(r"mlp\.experts\.linear_fc([12])\.weight(\d+)", name):
        kinds = ("gate_proj", "up_proj") if expert[1] == "1" else ("down_proj",)
        parts = values.chunk(len(kinds))
        return [(f"mlp.experts.{expert[2]}.{kind}.weight", part) for kind, part in zip(kinds, parts, strict=True)]
    return [(names[name], values)]


def save_hf(folder: Path, model: str, dtype: str = "float32") -> Path:
    """Writes a model as a Hugging Face directory."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_json(model, dtype), indent=2) + "\n")
    save_file(hf_weights(model, dtype), folder / "model.safetensors", metadata={"format": "pt"})
    return folder
