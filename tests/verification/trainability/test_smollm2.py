"""A real model: the first layers of SmolLM2-135M, with its vocabulary of 49152 tokens, on two CPU ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ckptkit.verification.ranks.pool import RankPool
from ckptkit.verification.trainability.level import verify_trainability
from tests.verification.conftest import DEVICE

LAYERS = 4
"""So many of its 30: a step then takes seconds on a CPU."""


def first_layers(source: Path, target: Path) -> Path:
    """A Llama of the first layers of another one, its embedding, final norm and head."""
    from safetensors.torch import load_file, save_file

    config = json.loads((source / "config.json").read_text())
    config["num_hidden_layers"] = LAYERS
    config.pop("layer_types", None)
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    kept = {k: v for k, v in tensors.items() if ".layers." not in k or int(k.split(".")[2]) < LAYERS}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.slow
def test_smollm2_learns(tmp_path: Path, pool: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "examples")
    import smollm2

    smollm2.write(tmp_path / "whole", "float32")
    path = first_layers(tmp_path / "whole", tmp_path / "first")
    (answer,) = verify_trainability(path, pool=pool, device=DEVICE, prompts=2, pp=2, packed=True).levels
    found = answer.details
    print(f"\n{answer.summary} ({answer.seconds:.0f} s)")
    assert answer.passed, answer.summary
    assert found["initial_error"] >= 4.0 and found["final_error"] <= found["initial_error"] / 2
