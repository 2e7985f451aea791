"""Gemma 4, in the two layouts of Megatron-Bridge 0.6.2.

A dense model has the names of the local layer spec, a model with experts those of Transformer Engine's.

Some of Megatron's tensors have parts that the model does not use. A layer whose values are its raw keys has a slot for
values, which holds a copy of the keys. A layer that attends to the keys and values of an earlier layer has slots for
keys and values, which hold zeros, and for the norm of the keys, which holds ones. Some files on the hub have tensors
for the slots of such a layer; they travel in the slots, as they do with Megatron-Bridge.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ckptkit.families.blocks import experts, router, stacked
from ckptkit.families.gemma4_bridge import GEMMA4_BRIDGE
from ckptkit.families.gemma4_config import WRAPPER, from_args, parse_text, to_args, unparse_text
from ckptkit.families.llama import ATTENTION, EMBEDDINGS, MLP, TIED_HEAD
from ckptkit.sharding.rules import COLUMN, REPLICATED
from ckptkit.tables.dims import HD, KV, LP, ONE, VP, D, E, P, Q, Shape
from ckptkit.tables.family import Family, HfDirectory, MegatronQuirks
from ckptkit.tables.layouts import qkv
from ckptkit.tables.model_config import LayerConfig, ModelConfig
from ckptkit.tables.rows import Row, Slot, choose, dense, layer, once, only, qkv_bias, renamed, sparse
from ckptkit.tables.spelling import SEQUENTIAL, TE, HfSpelling, Spelling


def _own_values(config: ModelConfig, layer: LayerConfig) -> bool:
    return layer.kv_donor is None and not layer.k_eq_v


def _keys_as_values(config: ModelConfig, layer: LayerConfig) -> bool:
    return layer.kv_donor is None and layer.k_eq_v


def _shared(config: ModelConfig, layer: LayerConfig) -> bool:
    return layer.kv_donor is not None


def _own_keys(config: ModelConfig, layer: LayerConfig) -> bool:
    return layer.kv_donor is None


def _per_layer_inputs(config: ModelConfig, layer: LayerConfig) -> bool:
    return config.per_layer_input_size > 0


def _qkv(kind: str, rest: Shape) -> tuple[Row, ...]:
    """The fused weights or biases of the three kinds of layers; `rest` is the shape of one row."""
    megatron, hf = f"self_attention.linear_qkv.{kind}", f"self_attn.*_proj.{kind}"
    query, keys = {"q": (Q, *rest)}, {"k": (KV, *rest)}
    copies = Slot("values of layers whose values are their keys", (KV, *rest), repeats=1)
    unused = "keys and values of layers that use those of another"
    dead = tuple(Slot(unused, (KV, *rest), hf=hf.replace("*", part)) for part in "kv")
    return (
        layer(megatron, qkv(hf, **query, **keys, v=(KV, *rest)), when=_own_values),
        layer(megatron, qkv(hf, **query, **keys), when=_keys_as_values, slots=(copies,)),
        layer(megatron, qkv(hf, **query), when=_shared, slots=dead),
    )


_K_NORM = ("self_attention.k_layernorm.weight", "self_attn.k_norm.weight")
_DEAD_NORM = Slot("norms of the keys of layers that use those of another", (HD,), 1.0, hf=_K_NORM[1])
_ATTENTION = (
    *_qkv("weight", (D,)),
    *only(_qkv("bias", ()), qkv_bias),
    *choose(ATTENTION, "linear_proj.weight", "linear_proj.bias"),
    layer("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", (HD,)),
    layer(*_K_NORM, (HD,), when=_own_keys),
    layer(_K_NORM[0], None, when=_shared, slots=(_DEAD_NORM,)),
    layer("layer_scalar", "layer_scalar", (ONE,)),
)
"""The rows of layers of both layouts."""

_MLP = choose(MLP, "linear_fc1.weight", "linear_fc2.weight")
_DENSE = only(
    (
        layer("input_layernorm.weight", "input_layernorm.weight", (D,)),
        layer("post_self_attn_layernorm.weight", "post_attention_layernorm.weight", (D,)),
        layer("pre_mlp_layernorm.weight", "pre_feedforward_layernorm.weight", (D,)),
        layer("post_mlp_layernorm.weight", "post_feedforward_layernorm.weight", (D,)),
        *_MLP,
    ),
    dense,
)

_SPARSE = only(
    (
        layer("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", (D,)),
        layer("self_attention.linear_proj.post_layernorm.weight", "post_attention_layernorm.weight", (D,)),
        layer("pre_shared_expert_layernorm.weight", "pre_feedforward_layernorm.weight", (D,)),
        layer("mlp.post_shared_expert_layernorm.weight", "post_feedforward_layernorm_1.weight", (D,)),
        layer("pre_mlp_layernorm.weight", "pre_feedforward_layernorm_2.weight", (D,)),
        layer("mlp.post_moe_layernorm.weight", "post_feedforward_layernorm_2.weight", (D,)),
        layer("post_ffn_layernorm.weight", "post_feedforward_layernorm.weight", (D,)),
        *(replace(row, megatron=row.megatron.replace(".mlp.", ".mlp.shared_experts.")) for row in _MLP),
        router("router.proj"),
        layer("mlp.router.scale", "router.scale", (D,)),
        layer("mlp.router.per_expert_scale", "router.per_expert_scale", (E,)),
        *experts(""),
    ),
    sparse,
)

_PER_LAYER_INPUTS = only(
    (
        # Not padded, unlike the embedding itself: Megatron-Bridge gives it the rows of config.json.
        once("per_layer_embedding.weight", "model.embed_tokens_per_layer.weight", (VP, LP), COLUMN, first=True),
        once("per_layer_model_proj.weight", "model.per_layer_model_projection.weight", (LP, D), COLUMN, first=True),
        once("per_layer_proj_norm.weight", "model.per_layer_projection_norm.weight", (P,), first=True),
        layer("per_layer_input_gate.weight", "per_layer_input_gate.weight", (P, D), REPLICATED),
        layer("per_layer_projection.weight", "per_layer_projection.weight", (D, P), REPLICATED),
        layer("post_per_layer_input_norm.weight", "post_per_layer_input_norm.weight", (D,)),
    ),
    _per_layer_inputs,
)

LOCAL = Spelling(
    "local", ((".self_attention.linear_qkv.layer_norm_weight", ".input_layernorm.weight"),), experts=SEQUENTIAL
)
"""The local layer spec has no linear layer with a norm in front; the dense layout needs none."""

SLIME = Spelling(
    "slime",
    (
        (".self_attention.linear_proj.post_layernorm.weight", ".post_attention_layernorm.weight"),
        (".pre_shared_expert_layernorm.weight", ".pre_mlp_layernorm.weight"),
        (".mlp.post_shared_expert_layernorm.weight", ".post_feedforward_layernorm_1.weight"),
        (".pre_mlp_layernorm.weight", ".mlp.pre_feedforward_layernorm_2.weight"),
        (".mlp.post_moe_layernorm.weight", ".post_feedforward_layernorm_2.weight"),
        (".post_ffn_layernorm.weight", ".post_feedforward_layernorm.weight"),
        (".mlp.shared_experts.linear_fc1.weight", ".dense_mlp.linear_fc1.weight"),
        (".mlp.shared_experts.linear_fc2.weight", ".dense_mlp.linear_fc2.weight"),
        (".mlp.router.weight", ".mlp.router.proj.weight"),
    ),
    tied_head=True,
)
_SLIME_DENSE = (
    (".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight"),
    (".post_self_attn_layernorm.weight", ".post_attention_layernorm.weight"),
    (".post_mlp_layernorm.weight", ".post_feedforward_layernorm.weight"),
)
SLIME_DENSE = Spelling("slime_dense", _SLIME_DENSE, tied_head=True)
SLIME_FUSED = Spelling(
    "slime_dense_fused",
    (*_SLIME_DENSE, (".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight")),
    tied_head=True,
)
"""The names of slime's layers: for models with experts, for dense ones, and for dense ones in its mbridge plugin."""

