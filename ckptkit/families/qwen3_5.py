"""Qwen3.5 and 3.6, dense and with experts: Qwen3-Next's layers, with the projections of a DeltaNet in four tensors.

Published models are multimodal. The text model and the multimodal one share one table; the vision tower has no Megatron
slot: it travels as extras. Files of a model with experts have them stacked or one by one, those of the layer of
multi-token prediction independently of the others. A text model that transformers took out of a multimodal one may
keep its names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ckptkit.errors import UnsupportedError
from ckptkit.families import delta_net
from ckptkit.families.blocks import NORM_BEFORE_EXPERTS, experts, router, stacked
from ckptkit.families.delta_net import (
    DELTA_FLAT,
    MARKS,
    SHARED_EXPERT,
    delta_translation,
    values_of_delta_nets,
    with_delta_nets,
)
from ckptkit.families.llama import EMBEDDINGS, MLP, TIED_HEAD
from ckptkit.families.qwen3_next import values_of_experts, with_experts
from ckptkit.families.wrapper import Wrapper
from ckptkit.tables.config_json import ConfigJson
from ckptkit.tables.family import Family
from ckptkit.tables.model_config import ModelConfig
from ckptkit.tables.prediction import APART
from ckptkit.tables.rows import Raw, Row, renamed, without
from ckptkit.tables.spelling import HUB, TE, HfSpelling

_SHARED = {**delta_net.DEFAULTS, "vocab_size": 248320}
DEFAULTS = {
    **_SHARED,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_key_value_heads": 4,
}
MOE_DEFAULTS = {
    **_SHARED,
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts_per_tok": 8,
    "num_experts": 256,
}
_GRANTED: Mapping[str, tuple[Any, ...]] = {
    "norm_topk_prob": (True,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],),
}
"""Keys of Qwen3-Next's experts that the class of transformers does not read -> what it does."""
CONFIG = ConfigJson("qwen3_5_text", "Qwen3_5ForCausalLM", "qwen3_5_text", DEFAULTS, delta_net.ROPE)
MOE_CONFIG = ConfigJson("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", "qwen3_5_moe_text", MOE_DEFAULTS, delta_net.ROPE)


def parse_text(raw: Raw) -> ModelConfig:
    """Translates the config.json of a dense text model.

    Raises:
        InputError: A field is missing, of the wrong type, or contradicts another.
        UnsupportedError: It is a model that the class of transformers does not compute.
    """
    return with_delta_nets(CONFIG.decoder(raw), CONFIG.fields(raw))


def parse_moe_text(raw: Raw) -> ModelConfig:
    """Translates the config.json of a text model with experts; errors as `parse_text`."""
    fields = MOE_CONFIG.fields(raw)
    fields.refuse_unless(_GRANTED)
    width = fields.integer("moe_intermediate_size")  # there is no dense MLP
    config = with_delta_nets(MOE_CONFIG.decoder({**raw, "intermediate_size": width}), fields)
    return with_experts(config, fields, [True] * config.num_layers)


def _counted(config: ModelConfig) -> dict[str, Any]:
    return {"mtp_num_hidden_layers": config.mtp_layers} if config.mtp_layers else {}


def _values(config: ModelConfig) -> dict[str, Any]:
    return {**CONFIG.values(config), **values_of_delta_nets(config), **_counted(config)}


def _values_moe(config: ModelConfig) -> dict[str, Any]:
    if not all(layer.moe for layer in config.layers) or not config.norm_topk_prob:
        what = "weights that are not scaled to a sum of 1" if config.num_experts else "layers without experts"
        raise UnsupportedError(f"{what}, which config.json of {MOE_CONFIG.architecture} cannot describe")
    common = {**MOE_CONFIG.values(config), **values_of_delta_nets(config), **values_of_experts(config)}
    return {**common, **_counted(config)}


unparse_text = delta_translation(CONFIG, parse_text, _values)
unparse_moe_text = delta_translation(MOE_CONFIG, parse_moe_text, _values_moe)

