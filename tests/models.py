"""Tiny Hugging Face models, everything randomised, as the tests need them."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

LLAMAS: dict[str, dict[str, Any]] = {
    "gqa": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "mha": {"num_key_value_heads": 12, "head_dim": 16},
    "tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "biased": {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    "llama3": {
        "num_key_value_heads": 4,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
}


def llama_config(kind: str = "gqa", **changes: Any) -> Any:
    """A tiny Llama config: 12 heads of width 8, so that it splits over 1, 2, 3 and 4 ranks."""
    from transformers import LlamaConfig

    values: dict[str, Any] = {
        "vocab_size": 250,
        "hidden_size": 96,
        "intermediate_size": 144,
        "num_hidden_layers": 4,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        **LLAMAS[kind],
        **changes,
    }
    return LlamaConfig(**values)


def save_llama(path: Path, kind: str = "gqa", *, dtype: str = "float32", shard: str = "50GB", **changes: Any) -> Path:
    """Saves a randomised tiny Llama with a tokenizer-like small file, and returns its directory."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(kind, **changes))
    randomise(model)
    model.to(getattr(torch, dtype)).save_pretrained(path, max_shard_size=shard)
    (path / "tokenizer").mkdir()
    (path / "tokenizer" / "notes.txt").write_text("a small file in a folder\n", encoding="utf-8")
    return path


_TINY: dict[str, Any] = {
    "vocab_size": 250,
    "hidden_size": 96,
    "intermediate_size": 144,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}
_EXPERTS = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
_SCORED = {
    "moe_intermediate_size": 48,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
_LATENT = {
    "num_key_value_heads": 12,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    },
}
_DELTA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 12,
    "rms_norm_eps": 1e-3,  # heads as small as these read next to nothing at times; less would make its rounding large
}
_SHARED = {**_EXPERTS, "head_dim": 16, "shared_expert_intermediate_size": 48}
_GPT_OSS: dict[str, Any] = {
    "intermediate_size": 96,  # as large as the hidden size, as in released models: shapes tell nothing
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 16,
    "swiglu_limit": 1.0,  # in a model of this size a limit of 7 is never reached
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}
_MIXED = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
_GEMMA3: dict[str, Any] = {
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 16,
    "layer_types": _MIXED,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
_SIGLIP: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

_GEMMA4: dict[str, Any] = {
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 30.0,
}
_GEMMA4_EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48}
_GEMMA4_SHARING = {
    "num_hidden_layers": 8,
    "num_kv_shared_layers": 4,
    "layer_types": 2 * _GEMMA4["layer_types"],
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 252,  # not below vocab_size: it is looked up by the same ids
}
_GEMMA4_KEYS_AS_VALUES = {"attention_k_eq_v": True, "num_global_key_value_heads": 2}
_GEMMA4_VISION: dict[str, Any] = {
    "model_type": "gemma4_vision",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "position_embedding_size": 64,
    "use_clipped_linears": True,
}
_GEMMA4_AUDIO: dict[str, Any] = {
    "model_type": "gemma4_audio",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "output_proj_dims": 16,
    "subsampling_conv_channels": [4, 2],
}