FUSED_SCALES = "Gemma 4 as Megatron-Bridge wrote it before July 2026, with scales multiplied into other weights"
FOREIGN = {
    ".pffl_weight": FUSED_SCALES,
    ".mlp.shared_experts.linear_fc2.post_layernorm.weight": FUSED_SCALES,
    ".experts.gate_up_proj": "Gemma 4 with its experts fused, as slime had them at first",
    ".mlp._inner_mlp.": "Gemma 4 with its experts in `_inner_mlp` modules",
}
"""Pieces of names -> the layout that has them, which no table reads."""


def _attention_of(layer: LayerConfig) -> str:
    return "_global" if layer.window is None else "_sliding"


_VALUE_CODE = "modeling_gemma4_value"
VALUE_ARCHITECTURES = ("Gemma4TextForTokenClassification", "Gemma4TextForSequenceClassification")
"""Value models: transformers has no class for them, so that their directories bring ours."""
_VALUE_DIRECTORY = HfDirectory(
    code=(Path(__file__).parents[1] / "surgery" / "remote" / f"{_VALUE_CODE}.py",),
    auto_map={
        "AutoModelForTokenClassification": f"{_VALUE_CODE}.{VALUE_ARCHITECTURES[0]}",
        "AutoModelForSequenceClassification": f"{_VALUE_CODE}.{VALUE_ARCHITECTURES[1]}",
    },
)

