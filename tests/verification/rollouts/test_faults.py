"""Faults between engine and trainer, all told from rounding; docs/rollouts.md has the table.

    pytest -m slow -s tests/verification/rollouts/test_faults.py

prints it again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptkit import convert
from ckptkit.verification.ranks.pool import RankPool
from ckptkit.verification.reference import load_model
from ckptkit.verification.rollouts.verify import verify_engine
from tests.rollouts import sample, write
from tests.verification.rollouts.conftest import Recorded

DOCUMENT = Path(__file__).parents[3] / "docs" / "rollouts.md"


def shift_layers(model: Any) -> None:
    """Every layer gets the weights of the next one."""
    layers = model.model.layers
    states = [{name: value.clone() for name, value in layer.state_dict().items()} for layer in layers]
    for number, layer in enumerate(layers):
        layer.load_state_dict(states[(number + 1) % len(layers)])


def disturb(weight: torch.Tensor, share: float) -> None:
    """Adds noise of a share of the weight's size."""
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(7))
    weight.add_(noise * share * weight.square().mean().sqrt())


def leave_a_weight(model: Any) -> None:
    """One matrix is of an earlier step."""
    disturb(model.model.layers[1].mlp.down_proj.weight, 0.1)


def leave_the_adapter(model: Any) -> None:
    """The engine lacks an update of rank 4 in all queries and values."""
    draw = torch.Generator().manual_seed(7)
    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.v_proj):
            down, up = (torch.randn(size, 4, generator=draw) for size in linear.weight.shape)
            update = down @ up.T
            linear.weight.sub_(update * 0.2 * linear.weight.norm() / update.norm())


def shuffle_experts(model: Any) -> None:
    """The experts of one layer are numbered otherwise; its router is not."""
    experts = model.model.layers[1].mlp.experts
    for weight in (experts.gate_up_proj, experts.down_proj):
        weight.copy_(weight.roll(1, 0))


FAULTS: dict[str, tuple[str, Callable[[Any], None] | None, dict[str, Any]]] = {
    "layers shifted by one": ("dense", shift_layers, {}),
    "rotary base 20000 for 10000": ("dense", None, {"rope_theta": 20000.0}),
    "one matrix of an earlier step (10 % of its size)": ("dense", leave_a_weight, {}),
    "adapter of rank 4 missing (20 % of queries and values)": ("dense", leave_the_adapter, {}),
    "experts of a layer numbered otherwise": ("sparse", shuffle_experts, {}),
    "temperature 0.8, unknown to the reader": ("dense", None, {"temperature": 0.8}),
}
"""Fault -> the model, what is done to the engine's weights, and to its config or its sampling."""


@pytest.fixture(scope="module")
def models(request: pytest.FixtureRequest) -> dict[str, Recorded]:
    return {name: request.getfixturevalue(name) for name in ("dense", "sparse")}


def engine(model: Recorded, fault: str, folder: Path, dtype: str) -> Path:
    """What an engine with a fault records."""
    _, change, other = FAULTS[fault]
    path = folder / "engine"
    loaded = load_model(model.path, torch.float32)
    if change is not None:
        with torch.no_grad():
            change(loaded)
    loaded.save_pretrained(path)
    if "rope_theta" in other:
        raw = json.loads((path / "config.json").read_text())
        raw["rope_parameters"]["rope_theta"] = other["rope_theta"]
        (path / "config.json").write_text(json.dumps(raw))
    records = sample(path, dtype=dtype, temperature=other.get("temperature", 1.0), tokens=40)
    return write(folder / "r.jsonl", records)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_faults_are_told_from_rounding(
    models: dict[str, Recorded], tmp_path: Path, pool: RankPool, fault: str | None, dtype: str
) -> None:
    for name in ("dense", "sparse") if fault is None else (FAULTS[fault][0],):
        model = models[name]
        if fault is None:
            file = write(tmp_path / f"{name}.jsonl", sample(model.path, dtype=dtype, tokens=40))
        else:
            file = engine(model, fault, tmp_path, dtype)
        report = verify_engine(None, model.megatron, file, engine_dtype=dtype, dtype=dtype, pool=pool)
        details = report.levels[0].details
        found, floor = details["columns"]["candidate"], details["floor"]
        print(
            f"\n| {fault or f'none ({name})'} | {dtype} | {found['mean']:.1e} | {found['mean'] / floor['mean']:.1f} |"
            f" {found['p99'] / floor['p99']:.1f} | {found['k3']:.1e} | {'same' if report.passed else 'differs'} |"
        )
        assert report.passed == (fault is None), report.levels[0].summary
        assert details["scaled"] == (fault is not None and "temperature" in fault)


def test_the_table_has_every_fault() -> None:
    rows = re.findall(r"^\| (.+?) \| (float32|bfloat16) \|", DOCUMENT.read_text(encoding="utf-8"), re.M)
    assert {name for name, _ in rows if not name.startswith("none")} == set(FAULTS)
    assert all({dtype for name, dtype in rows if name == fault} == {"float32", "bfloat16"} for fault in FAULTS)


def test_conversions_keep_the_model_that_engines_sample(dense: Recorded, tmp_path: Path, pool: RankPool) -> None:
    """A recording fits every layout of its model."""
    convert(dense.megatron, tmp_path / "packed", to="packed")
    assert verify_engine(None, tmp_path / "packed", dense.file, engine_dtype="float32", pool=pool).passed
