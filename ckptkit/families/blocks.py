"""Blocks of a layer that several families have beyond Llama's: norms of queries and keys, experts, shared experts."""

from __future__ import annotations

from ckptkit.sharding.rules import EXPERT_GATED_COLUMN, EXPERT_ROW, REPLICATED, ROW
from ckptkit.tables.dims import HD, D, E, I, S
from ckptkit.tables.layouts import gate_up
from ckptkit.tables.rows import HF_LAYER, Row, layer, sparse
from ckptkit.tables.spelling import HfSpelling, Stack

QK_NORMS = (
    layer("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", (HD,)),
    layer("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", (HD,)),
)
"""The norms of queries and keys, head by head."""


NORM_BEFORE_EXPERTS = layer("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", (D,), when=sparse)
"""The norm before experts, where Hugging Face calls it as it calls the one before a dense MLP."""


def router(name: str) -> Row:
    """The row of the router of a layer with experts, by its Hugging Face name inside the layer."""
    return layer("mlp.router.weight", f"{name}.weight", (E, D), REPLICATED, when=sparse)


def experts(block: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> tuple[Row, ...]:
    """The rows of a layer's experts.

    Args:
        block: The Hugging Face module that holds the list of experts, inside a layer, with a dot; empty for none.
        gate: Hugging Face's name of an expert's gate projection.
        up: Its name of an expert's up projection.
        down: Its name of an expert's down projection.
    """
    expert = block + "experts.{e}."
    fc1 = gate_up(expert + "*.weight", **{gate: (I, D), up: (I, D)})
    return (
        layer("mlp.experts.linear_fc1.weight{e}", fc1, split=EXPERT_GATED_COLUMN, when=sparse),
        layer("mlp.experts.linear_fc2.weight{e}", f"{expert}{down}.weight", (D, I), EXPERT_ROW, when=sparse),
    )


EXPERT_BIAS = layer("mlp.router.expert_bias", "mlp.gate.e_score_correction_bias", (E,), when=sparse, buffer=True)
"""The bias on the scores by which experts are chosen, which no gradient trains."""

_SHARED = "mlp.shared_experts."
SHARED_EXPERTS = (
    layer(f"{_SHARED}linear_fc1.weight", gate_up(f"{_SHARED}*_proj.weight", gate=(S, D), up=(S, D)), when=sparse),
    layer(f"{_SHARED}linear_fc2.weight", f"{_SHARED}down_proj.weight", (D, S), ROW, when=sparse),
)
"""The experts that every token goes through, which both libraries run as one MLP."""


def stacked(
    name: str,
    block: str,
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
    *,
    layers: str = HF_LAYER,
    fused: str | None = None,
    apart: str | None = None,
    stack_apart: bool = True,
) -> HfSpelling:
    """The spelling of files with one tensor for the gate and up projections of all experts, and one for the down ones.

    Args:
        name: The spelling's name.
        block: As for `experts`.
        gate: As for `experts`.
        up: As for `experts`.
        down: As for `experts`.
        layers: Hugging Face's name of a layer.
        fused: `block` as these files name it, if they name it differently.
        apart: Hugging Face's name of a layer of multi-token prediction that is not numbered behind the others, or None.
        stack_apart: Whether the experts of that one are stacked, too.
    """
    stacks: list[Stack] = []
    for place in (layers, apart) if apart is not None and stack_apart else (layers,):
        expert, home = f"{place}{block}experts.{{e}}.", f"{place}{block if fused is None else fused}experts."
        stacks.append(Stack(f"{home}gate_up_proj", (f"{expert}{gate}.weight", f"{expert}{up}.weight")))
        stacks.append(Stack(f"{home}down_proj", (f"{expert}{down}.weight",)))
    renames = () if fused is None else ((f".{block}", f".{fused}"),)
    return HfSpelling(name, renames, tuple(stacks), predicted=apart is None)
