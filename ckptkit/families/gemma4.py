"""Gemma 4, in the two layouts of Megatron-Bridge 0.6.2.

A dense model is named as the local layer spec names it, one with experts as that of Transformer Engine does.

Megatron's tensors hold things that the model does not use: the value slot of layers whose values are their raw keys (a
copy of the key), and the slots of layers that attend to the keys and values of an earlier layer (zeros, and ones for
the norm of the key). Some files on the hub hold tensors for the latter although nothing uses them; they travel in the
slots, as they do with Megatron-Bridge.
"""

from __future__ import annotations

from dataclasses import replace

from ckptkit.families.gemma4_config import WRAPPER, from_args, parse_text, to_args, unparse_text
from ckptkit.families.llama import ATTENTION, EMBEDDINGS, MLP, TIED_HEAD
from ckptkit.sharding.rules import COLUMN, EXPERT_GATED_COLUMN, EXPERT_ROW, REPLICATED
from ckptkit.tables.config_json import dense, sparse
from ckptkit.tables.family import Family
from ckptkit.tables.model_config import LayerConfig, ModelConfig
from ckptkit.tables.rows import HD, KV, LP, ONE, VP, D, E, I, P, Q, Row, Slot, When, copy, gate_up, only, qkv, renamed
from ckptkit.tables.spelling import SEQUENTIAL, TE, HfSpelling, Spelling, Stack

_IN = "decoder.layers.{i}."
_HF = "model.layers.{i}."
_Q, _K, _V = (f"{_HF}self_attn.{part}_proj.weight" for part in "qkv")


def _own_values(config: ModelConfig, layer: LayerConfig) -> bool:
    return layer.kv_donor is None and not layer.k_eq_v


def _keys_as_values(config: ModelConfig, layer: LayerConfig) -> bool:
    return layer.kv_donor is None and layer.k_eq_v


def _shared(config: ModelConfig, layer: LayerConfig) -> bool:
    return layer.kv_donor is not None


def _own(config: ModelConfig, layer: LayerConfig) -> bool:
    return layer.kv_donor is None


def _biased(when: When) -> When:
    return lambda config, layer: config.qkv_bias and when(config, layer)


def _per_layer_inputs(config: ModelConfig, layer: LayerConfig) -> bool:
    return config.per_layer_input_size > 0


def _norm(megatron: str, hf: str, when: When) -> Row:
    return Row(f"{_IN}{megatron}", {f"{_HF}{hf}.weight": (D,)}, copy, REPLICATED, when=when)


def _qkv_bias(row: Row) -> Row:
    """The row of the biases beside one of weights."""
    when, ending = row.when, (".weight", ".bias")

    def bias(name: str) -> str:
        return name.replace(*ending)

    return replace(
        row,
        megatron=bias(row.megatron),
        hf={bias(name): shape[:1] for name, shape in row.hf.items()},
        when=_biased(when),
        slots=tuple(replace(slot, shape=slot.shape[:1], hf=slot.hf and bias(slot.hf)) for slot in row.slots),
    )


_QKV_NAME = f"{_IN}self_attention.linear_qkv.weight"
_UNUSED = "keys and values of layers that use those of another"
_QKV = (
    Row(_QKV_NAME, {_Q: (Q, D), _K: (KV, D), _V: (KV, D)}, qkv, COLUMN, when=_own_values),
    Row(
        _QKV_NAME,
        {_Q: (Q, D), _K: (KV, D)},
        qkv,
        COLUMN,
        when=_keys_as_values,
        slots=(Slot("values of layers whose values are their keys", (KV, D), repeats=1),),
    ),
    Row(
        _QKV_NAME,
        {_Q: (Q, D)},
        qkv,
        COLUMN,
        when=_shared,
        slots=(Slot(_UNUSED, (KV, D), hf=_K), Slot(_UNUSED, (KV, D), hf=_V)),
    ),
)

