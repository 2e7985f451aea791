"""DoRA on Megatron ranks, against peft on transformers: whole rows count, and biases are not scaled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ckptkit import convert
from ckptkit.sharding.grid import Parallelism
from ckptkit.verification.adapters.verify import verify_adapter
from ckptkit.verification.ranks.pool import RankPool
from tests.lora import save_adapter
from tests.models import save_llama, save_model
from tests.verification.adapters.test_against_peft import logits_of
from tests.verification.conftest import DEVICE

DORA: dict[str, Any] = {"use_dora": True, "lora_alpha": 2}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
CASES: list[tuple[str, Parallelism, dict[str, Any]]] = [
    ("llama", Parallelism(2), {"sequence_parallel": True}),
    ("gemma3", Parallelism(2, 2), {}),  # the norm after a row-parallel linear is inside of it
    ("qwen3_moe", Parallelism(1, 2), {}),
]
EVERY = ["llama", "gemma3", "gemma4_text-dense", "qwen2", "qwen3", "mistral", "qwen3_moe"]


def save(folder: Path, kind: str) -> tuple[Path, Path]:
    base = save_llama(folder / "base", "biased") if kind == "llama" else save_model(folder / "base", kind)
    targets = {"target_modules": ATTENTION} if "moe" in kind else {}  # peft has no DoRA of packed experts
    return base, save_adapter(folder / "adapter", base, **DORA, **targets)


@pytest.mark.parametrize(
    ("kind", "grid", "options"),
    [
        *CASES,
        *(
            pytest.param(kind, grid, {"sequence_parallel": parallel}, marks=pytest.mark.slow)
            for kind in EVERY
            for grid, parallel in ((Parallelism(2), True), (Parallelism(4), False), (Parallelism(2, 2), True))
        ),
    ],
    ids=str,
)
def test_against_peft(tmp_path: Path, pool: RankPool, kind: str, grid: Parallelism, options: dict[str, Any]) -> None:
    base, adapter = save(tmp_path, kind)
    convert(adapter, tmp_path / "meg", to="torch", grid=grid, hf_reference=base)
    report = verify_adapter(base, tmp_path / "meg", adapter, pool=pool, device=DEVICE, **options)
    assert report.passed, report.levels[-1].summary
    assert report.levels[-1].details["own_modules"]["ckptkit.megatron.lora.DoraPair"] > 0


def test_lengths_that_are_not_the_adapters(tmp_path: Path, pool: RankPool) -> None:
    """The level weights names them, and the logits differ. Beside the weights, and in a distributed checkpoint."""
    base, adapter = save(tmp_path, "llama")
    convert(base, tmp_path / "both", to="torch_dist", grid=Parallelism(2), adapter=adapter)
    assert verify_adapter(base, tmp_path / "both", adapter, pool=pool, device=DEVICE).passed
    convert(adapter, tmp_path / "meg", to="torch", grid=Parallelism(2), hf_reference=base)
    name = "decoder.layers.1.mlp.linear_fc2.adapter.weight_magnitude"
    for file in (tmp_path / "meg").glob("release/*/*.pt"):
        content = torch.load(file, weights_only=False)
        content["model"][name] *= 3
        torch.save(content, file)
    report = verify_adapter(base, tmp_path / "meg", adapter, level="weights")
    assert report.levels[-1].details["problems"] == ["model.layers.1.mlp.down_proj.lora_magnitude_vector differs"]
    assert not logits_of(base, adapter, tmp_path / "meg", pool, grid=Parallelism(2), greedy=0).passed
