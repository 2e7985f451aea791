"""DeepSeek-V3, R1 and V3.1, Moonlight, and Kimi-K2: latent attention, and experts chosen by groups and biases."""

from __future__ import annotations

from typing import Any

from ckptkit.families import latent
from ckptkit.families.blocks import stacked
from ckptkit.families.latent_bridge import DEEPSEEK_BRIDGE
from ckptkit.families.llama import EMBEDDINGS, TIED_HEAD
from ckptkit.families.scored_experts import ALIASES, ROWS, dense_count, first_dense, values_of_experts, with_experts
from ckptkit.tables.config_json import ConfigJson, translation
from ckptkit.tables.family import Family, MegatronQuirks
from ckptkit.tables.model_config import ModelConfig, Rope
from ckptkit.tables.rows import Raw
from ckptkit.tables.spelling import HUB

DEFAULTS = {
    **latent.DEFAULTS,
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 1536,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 1,
}
CONFIG = ConfigJson("deepseek_v3", "DeepseekV3ForCausalLM", "deepseek_v3", DEFAULTS, Rope(10000.0), aliases=ALIASES)


def parse(raw: Raw) -> ModelConfig:
    """Translates a config.json of DeepSeek-V3, Moonlight or Kimi-K2.

    Raises:
        InputError: A field is missing, of the wrong type, or contradicts another.
        UnsupportedError: Megatron-Core has no such attention, or it is a router of DeepSeek-V2.
    """
    fields, config = CONFIG.fields(raw), latent.parse(CONFIG, raw)
    return with_experts(config, fields, first_dense(fields, config.num_layers))


def _values(config: ModelConfig) -> dict[str, Any]:
    return {
        **latent.values(CONFIG, config),
        **values_of_experts(config),
        "first_k_dense_replace": dense_count(config),
        "num_nextn_predict_layers": config.mtp_layers,
    }


DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    value_architectures=("DeepseekV3ForTokenClassification", "DeepseekV3ForSequenceClassification"),
    parse=parse,
    unparse=translation(CONFIG, parse, _values),
    rows=(*EMBEDDINGS, *latent.ROWS, *ROWS),
    replicas=(TIED_HEAD,),
    predicts=True,
    spellings=latent.SPELLINGS,
    hf_spellings=(HUB, stacked("fused", "mlp.")),
    marks=(latent.MARK, "decoder.layers.mlp.router.expert_bias"),
    bridge=DEEPSEEK_BRIDGE,
    quirks=MegatronQuirks(local_keys=True, fused=latent.FUSED),
)
