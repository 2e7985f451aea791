"""The second run of the reference, in which gated DeltaNets round elsewhere and compute the same."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen3_next import modeling_qwen3_next as code

from ckptkit.verification import delta_nets
from ckptkit.verification.delta_nets import CHUNK, rounded_once
from tests.megatron import qwen3_next


@pytest.fixture(scope="module")
def layer() -> torch.nn.Module:
    (first, *_) = delta_nets.delta_nets(qwen3_next.hf_model())
    return first


def test_every_part_of_a_layer_is_another(layer: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stand-in is called, the delta rule with shorter chunks; afterwards everything is as it was."""
    rule, called = code.torch_chunk_gated_delta_rule, []
    for name in ("_convolved", "_gated"):
        own = getattr(delta_nets, name)
        monkeypatch.setattr(
            delta_nets,
            name,
            lambda *args, own=own, name=name, **options: (called.append(name), own(*args, **options))[1],
        )

    def noted(*args: object, chunk_size: int = 64, **options: object) -> object:
        called.append(chunk_size)
        return rule(*args, chunk_size=chunk_size, **options)

    monkeypatch.setattr(code, "torch_chunk_gated_delta_rule", noted)
    states = torch.randn(1, 2 * CHUNK + 3, 96)
    with torch.no_grad(), rounded_once(layer):
        inside = layer(states)
    assert sorted(map(str, called)) == sorted([str(CHUNK), "_convolved", "_gated"])
    with torch.no_grad():
        outside = layer(states)
    assert len(called) == 4 and called[-1] == 64
    assert torch.allclose(inside, outside, rtol=1e-4, atol=1e-4 * float(outside.abs().max()))
