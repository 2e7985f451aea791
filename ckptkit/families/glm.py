"""GLM-4.5, 4.6 and 4.7: grouped-query attention of which a part rotates, and DeepSeek's experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ckptkit.families.blocks import QK_NORMS, stacked
from ckptkit.families.latent_bridge import GLM_EXPERTS
from ckptkit.families.llama import ATTENTION, EMBEDDINGS, TIED_HEAD
from ckptkit.families.scored_experts import ALIASES, ROWS, dense_count, first_dense, values_of_experts, with_experts
from ckptkit.tables.bridge import BridgeProvider
from ckptkit.tables.config_fields import Fields
from ckptkit.tables.config_json import ConfigJson, translation
from ckptkit.tables.family import Family
from ckptkit.tables.model_config import ModelConfig, Rope
from ckptkit.tables.rows import Raw, only, qk_norm, without
from ckptkit.tables.spelling import HUB

DEFAULTS = {
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": None,
    "partial_rotary_factor": 0.5,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 128,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "use_qk_norm": False,
    "num_nextn_predict_layers": 1,
}
CONFIG = ConfigJson("glm4_moe", "Glm4MoeForCausalLM", "glm4_moe", DEFAULTS, Rope(10000.0, partial=0.5), aliases=ALIASES)


def parse(raw: Raw) -> ModelConfig:
    """Translates a config.json of GLM-4.5 to 4.7.

    Raises:
        InputError: A field is missing, of the wrong type, or contradicts another.
        UnsupportedError: It is another router.
    """
    fields = CONFIG.fields(raw)
    config = CONFIG.decoder({**raw, "head_dim": _head_dim(fields)})
    config = replace(config, out_bias=False, qk_norm=fields.flag("use_qk_norm"))
    return with_experts(config, fields, first_dense(fields, config.num_layers))


def _head_dim(fields: Fields) -> int:
    """Where config.json has none, the class rounds down."""
    return fields.integer_or_none("head_dim") or fields.integer("hidden_size") // fields.integer("num_attention_heads")


def _values(config: ModelConfig) -> dict[str, Any]:
    return {
        **CONFIG.values(config),
        **values_of_experts(config),
        "use_qk_norm": config.qk_norm,
        "num_nextn_predict_layers": config.mtp_layers,
        "first_k_dense_replace": dense_count(config),
    }


GLM4_MOE = Family(
    name="glm4_moe",
    architectures=("Glm4MoeForCausalLM",),
    parse=parse,
    unparse=translation(CONFIG, parse, _values),
    rows=(*EMBEDDINGS, *without(ATTENTION, "linear_proj.bias"), *only(QK_NORMS, qk_norm), *ROWS),
    replicas=(TIED_HEAD,),
    predicts=True,
    hf_spellings=(HUB, stacked("fused", "mlp.")),
    bridge=BridgeProvider(with_experts=GLM_EXPERTS, blocks=True),
    marks=("decoder.layers.self_attention.linear_qkv.weight", "decoder.layers.mlp.router.expert_bias"),
)
