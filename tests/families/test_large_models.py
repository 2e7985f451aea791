"""Models of hundreds of billions of parameters have the size that is published, by the table alone.

Where the configs are from: the defaults of `DeepseekV3Config` and `Glm4MoeLiteConfig` of transformers are those of
DeepSeek-V3 and GLM-4.7-Flash. The config.json of GLM-4.5-Air is printed in a public bug report. Kimi-K2's sizes are in
the tests of public engines, and its dense width and dense layers in the documentation of radixark/miles. The
config.json of gpt-oss-20b is in EchoCog/gpt-oss-20b (commit 52971a1), and the defaults of `GptOssConfig` are those of
gpt-oss-120b.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ckptkit.families import family_of

AIR = {
    "attention_bias": True,
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "topk_group": 1,
    "torch_dtype": "bfloat16",
    "use_qk_norm": False,
    "vocab_size": 151552,
}
KIMI = {
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 384,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "vocab_size": 163840,
}
OSS_20B = {
    "attention_bias": True,
    "head_dim": 64,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}
SIZES: dict[str, tuple[str, dict[str, Any], float]] = {
    # name -> architecture, config.json, billions of parameters as published, without multi-token prediction
    "DeepSeek-V3": ("DeepseekV3ForCausalLM", {}, 671),
    "Kimi-K2": ("DeepseekV3ForCausalLM", KIMI, 1026),
    "GLM-4.5-Air": ("Glm4MoeForCausalLM", AIR, 106),
    "GLM-4.7-Flash": ("Glm4MoeLiteForCausalLM", {}, 30),
    "gpt-oss-20b": ("GptOssForCausalLM", OSS_20B, 20.91),
    "gpt-oss-120b": ("GptOssForCausalLM", {}, 116.83),
}


@pytest.mark.parametrize("name", SIZES)
def test_parameters(name: str) -> None:
    architecture, raw, published = SIZES[name]
    family = family_of({"architectures": [architecture]}, name)
    count = sum(item.parameters for item in family.items(family.parse(raw)))
    assert abs(count / 1e9 - published) < (0.01 if isinstance(published, float) else 1)


def test_the_released_config_of_gpt_oss_has_the_defaults_of_the_class() -> None:
    family = family_of({"architectures": ["GptOssForCausalLM"]}, "")
    sizes = {"num_hidden_layers": 24, "num_local_experts": 32}
    assert family.parse(OSS_20B) == family.parse(sizes)


def test_multi_token_prediction_of_deepseek_v3() -> None:
    """It is published with 14 billion more: a layer, and in its files copies of the embedding and of the head."""
    family = family_of({"architectures": ["DeepseekV3ForCausalLM"]}, "")
    config = replace(family.parse({}), mtp_layers=1)
    added = [item for item in family.items(config) if item.key.startswith("mtp.")]
    copies = [copy for copy in family.copies(config) if copy.hf.startswith("model.layers.61.")]
    parameters = sum(item.parameters for item in added) + len(copies) * config.vocab_size * config.hidden_size
    assert len(copies) == 2 and abs(parameters / 1e9 - 14) < 1