GEMMA4_TEXT = Family(
    name="gemma4_text",
    architectures=("Gemma4ForCausalLM",),
    value_architectures=VALUE_ARCHITECTURES,
    value_directory=_VALUE_DIRECTORY,
    parse=parse_text,
    unparse=unparse_text,
    rows=(*EMBEDDINGS, *_ATTENTION, *_DENSE, *_SPARSE, *_PER_LAYER_INPUTS),
    replicas=(TIED_HEAD,),
    spellings=(TE, LOCAL, SLIME, SLIME_DENSE, SLIME_FUSED),
    hf_spellings=(stacked("hub", ""), HfSpelling("per_expert")),
    marks=("decoder.layers.layer_scalar",),
    quirks=MegatronQuirks(
        to_args,
        from_args,
        attention_of=_attention_of,
        local_only=lambda config: not config.num_experts,
        plain=("_shared_expert_layernorm", "post_moe_layernorm", "post_ffn_layernorm"),
        parallel=("per_layer_model_proj",),
        foreign=FOREIGN,
    ),
    bridge=GEMMA4_BRIDGE,
)

_TOWERS = ("vision_tower.", "embed_vision.", "audio_tower.", "embed_audio.")
"""Beginnings of the towers' names: Megatron-Bridge keeps the towers of transformers beside `language_model.`."""

GEMMA4 = replace(
    GEMMA4_TEXT,
    name="gemma4",
    architectures=("Gemma4ForConditionalGeneration",),
    value_architectures=(),
    value_directory=HfDirectory(),
    parse=WRAPPER.parse,
    unparse=WRAPPER.unparse,
    rows=renamed(GEMMA4_TEXT.rows, ("model.", "model.language_model.")),
    replicas=(replace(TIED_HEAD, of="model.language_model.embed_tokens.weight"),),
    extras=tuple(f"model.{tower}*" for tower in _TOWERS),
    towers={tower: f"model.{tower}" for tower in _TOWERS},
    hf_spellings=(stacked("hub", "", layers="model.language_model.layers.{i}."), HfSpelling("per_expert")),
    prefix="language_model.",
    text_only=WRAPPER.text_only,
    sizes_in="text_config",
    bridge=None,
)
