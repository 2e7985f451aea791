"""Quantised candidates: what their format explains is no difference, and every fault in codes or scales is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptkit.conversion.convert import convert
from ckptkit.errors import UsageError
from ckptkit.verification.levels import verify
from ckptkit.verification.reports.report import VerificationReport
from tests.models import save_llama
from tests.quantised import quantise_fp8

UP, GATE = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bf16 whose rows have very different sizes, as trained ones have: so do its scales."""
    folder = tmp_path_factory.mktemp("plain") / "hf"
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 320, "num_attention_heads": 8, "head_dim": 32}
    save_llama(folder, dtype="bfloat16", num_hidden_layers=2, **sizes)
    tensors = load_file(folder / "model.safetensors")
    rng = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            rows = torch.rand(-(-len(tensor) // 64), generator=rng).repeat_interleave(64)[: len(tensor), None]
            columns = torch.rand(-(-tensor.shape[1] // 32), generator=rng).repeat_interleave(32)[: tensor.shape[1]]
            tensors[name] = (tensor.float() * torch.exp(2 * rows + 2 * columns)).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def weights(reference: Path, candidate: Path) -> Any:
    report: VerificationReport = verify(reference, candidate, level="weights")
    return next(level for level in report.levels if level.name == "weights")


@pytest.mark.parametrize("scheme", ["fp8-block", "fp8-block-ue8m0", "int4"])
def test_the_noise_of_a_format_is_no_difference(plain: Path, tmp_path: Path, scheme: str) -> None:
    convert(plain, tmp_path / "out", to="hf", quantise=scheme)
    level = weights(plain, tmp_path / "out")
    assert level.passed, level.summary
    assert len(level.details["noise"]) == 14
    kind = "INT4" if scheme == "int4" else "FP8"
    assert f"14 quantised tensors are within the noise of {kind}" in level.summary
    largest = max(record["largest_of_explained"] for record in level.details["noise"])
    assert 0.5 < largest <= 1
    low, high = (0.02, 0.035) if kind == "FP8" else (0.05, 0.2)
    assert all(low < record["relative_rms"] < high for record in level.details["noise"])


def test_codes_that_came_back_are_equal(plain: Path, tmp_path: Path) -> None:
    quantise_fp8(plain, tmp_path / "reference")
    convert(tmp_path / "reference", tmp_path / "meg", to="torch_dist")
    convert(tmp_path / "meg", tmp_path / "back", to="hf", quantise=f"like:{tmp_path / 'reference'}")
    for reference in ("reference", "meg"):
        level = weights(tmp_path / reference, tmp_path / "back")
        assert level.passed and level.details["noise"] == []


def swap(tensors: dict[str, Any], left: str, right: str) -> None:
    tensors[left], tensors[right] = tensors[right].clone(), tensors[left].clone()


def exchange_nibbles(tensors: dict[str, Any]) -> None:
    data = tensors[f"{UP}.weight_packed"].view(torch.uint8).numpy()
    tensors[f"{UP}.weight_packed"] = torch.from_numpy((data << 4 | data >> 4).astype(np.uint8)).view(torch.int32)


def edit(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


O_SCALE, UP_SCALE = "model.layers.1.self_attn.o_proj.weight_scale_inv", f"{UP}.weight_scale_inv"
FAULTS: dict[str, tuple[str, Callable[[dict[str, Any]], None], str]] = {
    "transposed": ("fp8-block", edit(O_SCALE, lambda scale: scale.T), "o_proj"),
    "off by a row of blocks": ("fp8-block", edit(UP_SCALE, lambda scale: scale.roll(1, 0)), "up_proj"),
    "off by a block": ("fp8-block", edit(UP_SCALE, lambda scale: scale.roll(1, 1)), "up_proj"),
    "of another tensor": ("fp8-block", lambda tensors: swap(tensors, UP_SCALE, f"{GATE}.weight_scale_inv"), "up_proj"),
    "inverted": ("fp8-block", edit(UP_SCALE, lambda scale: 1 / scale), "up_proj"),
    "all ones": ("fp8-block", edit(UP_SCALE, torch.ones_like), "up_proj"),
    "an eighth too large": ("fp8-block", edit(UP_SCALE, lambda scale: scale * 1.125), "up_proj"),
    "nibbles exchanged": ("int4", exchange_nibbles, "up_proj"),
    "off by a group": ("int4", edit(f"{UP}.weight_scale", lambda scale: scale.roll(1, 1)), "up_proj"),
    "groups of another tensor": (
        "int4",
        lambda tensors: swap(tensors, f"{UP}.weight_scale", f"{GATE}.weight_scale"),
        "up_proj",
    ),
    "codes of another tensor": (
        "fp8-block",
        lambda tensors: swap(tensors, f"{UP}.weight", f"{GATE}.weight"),
        "up_proj",
    ),
    "a tensor that is not quantised": ("fp8-block", edit("lm_head.weight", lambda head: head * 1.01), "lm_head"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(plain: Path, tmp_path: Path, fault: str) -> None:
    scheme, damage, module = FAULTS[fault]
    convert(plain, tmp_path / "out", to="hf", quantise=scheme)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    level = weights(plain, tmp_path / "out")
    assert not level.passed
    assert any(module in problem for problem in level.details["problems"])
    assert all(module in problem or "gate_proj" in problem for problem in level.details["problems"])


def test_levels_at_which_models_run_are_refused(plain: Path, tmp_path: Path) -> None:
    convert(plain, tmp_path / "out", to="hf", quantise="fp8-block")
    for sides, which in (((plain, tmp_path / "out"), "the candidate"), ((tmp_path / "out", plain), "the reference")):
        with pytest.raises(UsageError, match=f"{which} is quantised: no level above weights runs it"):
            verify(*sides, level="logits")


def test_experts_in_one_tensor(tmp_path: Path) -> None:
    """MXFP4 as GPT-OSS stores it: bounds, on a tensor alone."""
    from ckptkit.conversion.quantising import _mxfp4
    from ckptkit.dtypes import DTYPES
    from ckptkit.formats.quantised.scheme import Scheme
    from ckptkit.formats.quantised.stored import find_stored
    from ckptkit.tensors import Tensor
    from ckptkit.verification.quantised import noise

    values = torch.randn(3, 40, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    tensor = Tensor.from_bytes(values.view(torch.uint8).numpy().tobytes(), DTYPES["BF16"], (3, 40, 64))
    parts = _mxfp4("experts.up_blocks", tensor)
    (item,) = find_stored(parts, Scheme("mxfp4"), tmp_path).values()
    found = noise(tensor, item)
    assert found.beyond == 0 and 0.5 < found.largest <= 1 and 0.05 < found.relative < 0.2
    other = Tensor.from_bytes((values * 1.5).view(torch.uint8).numpy().tobytes(), DTYPES["BF16"], (3, 40, 64))
    assert noise(other, item).beyond > 1000
