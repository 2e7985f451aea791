"""GLM-4.7-Flash: latent attention and DeepSeek's experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ckptkit.errors import InputError, UnsupportedError
from ckptkit.families import latent
from ckptkit.families.deepseek import DEEPSEEK_V3
from ckptkit.families.latent_bridge import GLM_LITE_BRIDGE
from ckptkit.families.scored_experts import ALIASES, values_of_experts, with_experts
from ckptkit.tables.config_fields import PARTIAL, Fields, object_in
from ckptkit.tables.config_json import ConfigJson, translation
from ckptkit.tables.model_config import ModelConfig, Rope
from ckptkit.tables.rows import Raw

DEFAULTS = {
    **latent.DEFAULTS,
    "vocab_size": 154880,
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 47,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "n_shared_experts": 1,
    "n_routed_experts": 64,
    "routed_scaling_factor": 1.8,
    "q_lora_rank": 768,
    "v_head_dim": 256,
    "qk_nope_head_dim": 192,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 4,
    "mlp_layer_types": None,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "max_position_embeddings": 202752,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
CONFIG = ConfigJson("glm4_moe_lite", "Glm4MoeLiteForCausalLM", "glm4_moe_lite", DEFAULTS, Rope(10000.0), ALIASES[:1])
DENSE, SPARSE = "dense", "sparse"


def parse(raw: Raw) -> ModelConfig:
    """Translates a config.json of GLM-4.7-Flash.

    Raises:
        InputError: A field is missing, of the wrong type, or contradicts another.
        UnsupportedError: Megatron-Core has no such attention, or it is another router.
    """
    fields, config = CONFIG.fields(raw), latent.parse(CONFIG, raw)
    for where in (raw, object_in(raw, "rope_parameters")):
        if where.get(PARTIAL) not in (None, 1, 1.0):
            raise UnsupportedError(f"config.json: {PARTIAL} {where[PARTIAL]!r} with latent attention")
    return with_experts(config, fields, [kind == SPARSE for kind in _types(fields, config.num_layers)])


def _types(fields: Fields, num_layers: int) -> list[str]:
    """Kind of the MLP of each layer. Where config.json has no list, the class makes the first layer dense."""
    types = fields.get("mlp_layer_types")
    if types is None:
        types = [DENSE] + [SPARSE] * (num_layers - 1)
    if not isinstance(types, list) or len(types) != num_layers or not set(types) <= {DENSE, SPARSE}:
        raise InputError(f"config.json: mlp_layer_types must say dense or sparse of {num_layers} layers, not {types!r}")
    count = fields.raw.get("first_k_dense_replace")  # of published files; the class does not read it
    if count is not None and type(count) is not int:
        raise InputError(f"config.json: first_k_dense_replace must be a number of layers, not {count!r}")
    if count is not None and types != [DENSE] * count + [SPARSE] * (num_layers - count):
        raise InputError(f"config.json: first_k_dense_replace {count}, but the class makes other layers dense")
    return types


def _values(config: ModelConfig) -> dict[str, Any]:
    types = [SPARSE if layer.moe else DENSE for layer in config.layers]
    found = {**latent.values(CONFIG, config), **values_of_experts(config), "mlp_layer_types": types}
    return {**found, "num_nextn_predict_layers": config.mtp_layers} if config.mtp_layers else found


GLM4_MOE_LITE = replace(
    DEEPSEEK_V3,
    name="glm4_moe_lite",
    architectures=("Glm4MoeLiteForCausalLM",),
    value_architectures=(),
    parse=parse,
    unparse=translation(CONFIG, parse, _values),
    bridge=GLM_LITE_BRIDGE,
)
