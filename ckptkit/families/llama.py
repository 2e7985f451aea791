"""Llama: the common decoder block. Other families are this table plus or minus a few rows."""

from __future__ import annotations

from ckptkit.sharding.rules import COLUMN, GATED_COLUMN, REPLICATED, ROW, VOCAB
from ckptkit.tables.bridge import BridgeProvider
from ckptkit.tables.config_json import ConfigJson, translation
from ckptkit.tables.family import Family
from ckptkit.tables.model_config import ModelConfig, Rope
from ckptkit.tables.rows import KV, D, F, Q, Raw, Replica, Row, V, copy, gate_up, qkv
from ckptkit.tables.spelling import LOCAL, TE, VERL

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
THETA = 10000.0

CONFIG = ConfigJson("llama", "LlamaForCausalLM", "llama", DEFAULTS, Rope(THETA))


def parse(raw: Raw) -> ModelConfig:
    """Translates a Llama config.json.

    Raises:
        InputError: A field is missing, of the wrong type, or contradicts another.
    """
    return CONFIG.decoder(raw)


unparse = translation(CONFIG, parse, CONFIG.values)

EMBEDDINGS = (
    Row("embedding.word_embeddings.weight", {"model.embed_tokens.weight": (V, D)}, copy, VOCAB, first=True),
    Row("decoder.final_layernorm.weight", {"model.norm.weight": (D,)}, copy, REPLICATED),
    Row("output_layer.weight", {"lm_head.weight": (V, D)}, copy, VOCAB, when=lambda config, layer: not config.tied),
)
"""Embedding, last norm and head."""

ATTENTION = (
    Row(
        "decoder.layers.{i}.self_attention.linear_qkv.layer_norm_weight",
        {"model.layers.{i}.input_layernorm.weight": (D,)},
        copy,
        REPLICATED,
    ),
    Row(
        "decoder.layers.{i}.self_attention.linear_qkv.weight",
        {
            "model.layers.{i}.self_attn.q_proj.weight": (Q, D),
            "model.layers.{i}.self_attn.k_proj.weight": (KV, D),
            "model.layers.{i}.self_attn.v_proj.weight": (KV, D),
        },
        qkv,
        COLUMN,
    ),
    Row(
        "decoder.layers.{i}.self_attention.linear_qkv.bias",
        {
            "model.layers.{i}.self_attn.q_proj.bias": (Q,),
            "model.layers.{i}.self_attn.k_proj.bias": (KV,),
            "model.layers.{i}.self_attn.v_proj.bias": (KV,),
        },
        qkv,
        COLUMN,
        when=lambda config, layer: config.qkv_bias,
    ),
    Row(
        "decoder.layers.{i}.self_attention.linear_proj.weight",
        {"model.layers.{i}.self_attn.o_proj.weight": (D, Q)},
        copy,
        ROW,
    ),
    Row(
        "decoder.layers.{i}.self_attention.linear_proj.bias",
        {"model.layers.{i}.self_attn.o_proj.bias": (D,)},
        copy,
        REPLICATED,
        when=lambda config, layer: config.out_bias,
    ),
)
"""The attention of a layer and the norm before it."""

MLP = (
    Row(
        "decoder.layers.{i}.mlp.linear_fc1.layer_norm_weight",
        {"model.layers.{i}.post_attention_layernorm.weight": (D,)},
        copy,
        REPLICATED,
    ),
    Row(
        "decoder.layers.{i}.mlp.linear_fc1.weight",
        {"model.layers.{i}.mlp.gate_proj.weight": (F, D), "model.layers.{i}.mlp.up_proj.weight": (F, D)},
        gate_up,
        GATED_COLUMN,
    ),
    Row(
        "decoder.layers.{i}.mlp.linear_fc1.bias",
        {"model.layers.{i}.mlp.gate_proj.bias": (F,), "model.layers.{i}.mlp.up_proj.bias": (F,)},
        gate_up,
        GATED_COLUMN,
        when=lambda config, layer: config.mlp_bias,
    ),
    Row("decoder.layers.{i}.mlp.linear_fc2.weight", {"model.layers.{i}.mlp.down_proj.weight": (D, F)}, copy, ROW),
    Row(
        "decoder.layers.{i}.mlp.linear_fc2.bias",
        {"model.layers.{i}.mlp.down_proj.bias": (D,)},
        copy,
        REPLICATED,
        when=lambda config, layer: config.mlp_bias,
    ),
)
"""The MLP of a layer and the norm before it."""

TIED_HEAD = Replica("lm_head.weight", of="model.embed_tokens.weight", when=lambda config: config.tied)
"""A tied head that the files hold all the same."""

LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    parse=parse,
    unparse=unparse,
    rows=(*EMBEDDINGS, *ATTENTION, *MLP),
    replicas=(TIED_HEAD,),
    spellings=(TE, LOCAL, VERL),
    extras=("model.layers.{i}.self_attn.rotary_emb.inv_freq",),
    bridge=BridgeProvider(),
)