_ATTENTION: tuple[Row, ...] = (
    *EMBEDDINGS,
    *delta_net.ATTENTION,
    *delta_net.QK_NORMS,
    *DELTA_FLAT,
)
_EXPERTS = (NORM_BEFORE_EXPERTS, router("mlp.gate"), *SHARED_EXPERT, *experts("mlp."))
_IN_WRAPPER = ("model.", "model.language_model.")
_MTP = "mtp.layers.0."


def _stacked(layers: str) -> tuple[HfSpelling, ...]:
    """The spellings of a model with experts: all stacked, all but those of multi-token prediction, and none."""
    block = f"{layers}layers.{{i}}."
    return (
        stacked("hub", "mlp.", layers=block, apart=_MTP),
        stacked("hub_model", "mlp.", layers=block, apart=_MTP, stack_apart=False),
        HfSpelling("per_expert"),
    )


def _of_wrapper(spelling: HfSpelling) -> HfSpelling:
    """The spelling of a text model with the names that it had in a multimodal one."""
    stacks = tuple(replace(stack, fused=stack.fused.replace(*_IN_WRAPPER, 1)) for stack in spelling.stacks)
    return replace(spelling, name=f"{spelling.name}_of_wrapper", renames=(_IN_WRAPPER,), stacks=stacks)


def _with_wrapper(spellings: tuple[HfSpelling, ...]) -> tuple[HfSpelling, ...]:
    return (*spellings, *map(_of_wrapper, spellings))


QWEN3_5_TEXT = Family(
    name="qwen3_5_text",
    architectures=("Qwen3_5ForCausalLM",),
    value_architectures=("Qwen3_5TextForSequenceClassification",),
    parse=parse_text,
    unparse=unparse_text,
    rows=(*_ATTENTION, *without(MLP, "linear_fc1.bias", "linear_fc2.bias")),
    replicas=(TIED_HEAD,),
    predicts=True,
    prediction=APART,
    spellings=(TE, delta_net.LOCAL),
    hf_spellings=_with_wrapper((HUB,)),
    marks=(*MARKS, "decoder.layers.mlp.linear_fc1.weight"),
    quirks=delta_net.QUIRKS,
    bridge=delta_net.BRIDGE,
)
QWEN3_5_MOE_TEXT = replace(
    QWEN3_5_TEXT,
    name="qwen3_5_moe_text",
    architectures=("Qwen3_5MoeForCausalLM",),
    value_architectures=(),
    parse=parse_moe_text,
    unparse=unparse_moe_text,
    rows=(*_ATTENTION, *_EXPERTS),
    hf_spellings=_with_wrapper(_stacked("model.")),
    marks=(*MARKS, "decoder.layers.mlp.router.weight"),
)

WRAPPER = Wrapper("qwen3_5", "Qwen3_5ForConditionalGeneration", CONFIG, parse_text, unparse_text, tied=False)
MOE_WRAPPER = Wrapper(
    "qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", MOE_CONFIG, parse_moe_text, unparse_moe_text, tied=False
)


def _wrapped(text: Family, wrapper: Wrapper, spellings: tuple[HfSpelling, ...]) -> Family:
    """The multimodal family around a text model."""
    return replace(
        text,
        name=wrapper.family,
        architectures=(wrapper.architecture,),
        value_architectures=(),
        bridge=None,  # its class builds the vision tower, too
        parse=wrapper.parse,
        unparse=wrapper.unparse,
        rows=renamed(text.rows, _IN_WRAPPER),
        replicas=(replace(TIED_HEAD, of="model.language_model.embed_tokens.weight"),),
        extras=("model.visual.*",),
        hf_spellings=spellings,
        prefix="language_model.",
        text_only=wrapper.text_only,
        sizes_in="text_config",
    )


QWEN3_5 = replace(
    _wrapped(QWEN3_5_TEXT, WRAPPER, (HUB,)),
    value_architectures=("Qwen3_5ForTokenClassification", "Qwen3_5ForSequenceClassification"),
)
QWEN3_5_MOE = _wrapped(QWEN3_5_MOE_TEXT, MOE_WRAPPER, _stacked("model.language_model."))
