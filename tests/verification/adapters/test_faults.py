"""Faults in adapters: the level weights names them, and the level logits alone sees them, too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ckptkit import convert
from ckptkit.sharding.grid import Parallelism
from ckptkit.verification.adapters.verify import verify_adapter
from ckptkit.verification.ranks.pool import RankPool
from tests.lora import save_adapter, tensors_of
from tests.models import save_llama, save_model
from tests.verification.adapters.test_against_peft import QUIET, logits_of

PREFIX = "base_model.model.model.layers."
Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    done: dict[str, tuple[Path, Path]] = {}

    def get(kind: str) -> tuple[Path, Path]:
        if kind not in done:
            folder = tmp_path_factory.mktemp("faults")
            experts, config = kind == "qwen3_moe", {**QUIET, "use_rslora": kind == "rslora"}
            base = save_model(folder / "base", kind) if experts else save_llama(folder / "base", "mha", head_dim=8)
            done[kind] = base, save_adapter(folder / "adapter", base, **config)
        return done[kind]

    return get


def exchange(first: str, second: str) -> Change:
    """Two factors change places; transposed where A and B do."""

    def change(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        one, other = f"{PREFIX}{first}.weight", f"{PREFIX}{second}.weight"
        turned = tensors[one].shape != tensors[other].shape
        tensors[one], tensors[other] = (
            (tensor.T if turned else tensor).contiguous() for tensor in (tensors[other], tensors[one])
        )

    return change


def put(**values: Any) -> Change:
    return lambda config, tensors: config.update(values)


def shift_experts(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Each expert of a layer gets the factors of the one before it."""
    for name, tensor in tensors.items():
        if ".layers.1.mlp.experts." in name:
            side = name.rpartition("lora_")[2][0]
            experts = tensor.reshape(4, -1, tensor.shape[1]) if side == "A" else tensor.reshape(len(tensor), -1, 4)
            tensors[name] = experts.roll(1, 0 if side == "A" else 2).reshape(tensor.shape).contiguous()


FAULTS: dict[str, tuple[str, Change, str, str, str]] = {
    # what -> kind of model, change, what the weights say, where the logits part, which tensor is named there
    "alpha lost": ("llama", put(lora_alpha=4), "the scale is 1, and should be 0.5", "layer 0 self_attention", "qkv"),
    "A and B exchanged": (
        "llama",
        exchange("1.self_attn.o_proj.lora_A", "1.self_attn.o_proj.lora_B"),
        "model.layers.1.self_attn.o_proj: A and B are exchanged",
        "layer 1 self_attention",
        "linear_proj.adapter.linear_in.weight",
    ),
    "q's B under k": (
        "llama",
        exchange("2.self_attn.q_proj.lora_B", "2.self_attn.k_proj.lora_B"),
        "model.layers.2.self_attn.k_proj: B is that of model.layers.2.self_attn.q_proj",
        "layer 2 self_attention",
        "linear_qkv.adapter.linear_out.weight",
    ),
    "rslora read as plain": (
        "rslora",
        put(use_rslora=False),
        "the scale is 0.5, and should be 1 (alpha / rank, where the adapter has alpha / sqrt(rank))",
        "layer 0 self_attention",
        "linear_qkv.adapter.linear_in.weight",
    ),
    "experts shifted": (
        "qwen3_moe",
        shift_experts,
        "model.layers.1.mlp.experts.0.gate_proj: A is that of model.layers.1.mlp.experts.3.",
        "layer 1 mlp",
        "local_experts.0.linear_fc1.adapter.linear_in.weight",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(saved: Any, tmp_path: Path, pool: RankPool, fault: str) -> None:
    kind, change, said, place, tensor = FAULTS[fault]
    base, adapter = saved(kind)
    faulty = Path(shutil.copytree(adapter, tmp_path / "faulty"))
    config, tensors = json.loads((faulty / "adapter_config.json").read_text()), tensors_of(faulty)
    change(config, tensors)
    (faulty / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, faulty / "adapter_model.safetensors")
    grid = Parallelism(ep=2) if kind == "qwen3_moe" else Parallelism(2)
    convert(faulty, tmp_path / "meg", to="torch", grid=grid, hf_reference=base)
    report = verify_adapter(base, tmp_path / "meg", adapter, level="weights")
    assert not report.passed and [level.name for level in report.levels] == ["structure", "weights"]
    assert any(said in problem for problem in report.levels[-1].details["problems"]), report.levels[-1].summary
    found = logits_of(base, adapter, tmp_path / "meg", pool, grid=grid, greedy=0)
    assert not found.passed, found.summary
    assert found.location is not None and found.location.place == place, found.messages
    assert any(tensor in name for name in found.location.tensors), found.location.tensors
