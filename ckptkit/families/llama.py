"""Llama: the common decoder block. Other families are this table plus or minus a few rows."""

from __future__ import annotations

from ckptkit.sharding.rules import ROW, VOCAB
from ckptkit.tables.bridge import BridgeProvider
from ckptkit.tables.config_json import ConfigJson, translation
from ckptkit.tables.dims import KV, D, F, Q, V
from ckptkit.tables.family import Family
from ckptkit.tables.layouts import gate_up, qkv
from ckptkit.tables.model_config import Rope
from ckptkit.tables.rows import Replica, layer, mlp_bias, once, out_bias, qkv_bias, untied
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


parse = CONFIG.decoder
unparse = translation(CONFIG, parse, CONFIG.values)
"""Llama's config.json -> `ModelConfig`, and back."""

EMBEDDINGS = (
    once("embedding.word_embeddings.weight", "model.embed_tokens.weight", (V, D), VOCAB, first=True),
    once("decoder.final_layernorm.weight", "model.norm.weight", (D,)),
    once("output_layer.weight", "lm_head.weight", (V, D), VOCAB, when=untied),
)
"""Embedding, last norm and head."""

ATTENTION = (
    layer("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", (D,)),
    layer("self_attention.linear_qkv.weight", qkv("self_attn.*_proj.weight", q=(Q, D), k=(KV, D), v=(KV, D))),
    layer("self_attention.linear_qkv.bias", qkv("self_attn.*_proj.bias", q=(Q,), k=(KV,), v=(KV,)), when=qkv_bias),
    layer("self_attention.linear_proj.weight", "self_attn.o_proj.weight", (D, Q), ROW),
    layer("self_attention.linear_proj.bias", "self_attn.o_proj.bias", (D,), when=out_bias),
)
"""The attention of a layer and the norm before it."""

MLP = (
    layer("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight", (D,)),
    layer("mlp.linear_fc1.weight", gate_up("mlp.*_proj.weight", gate=(F, D), up=(F, D))),
    layer("mlp.linear_fc1.bias", gate_up("mlp.*_proj.bias", gate=(F,), up=(F,)), when=mlp_bias),
    layer("mlp.linear_fc2.weight", "mlp.down_proj.weight", (D, F), ROW),
    layer("mlp.linear_fc2.bias", "mlp.down_proj.bias", (D,), when=mlp_bias),
)
"""The MLP of a layer and the norm before it."""

TIED_HEAD = Replica("lm_head.weight", of="model.embed_tokens.weight", when=lambda config: config.tied)
"""Files may hold a tied head as well."""

LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    value_architectures=("LlamaForTokenClassification", "LlamaForSequenceClassification"),
    parse=parse,
    unparse=unparse,
    rows=(*EMBEDDINGS, *ATTENTION, *MLP),
    replicas=(TIED_HEAD,),
    spellings=(TE, LOCAL, VERL),
    bridge=BridgeProvider(),
)
