"""Qwen3-Next: gated DeltaNets, attention with an output gate, and experts with a shared one beside them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ckptkit.families import delta_net
from ckptkit.families.blocks import NORM_BEFORE_EXPERTS, experts, router, stacked
from ckptkit.families.delta_net import (
    BRIDGE,
    DELTA_BY_HEAD,
    SHARED_EXPERT,
    delta_translation,
    values_of_delta_nets,
    with_delta_nets,
)
from ckptkit.families.llama import EMBEDDINGS, MLP, TIED_HEAD
from ckptkit.families.qwen import dense_layers, dense_of
from ckptkit.tables.config_fields import Fields
from ckptkit.tables.config_json import ConfigJson
from ckptkit.tables.family import Family
from ckptkit.tables.model_config import ModelConfig
from ckptkit.tables.prediction import APART
from ckptkit.tables.rows import Raw, dense, only, without
from ckptkit.tables.spelling import HUB, TE

DEFAULTS = {
    **delta_net.DEFAULTS,
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 48,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts_per_tok": 10,
    "num_experts": 512,
    "norm_topk_prob": True,
    "mlp_only_layers": None,
}
CONFIG = ConfigJson("qwen3_next", "Qwen3NextForCausalLM", "qwen3_next", DEFAULTS, delta_net.ROPE)


def parse(raw: Raw) -> ModelConfig:
    """Translates a config.json of Qwen3-Next.

    Raises:
        InputError: A field is missing, of the wrong type, or contradicts another.
    """
    fields = CONFIG.fields(raw)
    config = with_delta_nets(CONFIG.decoder(raw), fields)
    without_experts = dense_layers(fields, config.num_layers)
    config = with_experts(config, fields, [number not in without_experts for number in range(config.num_layers)])
    return replace(config, norm_topk_prob=fields.flag("norm_topk_prob"))


def with_experts(config: ModelConfig, fields: Fields, moe: list[bool]) -> ModelConfig:
    """`config` with the experts that config.json describes.

    Args:
        config: The model without them.
        fields: config.json.
        moe: Whether each layer has experts.

    Raises:
        InputError: A field is missing, of the wrong type, or contradicts another.
    """
    count, chosen = fields.experts("num_experts")
    return replace(
        config,
        layers=tuple(replace(one, moe=has) for one, has in zip(config.layers, moe, strict=True)),
        num_experts=count,
        experts_per_token=chosen,
        moe_ffn_hidden_size=fields.integer("moe_intermediate_size"),
        shared_expert_size=fields.integer("shared_expert_intermediate_size"),
        shared_expert_gate=True,
    )


def _values(config: ModelConfig) -> dict[str, Any]:
    return {
        **CONFIG.values(config),
        **values_of_delta_nets(config),
        **values_of_experts(config),
        "norm_topk_prob": config.norm_topk_prob,
        "mlp_only_layers": dense_of(config),
        **({"num_nextn_predict_layers": config.mtp_layers} if config.mtp_layers else {}),
    }


def values_of_experts(config: ModelConfig) -> dict[str, Any]:
    """The values of `config` for the keys that `with_experts` reads."""
    return {
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": config.moe_ffn_hidden_size,
        "shared_expert_intermediate_size": config.shared_expert_size,
    }


_unparse = delta_translation(CONFIG, parse, _values)


def unparse(config: ModelConfig, base: Raw) -> dict[str, Any]:
    """The raw config.json of `config`. If its dense layers differ from those of `base`, they are listed one by one."""
    raw = _unparse(config, base)
    if base and dense_of(parse(base)) != dense_of(config):
        raw["decoder_sparse_step"] = 1
    return raw


QWEN3_NEXT = Family(
    name="qwen3_next",
    architectures=("Qwen3NextForCausalLM",),
    value_architectures=("Qwen3NextForTokenClassification", "Qwen3NextForSequenceClassification"),
    parse=parse,
    unparse=unparse,
    rows=(
        *EMBEDDINGS,
        *delta_net.ATTENTION,
        *delta_net.QK_NORMS,
        *DELTA_BY_HEAD,
        *without(only(MLP, dense), "linear_fc1.bias", "linear_fc2.bias"),
        NORM_BEFORE_EXPERTS,
        router("mlp.gate"),
        *SHARED_EXPERT,
        *experts("mlp."),
    ),
    replicas=(TIED_HEAD,),
    spellings=(TE, delta_net.LOCAL),
    predicts=True,
    prediction=APART,
    hf_spellings=(
        HUB,
        stacked("fused", "mlp.", apart="mtp.layers.0."),
        stacked("fused_model", "mlp.", apart="mtp.layers.0.", stack_apart=False),
    ),
    marks=(*delta_net.MARKS, "decoder.layers.mlp.router.weight"),
    quirks=delta_net.QUIRKS,
    bridge=replace(BRIDGE, with_experts={**BRIDGE.with_experts, "moe_router_dtype": "fp32"}),  # of `Qwen3NextBridge`
)