_ATTENTION = (
    *_QKV,
    *(_qkv_bias(row) for row in _QKV),
    *(row for row in ATTENTION if ".linear_proj." in row.megatron),
    Row(f"{_IN}self_attention.q_layernorm.weight", {f"{_HF}self_attn.q_norm.weight": (HD,)}, copy, REPLICATED),
    Row(
        f"{_IN}self_attention.k_layernorm.weight",
        {f"{_HF}self_attn.k_norm.weight": (HD,)},
        copy,
        REPLICATED,
        when=_own,
    ),
    Row(
        f"{_IN}self_attention.k_layernorm.weight",
        {},
        copy,
        REPLICATED,
        when=_shared,
        slots=(
            Slot(
                "norms of the keys of layers that use those of another", (HD,), 1.0, hf=f"{_HF}self_attn.k_norm.weight"
            ),
        ),
    ),
    Row(f"{_IN}layer_scalar", {f"{_HF}layer_scalar": (ONE,)}, copy, REPLICATED),
)
"""What layers of both layouts have."""

_DENSE = (
    _norm("input_layernorm.weight", "input_layernorm", dense),
    _norm("post_self_attn_layernorm.weight", "post_attention_layernorm", dense),
    _norm("pre_mlp_layernorm.weight", "pre_feedforward_layernorm", dense),
    _norm("post_mlp_layernorm.weight", "post_feedforward_layernorm", dense),
    *only((row for row in MLP if row.megatron.endswith(("linear_fc1.weight", "linear_fc2.weight"))), dense),
)

_SPARSE = (
    _norm("self_attention.linear_qkv.layer_norm_weight", "input_layernorm", sparse),
    _norm("self_attention.linear_proj.post_layernorm.weight", "post_attention_layernorm", sparse),
    _norm("pre_shared_expert_layernorm.weight", "pre_feedforward_layernorm", sparse),
    _norm("mlp.post_shared_expert_layernorm.weight", "post_feedforward_layernorm_1", sparse),
    _norm("pre_mlp_layernorm.weight", "pre_feedforward_layernorm_2", sparse),
    _norm("mlp.post_moe_layernorm.weight", "post_feedforward_layernorm_2", sparse),
    _norm("post_ffn_layernorm.weight", "post_feedforward_layernorm", sparse),
    *(
        replace(row, megatron=row.megatron.replace(".mlp.", ".mlp.shared_experts."), when=sparse)
        for row in MLP
        if row.megatron.endswith(("linear_fc1.weight", "linear_fc2.weight"))
    ),
    Row(f"{_IN}mlp.router.weight", {f"{_HF}router.proj.weight": (E, D)}, copy, REPLICATED, when=sparse),
    Row(f"{_IN}mlp.router.scale", {f"{_HF}router.scale": (D,)}, copy, REPLICATED, when=sparse),
    Row(f"{_IN}mlp.router.per_expert_scale", {f"{_HF}router.per_expert_scale": (E,)}, copy, REPLICATED, when=sparse),
    Row(
        _IN + "mlp.experts.linear_fc1.weight{e}",
        {_HF + "experts.{e}.gate_proj.weight": (I, D), _HF + "experts.{e}.up_proj.weight": (I, D)},
        gate_up,
        EXPERT_GATED_COLUMN,
        when=sparse,
    ),
    Row(
        _IN + "mlp.experts.linear_fc2.weight{e}",
        {_HF + "experts.{e}.down_proj.weight": (D, I)},
        copy,
        EXPERT_ROW,
        when=sparse,
    ),
)

_PER_LAYER_INPUTS = only(
    (
        # Not padded, unlike the embedding itself: Megatron-Bridge gives it the rows of config.json.
        Row("per_layer_embedding.weight", {"model.embed_tokens_per_layer.weight": (VP, LP)}, copy, COLUMN, first=True),
        Row(
            "per_layer_model_proj.weight",
            {"model.per_layer_model_projection.weight": (LP, D)},
            copy,
            COLUMN,
            first=True,
        ),
        Row(
            "per_layer_proj_norm.weight",
            {"model.per_layer_projection_norm.weight": (P,)},
            copy,
            REPLICATED,
            first=True,
        ),
        Row(f"{_IN}per_layer_input_gate.weight", {f"{_HF}per_layer_input_gate.weight": (P, D)}, copy, REPLICATED),
        Row(f"{_IN}per_layer_projection.weight", {f"{_HF}per_layer_projection.weight": (D, P)}, copy, REPLICATED),
        Row(
            f"{_IN}post_per_layer_input_norm.weight",
            {f"{_HF}post_per_layer_input_norm.weight": (D,)},
            copy,
            REPLICATED,
        ),
    ),
    _per_layer_inputs,
)

