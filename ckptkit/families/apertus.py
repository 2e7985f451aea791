"""Apertus: Llama's attention with norms on q and k, and an MLP without a gate whose activation, xIELU, is learned."""

from __future__ import annotations

from dataclasses import replace

from ckptkit.families.blocks import QK_NORMS
from ckptkit.families.llama import ATTENTION, EMBEDDINGS, MLP, TIED_HEAD
from ckptkit.sharding.rules import COLUMN
from ckptkit.tables.config_json import ConfigJson, translation
from ckptkit.tables.dims import ONE, D, F
from ckptkit.tables.family import Family
from ckptkit.tables.model_config import LayerConfig, ModelConfig, Rope
from ckptkit.tables.rows import Buffer, Raw, layer, renamed, without

DEFAULTS = {
    "vocab_size": 131072,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "xielu",
    "max_position_embeddings": 65536,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
ROPE = Rope(12000000.0, "llama3", 8.0, 1.0, 4.0, 8192)

CONFIG = ConfigJson("apertus", "ApertusForCausalLM", "apertus", DEFAULTS, ROPE)


def parse(raw: Raw) -> ModelConfig:
    """Translates an Apertus config.json.

    Raises:
        InputError: A field is missing, of the wrong type, or contradicts another.
    """
    return replace(CONFIG.decoder(raw), qk_norm=True, gated=False)


unparse = translation(CONFIG, parse, CONFIG.values)


def _xielu(config: ModelConfig, layer: LayerConfig | None = None) -> bool:
    """Whether the activation is the learned one: another that config.json may name has no tensors."""
    return config.activation == "xielu"


_BODY = without((*EMBEDDINGS, *ATTENTION, *QK_NORMS, *MLP), "linear_fc1.weight", "linear_fc1.bias", "linear_fc2.bias")

APERTUS = Family(
    name="apertus",
    architectures=("ApertusForCausalLM",),
    value_architectures=("ApertusForTokenClassification",),
    parse=parse,
    unparse=unparse,
    rows=(
        *renamed(
            _BODY,
            (".input_layernorm.", ".attention_layernorm."),
            (".post_attention_layernorm.", ".feedforward_layernorm."),
        ),
        layer("mlp.linear_fc1.weight", "mlp.up_proj.weight", (F, D), COLUMN),
        layer("mlp.activation_func.alpha_p", "mlp.act_fn.alpha_p", (ONE,), when=_xielu),
        layer("mlp.activation_func.alpha_n", "mlp.act_fn.alpha_n", (ONE,), when=_xielu),
    ),
    replicas=(TIED_HEAD,),
    buffers=(
        Buffer("model.layers.{i}.mlp.act_fn.beta", 0.5, when=_xielu),
        Buffer("model.layers.{i}.mlp.act_fn.eps", -1e-6, when=_xielu),
    ),
    marks=("decoder.layers.self_attention.q_layernorm.weight", "decoder.layers.mlp.activation_func.alpha_p"),
)
