"""States beside tensors, and the norm before experts: what the modules of both layer specs have.

That real modules ask for exactly these is tested with Megatron-Core in `tests/formats/test_torch_dist.py`, and with
what Transformer Engine's modules ask for in `tests/formats/test_te_keys.py`.
"""

from __future__ import annotations

import pytest

from ckptkit.tables.family import MegatronQuirks
from ckptkit.tables.megatron_names import distributed_states, norms_from_local_spec, norms_of_local_spec, rank_states

LAYER = "decoder.layers.3."
OWN = MegatronQuirks(plain=("post_moe_layernorm",), parallel=("per_layer_model_proj",))


@pytest.mark.parametrize(
    ("name", "ranks", "te", "local"),
    [
        ("self_attention.linear_qkv.weight", ["linear_qkv", "core_attention"], ["linear_qkv"], True),
        ("self_attention.linear_qkv.layer_norm_weight", ["linear_qkv", "core_attention"], [], True),
        ("self_attention.q_layernorm.weight", ["q_layernorm"], ["q_layernorm"], False),
        ("mlp.linear_fc2.bias", ["linear_fc2"], [], True),
        ("mlp.router.weight", [], [], True),
        ("mlp.post_moe_layernorm.weight", [], [], False),
    ],
)
def test_states_of_a_layer(name: str, ranks: list[str], te: list[str], local: bool) -> None:
    block = LAYER + name.split(".")[0]
    assert rank_states(LAYER + name, OWN) == [f"{block}.{module}._extra_state" for module in ranks]
    expected = [f"{block}.{module}._extra_state" for module in te]
    assert distributed_states(LAYER + name, "te", OWN) == expected
    assert distributed_states(LAYER + name, "local", OWN) == (expected[:1] if local else [])


def test_states_outside_of_layers_and_of_experts() -> None:
    assert distributed_states("per_layer_model_proj.weight", "local", OWN) == ["per_layer_model_proj._extra_state"]
    assert distributed_states("per_layer_model_proj.weight", "local", MegatronQuirks()) == []
    hybrid = ["output_layer._extra_state", "decoder.final_norm._extra_state"]
    assert distributed_states("decoder.final_norm.weight", "te", OWN) == hybrid
    assert distributed_states("decoder.final_norm.weight", "local", OWN) == hybrid
    last = "decoder.final_layernorm"
    for spec in ("te", "local"):
        assert distributed_states(f"{last}.weight", spec, OWN) == [f"{last}._extra_state"]
    expert = LAYER + "mlp.experts.linear_fc1."
    assert distributed_states(f"{expert}weight12", "local", OWN) == [f"{expert}_extra_state12"]
    assert rank_states(f"{expert}weight12", OWN) == [f"{expert}_extra_state"]


def test_the_norm_before_experts_goes_and_comes_back() -> None:
    sparse = {LAYER + name for name in ("pre_mlp_layernorm.weight", "mlp.router.weight")}
    sparse |= {f"{LAYER}mlp.experts.linear_fc1.weight{expert}" for expert in range(2)}
    dense = {f"decoder.layers.0.mlp.linear_fc1.{kind}" for kind in ("weight", "layer_norm_weight")}
    there = norms_of_local_spec(sparse | dense)
    assert there == {LAYER + "pre_mlp_layernorm.weight": LAYER + "mlp.linear_fc1.layer_norm_weight"}
    stored = {there.get(name, name) for name in sparse | dense}
    back = norms_from_local_spec(stored)
    assert {back.get(name, name) for name in stored} == sparse | dense
    assert not norms_of_local_spec(dense) and not norms_from_local_spec(sparse | dense)
