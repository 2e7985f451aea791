"""Ranks of Megatron-Core 0.19 that make both latent vectors with one linear layer (`--mla-down-proj-fusion`)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ckptkit import Parallelism, convert, open_checkpoint, verify
from ckptkit.errors import InputError, UsageError
from tests.models import add_prediction, files_of, save_model

FUSED = "self_attention.linear_qkv_down_proj."


def content(path: Path) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = torch.load(path, weights_only=False)
    return found


@pytest.mark.parametrize(
    ("kind", "grid"),
    [("deepseek_v3", Parallelism(2, 2)), ("glm4_moe_lite", Parallelism(4, ep=2)), ("deepseek_v3", Parallelism())],
)
def test_round_trip(tmp_path: Path, kind: str, grid: Parallelism) -> None:
    source = add_prediction(save_model(tmp_path / "hf", kind))
    convert(source, tmp_path / "meg", to="torch", spec="te_fused", grid=grid)
    flags = json.loads((tmp_path / "meg" / "ckptkit" / "manifest.json").read_text())["megatron_flags"]
    assert flags is None or "--mla-down-proj-fusion" in flags
    last = sorted((tmp_path / "meg").glob("release/*/model_optim_rng.pt"))[-1]
    assert any("mtp.layers.0.mtp_model_layer." in name for name in content(last)["model"])  # 0.19's name
    convert(tmp_path / "meg", tmp_path / "back", to="hf")
    assert files_of(tmp_path / "back") == files_of(source)
    assert verify(source, tmp_path / "meg", level="weights").passed
    assert open_checkpoint(tmp_path / "meg").args["mla_down_proj_fusion"]
    shutil.rmtree(tmp_path / "meg" / "ckptkit")
    convert(tmp_path / "meg", tmp_path / "bare", to="hf", hf_reference=source)
    assert files_of(tmp_path / "bare") == files_of(source)
    by_args = open_checkpoint(tmp_path / "meg")
    assert by_args.config.latent == open_checkpoint(source).config.latent


def test_each_rank_has_its_share_of_either_vector(tmp_path: Path) -> None:
    """As `FusedMLASelfAttention` splits the output of its layer: this rank's queries, then its keys and values."""
    import torch
    from safetensors.torch import load_file

    source = save_model(tmp_path / "hf", "deepseek_v3")
    tensors = load_file(source / "model.safetensors")
    convert(source, tmp_path / "meg", to="torch", spec="te_fused", grid=Parallelism(2))
    for rank in range(2):
        model = content(tmp_path / "meg" / "release" / f"mp_rank_0{rank}" / "model_optim_rng.pt")["model"]
        for layer in range(4):
            attention = f"model.layers.{layer}.self_attn."
            parts = [tensors[f"{attention}{name}.weight"] for name in ("q_a_proj", "kv_a_proj_with_mqa")]
            expected = torch.cat([part.chunk(2)[rank] for part in parts])
            assert torch.equal(model[f"decoder.layers.{layer}.{FUSED}weight"], expected)
            norm = tensors[f"model.layers.{layer}.input_layernorm.weight"]
            assert torch.equal(model[f"decoder.layers.{layer}.{FUSED}layer_norm_weight"], norm)
            assert f"decoder.layers.{layer}.{FUSED}_extra_state" in model
            assert not any(f".layers.{layer}.input_layernorm" in name or "q_down_proj" in name for name in model)


@pytest.mark.slow
def test_megatron_core_takes_it(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    attention = pytest.importorskip("megatron.core.transformer.multi_latent_attention")
    if not hasattr(attention, "FusedMLASelfAttention"):
        pytest.skip("this megatron-core has no such layer")
    tensors = load_file(save_model(tmp_path / "hf", "deepseek_v3") / "model.safetensors")
    convert(tmp_path / "hf", tmp_path / "meg", to="torch", spec="te_fused", grid=Parallelism(2))
    names = {"queries": "q_a_proj", "keys and values": "kv_a_proj_with_mqa"}
    whole = {what: tensors[f"model.layers.0.self_attn.{name}.weight"] for what, name in names.items()}
    save_file(whole, tmp_path / "meg" / "whole.safetensors")

    def ran() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tests.formats.fused_attention", str(tmp_path / "meg")]
        return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)

    assert "equal" in ran().stdout
    path = tmp_path / "meg" / "release" / "mp_rank_01" / "model_optim_rng.pt"
    found = content(path)
    weight = found["model"][f"decoder.layers.0.{FUSED}weight"]
    weight.copy_(torch.cat((weight[12:], weight[:12])))  # the other vector first
    torch.save(found, path)
    done = ran()
    assert done.returncode and "Tensor-likes are not close" in done.stderr


def test_what_is_refused(tmp_path: Path) -> None:
    import torch

    source = save_model(tmp_path / "hf", "deepseek_v3")
    with pytest.raises(UsageError, match="exists only as per-rank files"):
        convert(source, tmp_path / "dist", to="torch_dist", spec="te_fused")
    with pytest.raises(UsageError, match="no spec 'te_fused'"):
        convert(save_model(tmp_path / "glm", "glm4_moe"), tmp_path / "no", to="torch", spec="te_fused")
    with pytest.raises(UsageError, match="builds no such model without q_lora_rank"):
        convert(
            save_model(tmp_path / "moon", "deepseek_v3", q_lora_rank=None), tmp_path / "no", to="torch", spec="te_fused"
        )
    with pytest.raises(UsageError, match="divide"):
        convert(source, tmp_path / "no", to="torch", spec="te_fused", grid=Parallelism(16, etp=1))
    convert(source, tmp_path / "meg", to="torch", spec="te_fused", grid=Parallelism(2))
    path = tmp_path / "meg" / "release" / "mp_rank_01" / "model_optim_rng.pt"
    found = content(path)
    del found["model"][f"decoder.layers.1.{FUSED}weight"]
    torch.save(found, path)
    with pytest.raises(InputError, match=r"missing: .*linear_qkv_down_proj\.weight"):
        open_checkpoint(tmp_path / "meg")
