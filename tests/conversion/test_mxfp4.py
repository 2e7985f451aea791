"""GPT-OSS in MXFP4: its archive as a source, as a reference, and as an output."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ckptkit.conversion.convert import convert
from ckptkit.inspection.summary import inspect
from ckptkit.sharding.grid import Parallelism
from ckptkit.verification.levels import verify
from tests.conversion.test_reading_quantised import same, tensors_of
from tests.models import files_of, save_model
from tests.quantised import quantise_mxfp4, read_mxfp4, rounded


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its experts' outputs are as wide as their inputs, so that no shape tells them apart."""
    return save_model(tmp_path_factory.mktemp("plain") / "hf", "gpt_oss", dtype="bfloat16")


@pytest.fixture(scope="module")
def archive(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive") / "hf"
    quantise_mxfp4(plain, folder)
    return folder


def weights_of(folder: Path) -> dict[str, bytes]:
    """The files of a Megatron checkpoint without its sidecar."""
    return {name: data for name, data in files_of(folder).items() if not name.startswith("ckptkit/")}


def test_every_number(plain: Path, archive: Path, tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    stored, expected = tensors_of(archive), tensors_of(plain)
    for name in [name for name in stored if name.endswith("_blocks")]:
        blocks, scales = stored[name], stored[name.replace("_blocks", "_scales")]
        numbers = rounded(read_mxfp4(blocks.numpy(), scales.numpy()), "bfloat16").transpose(1, 2).contiguous()
        assert torch.equal(numbers, convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16))
        assert expected[name.removesuffix("_blocks")].shape == numbers.shape
        expected[name.removesuffix("_blocks")] = numbers
    convert(archive, tmp_path / "hf", to="hf")
    assert same(tensors_of(tmp_path / "hf"), expected)
    for to, grid in (("torch", Parallelism(2, 2)), ("torch_dist", Parallelism(1, 2, ep=2))):
        convert(archive, tmp_path / to, to=to, grid=grid)
        convert(tmp_path / "hf", tmp_path / f"{to}-plain", to=to, grid=grid)
        assert weights_of(tmp_path / to) == weights_of(tmp_path / f"{to}-plain")
        convert(tmp_path / to, tmp_path / f"{to}-back", to="hf")
        assert files_of(tmp_path / f"{to}-back") == files_of(tmp_path / "hf")
    facts = inspect(archive).quantised
    assert facts is not None and facts["scheme"] == "MXFP4, groups of 32" and facts["tensors"] == 8


def test_what_was_not_touched_comes_back_byte_for_byte(archive: Path, tmp_path: Path) -> None:
    convert(archive, tmp_path / "meg", to="torch_dist", grid=Parallelism(2, 2))
    result = convert(tmp_path / "meg", tmp_path / "back", to="hf", quantise=f"like:{archive}")
    assert files_of(tmp_path / "back") == files_of(archive)
    assert result.likeness == {"same": 8, "old_scales": [], "new_scales": []}


def test_new_codes(plain: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import Mxfp4Config

    result = convert(plain, tmp_path / "mxfp4", to="hf", quantise="mxfp4")
    assert any("mxfp4 is for experts alone" in note for note in result.notes)
    stored, exact = tensors_of(tmp_path / "mxfp4"), tensors_of(plain)
    for name in [name for name in stored if name.endswith("_scales")]:
        values = exact[name.removesuffix("_scales")].transpose(1, 2).float().unflatten(2, (-1, 32)).abs().amax(dim=3)
        assert np.array_equal(stored[name].numpy(), values.log2().floor().numpy() - 2 + 127)
    (level,) = [level for level in verify(plain, tmp_path / "mxfp4", level="weights").levels if level.name == "weights"]
    assert level.passed and "8 quantised tensors are within the noise of MXFP4" in level.summary
    convert(tmp_path / "mxfp4", tmp_path / "read", to="hf")
    config = Mxfp4Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mxfp4", quantization_config=config, dtype=torch.bfloat16)
    theirs, ours = model.state_dict(), tensors_of(tmp_path / "read")
    for name in ours:
        assert torch.equal(ours[name], theirs[name].to(torch.bfloat16)), name


def test_other_schemes_leave_its_experts_out(plain: Path, tmp_path: Path) -> None:
    convert(plain, tmp_path / "fp8", to="hf", quantise="fp8-block")
    stored = tensors_of(tmp_path / "fp8")
    assert {name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn} == {
        f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in range(4) for name in "qkvo"
    }
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert "model.layers.0.mlp.router" in config["quantization_config"]["modules_to_not_convert"]
