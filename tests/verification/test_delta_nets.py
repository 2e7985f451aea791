"""The second run of the reference, in which gated DeltaNets round elsewhere and compute the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.qwen3_next import modeling_qwen3_next as code

from ckptkit.verification import delta_nets
from ckptkit.verification.delta_nets import CHUNK, rounded_once
from tests.megatron import qwen3_next

RULE = "torch_chunk_gated_delta_rule"


@pytest.fixture(scope="module")
def layer() -> torch.nn.Module:
    (first, *_) = delta_nets.delta_nets(qwen3_next.hf_model())
    return first


def test_every_part_of_a_layer_is_another(layer: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stand-in is called, the delta rule with shorter chunks; afterwards everything is as it was."""
    called: list[str] = []

    def note(home: Any, name: str) -> None:
        own = getattr(home, name)

        def noted(*args: Any, **options: Any) -> Any:
            called.append(f"{name} {options.get('chunk_size', '')}".strip())
            return own(*args, **options)

        monkeypatch.setattr(home, name, noted)

    note(code, RULE)
    for name in ("_convolved", "_gated"):
        note(delta_nets, name)
    states = torch.randn(1, 2 * CHUNK + 3, 96)
    with torch.no_grad(), rounded_once(layer):
        inside = layer(states)
    assert sorted(called) == ["_convolved", "_gated", f"{RULE} {CHUNK}"]
    with torch.no_grad():
        outside = layer(states)
    assert called[3:] == [RULE]
    assert torch.allclose(inside, outside, rtol=1e-4, atol=1e-4 * float(outside.abs().max()))