_QWEN_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "num_position_embeddings": 16,
    "patch_size": 4,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 2}),
    "qwen2-windowed": ("Qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-biased": ("Qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3Moe", {**_EXPERTS, "norm_topk_prob": True}),
    "qwen3_moe-mixed": ("Qwen3Moe", {**_EXPERTS, "mlp_only_layers": [1]}),
    "qwen3_moe-stepped": ("Qwen3Moe", {**_EXPERTS, "decoder_sparse_step": 2, "norm_topk_prob": True}),
    "mistral": ("Mistral", {"sliding_window": 16}),
    "mistral-nemo": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "ministral": (
        "Ministral",
        {"head_dim": 8, "sliding_window": 16, "layer_types": [_MIXED[2], *_MIXED[:2], _MIXED[0]]},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "intermediate_size": 48}),
    "mixtral-windowed": ("Mixtral", {"num_local_experts": 4, "intermediate_size": 48, "sliding_window": 16}),
    "apertus": ("Apertus", {"head_dim": 8}),
    "glm4_moe": (
        "Glm4Moe",
        {**_SCORED, "head_dim": 16, "attention_bias": True, "use_qk_norm": True, "first_k_dense_replace": 2},
    ),
    "glm4_moe-air": ("Glm4Moe", {**_SCORED, "n_group": 1, "topk_group": 1, "attention_bias": True}),
    "glm4_moe-sparse": ("Glm4Moe", {**_SCORED, "head_dim": 16, "first_k_dense_replace": 0, "n_shared_experts": 2}),
    "deepseek_v3": ("DeepseekV3", {**_SCORED, **_LATENT, "first_k_dense_replace": 1}),
    "deepseek_v3-moonlight": (
        "DeepseekV3",
        {**_SCORED, **_LATENT, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "rope_parameters": None},
    ),
    "glm4_moe_lite": (
        "Glm4MoeLite",
        {**_SCORED, **_LATENT, "mlp_layer_types": ["dense", "sparse", "dense", "sparse"], "rope_parameters": None},
    ),
    "qwen3_next": ("Qwen3Next", {**_SHARED, **_DELTA}),
    "qwen3_next-mixed": (
        "Qwen3Next",
        {
            **_SHARED,
            **_DELTA,
            "layer_types": None,
            "mlp_only_layers": [1],
            "norm_topk_prob": False,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5},
        },
    ),
    "qwen3_5_text": ("Qwen3_5Text", _DELTA),
    "qwen3_5": ("Qwen3_5", {**_DELTA, "tie_word_embeddings": True}),
    "qwen3_5_moe_text": ("Qwen3_5MoeText", {**_SHARED, **_DELTA}),
    "qwen3_5_moe": ("Qwen3_5Moe", {**_SHARED, **_DELTA, "tie_word_embeddings": False}),
    "gpt_oss": ("GptOss", _GPT_OSS),
    "gpt_oss-plain": (
        "GptOss",
        {
            **_GPT_OSS,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
        },
    ),
    "gemma3_text": ("Gemma3Text", _GEMMA3),
    "gemma3_text-capped": ("Gemma3Text", {**_GEMMA3, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3", {}),
    "gemma3-untied": ("Gemma3", {"tie_word_embeddings": False}),
    "gemma4_text-moe": ("Gemma4Text", {**_GEMMA4, **_GEMMA4_KEYS_AS_VALUES, **_GEMMA4_EXPERTS}),
    "gemma4_text-dense": ("Gemma4Text", {**_GEMMA4, **_GEMMA4_KEYS_AS_VALUES, "tie_word_embeddings": False}),
    "gemma4_text-e2b": (
        "Gemma4Text",
        {**_GEMMA4, **_GEMMA4_SHARING, "use_double_wide_mlp": True, "num_key_value_heads": 1},
    ),
    "gemma4_text-e4b": ("Gemma4Text", {**_GEMMA4, **_GEMMA4_SHARING, "num_key_value_heads": 2, "attention_bias": True}),
    "gemma4": ("Gemma4", {**_GEMMA4, **_GEMMA4_SHARING}),
    "gemma4-moe": ("Gemma4", {**_GEMMA4, **_GEMMA4_KEYS_AS_VALUES, **_GEMMA4_EXPERTS, "tie_word_embeddings": False}),
}
"""Kind -> (stem of the transformers classes, what it changes; of the text model, if it is wrapped), but for Llama."""

WRAPPERS = ("Gemma3", "Gemma4", "Qwen3_5", "Qwen3_5Moe")
"""Stems of the multimodal models."""


def model_classes(kind: str) -> tuple[Any, Any]:
    """The transformers config and model classes of a kind."""
    import transformers

    stem = MODELS[kind][0]
    model = f"{stem}ForConditionalGeneration" if stem in WRAPPERS else f"{stem.removesuffix('Text')}ForCausalLM"
    return getattr(transformers, f"{stem}Config"), getattr(transformers, model)


def model_config(kind: str, **changes: Any) -> Any:
    """A tiny config of a kind: 12 heads over 4 groups, so that it splits over 1, 2 and 4 ranks.

    Args:
        kind: A key of `MODELS`.
        changes: Fields to set otherwise; of a wrapper's text model.
    """
    config_class, _ = model_classes(kind)
    stem, own = MODELS[kind]
    if stem not in WRAPPERS:
        return config_class(**deepcopy({**_TINY, **own, **changes}))
    tied = own.get("tie_word_embeddings", True)
    towers: dict[str, Any] = {"vision_config": _GEMMA4_VISION, "audio_config": _GEMMA4_AUDIO}
    if stem == "Gemma3":
        own, towers = {**_GEMMA3, **own}, {"vision_config": _SIGLIP, "mm_tokens_per_image": 4}
    text = {**_TINY, "model_type": f"{stem.lower()}_text", "tie_word_embeddings": tied, **own, **changes}
    if stem.startswith("Qwen"):  # whose text model says nothing of its own, or something wrong
        tied, towers = text.pop("tie_word_embeddings"), {"vision_config": {**_QWEN_VISION, "out_hidden_size": 96}}
        text["model_type"] = f"{stem.replace('Moe', '_moe').lower()}_text"
    return config_class(**deepcopy({"text_config": text, **towers, "tie_word_embeddings": tied}))


def raw_config(kind: str, **changes: Any) -> dict[str, Any]:
    """The config.json of a kind, as transformers writes it."""
    return {**model_config(kind, **changes).to_dict(), "architectures": [model_classes(kind)[1].__name__]}


def save_model(
    path: Path, kind: str, *, dtype: str = "float32", shard: str = "50GB", fused: bool = False, **changes: Any
) -> Path:
    """Saves a randomised tiny model of a kind, and returns its directory.

    Args:
        path: Directory to create.
        kind: A key of `MODELS`.
        dtype: Element type, as torch names it.
        shard: Largest size of a file, as `save_pretrained` takes it.
        fused: Write the names that transformers has in memory (stacked experts, other prefixes).
        changes: Fields to set otherwise; of a wrapper's text model.
    """
    import torch

    torch.manual_seed(0)
    model = model_classes(kind)[1](model_config(kind, **changes))
    randomise(model)
    model.to(getattr(torch, dtype)).save_pretrained(path, max_shard_size=shard, save_original_format=not fused)
    return path


def add_prediction(path: Path, count: int = 1, *, copies: bool = True) -> Path:
    """Gives a saved model layers of multi-token prediction, which transformers never saves: like its last layer.

    Args:
        path: Its directory.
        count: Number of layers.
        copies: Whether each repeats the embedding and the head, as released files do.
    """
    import json

    import torch
    from safetensors.torch import load_file, save_file

    file = path / "model.safetensors"
    tensors, config = load_file(file), json.loads((path / "config.json").read_text())
    apart, model = (
        "Qwen3" in config["architectures"][0],
        "model.language_model." if "text_config" in config else "model.",
    )
    config = config.get("text_config") or config
    layers, width = config["num_hidden_layers"], config["hidden_size"]
    generator = torch.Generator().manual_seed(1)

    def drawn(like: Any, *shape: int, norm: bool = False) -> Any:
        sizes = shape or tuple(like.shape)
        # Matrices of positive numbers alone would make all tokens alike.
        size = 1.5 / sizes[-1] ** 0.5 if len(sizes) > 1 else 0.4
        drawn = torch.randn(sizes, generator=generator) * size
        return (drawn.abs() + 0.5 if norm else drawn).to(like.dtype)

    norm = tensors[f"{model}norm.weight"]
    for number in range(layers, layers + count):
        block, last = f"{model}layers.{number}.", f"{model}layers.{layers - 1}."
        own = {
            block + name.removeprefix(last): drawn(tensor, norm="norm" in name)
            for name, tensor in tensors.items()
            if name.startswith(last)
        }
        names = ("enorm", "hnorm", "shared_head.norm")
        norms = {f"{block}{name}.weight": drawn(norm, width, norm=True) for name in names}
        own |= norms | {f"{block}eh_proj.weight": drawn(norm, width, 2 * width)}
        if copies and not apart:
            own[f"{block}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
            own[f"{block}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
        tensors |= {_apart(name, block): tensor for name, tensor in own.items()} if apart else own
    save_file(tensors, file, metadata={"format": "pt"})
    return path


def _apart(name: str, block: str) -> str:
    """The name of a tensor of multi-token prediction where an archive does not number it behind the others."""
    names = {
        "enorm.weight": "pre_fc_norm_embedding.weight",
        "hnorm.weight": "pre_fc_norm_hidden.weight",
        "shared_head.norm.weight": "norm.weight",
        "eh_proj.weight": "fc.weight",
    }
    inside = name.removeprefix(block)
    return f"mtp.{names[inside]}" if inside in names else f"mtp.layers.0.{inside}"


def randomise(model: Any) -> None:
    """Fills every parameter, norms and biases included: ones and zeros hide mistakes."""
    import torch

    with torch.no_grad():
        buffers = [pair for pair in model.named_buffers() if pair[0] in model.state_dict()]
        for name, parameter in [*model.named_parameters(), *buffers]:
            if parameter.dim() == 0:
                continue  # a constant of the class, or a limit that is off
            if name.endswith("linear_attn.norm.weight"):
                parameter.uniform_(0.01, 1.5)  # below a half, hardly a weight survives being stored less one
            elif "norm" in name or "scale" in name or "scalar" in name:
                parameter.uniform_(0.5, 1.5)
            elif parameter.dim() == 1:
                parameter.normal_(0.0, 0.3)
            else:
                parameter.normal_(0.0, 1.0 if "embed" in name or "lm_head" in name else parameter.shape[-1] ** -0.5)


def files_of(folder: Path) -> dict[str, bytes]:
    """Relative path -> bytes of every file below a folder."""
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
