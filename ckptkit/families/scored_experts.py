"""The keys of config.json for experts that are chosen by a sigmoid: those of DeepSeek-V3, which GLM took over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ckptkit.errors import InputError, UnsupportedError
from ckptkit.families.blocks import EXPERT_BIAS, NORM_BEFORE_EXPERTS, SHARED_EXPERTS, experts, router
from ckptkit.families.llama import MLP
from ckptkit.tables.config_fields import Fields
from ckptkit.tables.model_config import SIGMOID, ModelConfig
from ckptkit.tables.rows import dense, only, without

ALIASES = (("n_routed_experts", "num_local_experts"), ("num_nextn_predict_layers", "num_mtp_layers"))

_GRANTED = {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,)}
"""Keys of published files that the classes of transformers do not read -> the value that they take for granted."""

ROWS = (
    *without(only(MLP, dense), "linear_fc1.bias", "linear_fc2.bias"),
    NORM_BEFORE_EXPERTS,
    router("mlp.gate"),
    EXPERT_BIAS,
    *SHARED_EXPERTS,
    *experts("mlp."),
)
"""The rows of a layer's MLP, dense or with experts."""


def first_dense(fields: Fields, num_layers: int) -> list[bool]:
    """Whether each layer has experts: all but the first `first_k_dense_replace`.

    Raises:
        InputError: That is no number of layers.
    """
    count = fields.get("first_k_dense_replace")
    if type(count) is not int or count < 0:
        raise InputError(f"config.json: first_k_dense_replace must be a number of layers, not {count!r}")
    return [number >= count for number in range(num_layers)]


def dense_count(config: ModelConfig) -> int:
    """`first_k_dense_replace` of a model.

    Raises:
        UnsupportedError: A dense layer follows one with experts.
    """
    moe = [layer.moe for layer in config.layers]
    if moe != sorted(moe):
        raise UnsupportedError(
            f"layer {moe.index(True)} has experts, and a layer after it is dense",
            hint="config.json of this family can describe dense layers only before all others",
        )
    return moe.count(False)


def with_experts(config: ModelConfig, fields: Fields, moe: Sequence[bool]) -> ModelConfig:
    """`config` with the experts that config.json describes.

    Args:
        config: The model without them.
        fields: config.json.
        moe: Whether each layer has experts.

    Raises:
        InputError: A field is missing, of the wrong type, or contradicts another.
        UnsupportedError: It is another router.
    """
    fields.refuse_unless(_GRANTED)
    count, chosen = fields.experts("n_routed_experts")
    groups, of_groups = fields.integer("n_group"), fields.integer("topk_group")
    if count % groups or of_groups > groups:
        raise InputError(f"config.json: topk_group {of_groups} of n_group {groups} of n_routed_experts {count}")
    if chosen > (there := count // groups * of_groups):
        raise InputError(f"config.json: num_experts_per_tok {chosen} of the {there} experts in {of_groups} groups")
    size = fields.integer("moe_intermediate_size")
    return replace(
        config,
        layers=tuple(replace(layer, moe=has) for layer, has in zip(config.layers, moe, strict=True)),
        num_experts=count,
        experts_per_token=chosen,
        moe_ffn_hidden_size=size,
        shared_expert_size=size * fields.integer("n_shared_experts"),
        norm_topk_prob=fields.flag("norm_topk_prob"),
        router_score=SIGMOID,
        router_in_fp32=True,
        expert_bias=True,
        routed_scaling=fields.number("routed_scaling_factor"),
        router_groups=groups,
        router_groups_chosen=of_groups,
    )


def values_of_experts(config: ModelConfig) -> dict[str, Any]:
    """The values of `config` for the keys that `with_experts` reads.

    Raises:
        UnsupportedError: There are no experts, or the shared ones are no whole number of them.
    """
    if not config.moe_ffn_hidden_size:
        raise UnsupportedError("a model without experts, which this family always has")
    shared, rest = divmod(config.shared_expert_size, config.moe_ffn_hidden_size)
    if rest:
        raise UnsupportedError(
            f"shared experts of width {config.shared_expert_size}, which is no multiple of {config.moe_ffn_hidden_size}"
        )
    return {
        "n_routed_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": config.moe_ffn_hidden_size,
        "n_shared_experts": shared,
        "norm_topk_prob": config.norm_topk_prob,
        "routed_scaling_factor": config.routed_scaling,
        "n_group": config.router_groups,
        "topk_group": config.router_groups_chosen,
    }