LOCAL = Spelling(
    "local", ((".self_attention.linear_qkv.layer_norm_weight", ".input_layernorm.weight"),), experts=SEQUENTIAL
)
"""The local layer spec knows no linear layer with a norm in front; the dense layout has none anyway."""

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
"""As slime's layers hold models with experts, and dense ones; its plugin for mbridge knows a third form, of these."""

_STACKS = (
    Stack(f"{_HF}experts.gate_up_proj", (_HF + "experts.{e}.gate_proj.weight", _HF + "experts.{e}.up_proj.weight")),
    Stack(f"{_HF}experts.down_proj", (_HF + "experts.{e}.down_proj.weight",)),
)
FUSED_SCALES = "Gemma 4 as Megatron-Bridge wrote it before July 2026, with scales multiplied into other weights"
FOREIGN = {
    ".pffl_weight": FUSED_SCALES,
    ".mlp.shared_experts.linear_fc2.post_layernorm.weight": FUSED_SCALES,
    ".experts.gate_up_proj": "Gemma 4 with its experts fused, as slime had them at first",
    ".mlp._inner_mlp.": "Gemma 4 with its experts in `_inner_mlp` modules",
}
"""Pieces of names by which layouts are recognised that no table reads."""


def _attention_of(layer: LayerConfig) -> str:
    return "_global" if layer.window is None else "_sliding"


GEMMA4_TEXT = Family(
    name="gemma4_text",
    architectures=("Gemma4ForCausalLM",),
    parse=parse_text,
    unparse=unparse_text,
    rows=(*EMBEDDINGS, *_ATTENTION, *_DENSE, *_SPARSE, *_PER_LAYER_INPUTS),
    replicas=(TIED_HEAD,),
    spellings=(TE, LOCAL, SLIME, SLIME_DENSE, SLIME_FUSED),
    hf_spellings=(HfSpelling("hub", stacks=_STACKS), HfSpelling("per_expert")),
    marks=("decoder.layers.layer_scalar",),
    foreign=FOREIGN,
    attention_of=_attention_of,
    args=to_args,
    from_args=from_args,
    local_only=lambda config: not config.num_experts,
    plain=("pre_shared_expert_layernorm", "post_shared_expert_layernorm", "post_moe_layernorm", "post_ffn_layernorm"),
)

_WRAPPED = ("model.", "model.language_model.")
_TOWERS = ("vision_tower.", "embed_vision.", "audio_tower.", "embed_audio.")
"""Megatron-Bridge's models with towers hold those of transformers, beside `language_model.`."""

GEMMA4 = replace(
    GEMMA4_TEXT,
    name="gemma4",
    architectures=("Gemma4ForConditionalGeneration",),
    parse=WRAPPER.parse,
    unparse=WRAPPER.unparse,
    rows=renamed(GEMMA4_TEXT.rows, _WRAPPED),
    replicas=(replace(TIED_HEAD, of="model.language_model.embed_tokens.weight"),),
    extras=tuple(f"model.{tower}*" for tower in _TOWERS),
    towers={tower: f"model.{tower}" for tower in _TOWERS},
    hf_spellings=tuple(
        replace(
            spelling,
            stacks=tuple(
                Stack(stack.fused.replace(*_WRAPPED), tuple(part.replace(*_WRAPPED) for part in stack.parts))
                for stack in spelling.stacks
            ),
        )
        for spelling in GEMMA4_TEXT.hf_spellings
    ),
    prefix="language_model.",
    text_only=WRAPPER.text_only,
    sizes_in="text_config",
)
