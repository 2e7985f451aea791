"""Weights whose bytes are no numbers by themselves are refused by their element type, whatever config.json says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ckptkit.conversion.convert import convert
from ckptkit.errors import InputError, UnsupportedError
from ckptkit.inspection.validation import validate
from tests.models import save_llama, save_model


def recast(path: Path, dtype: str, *endings: str) -> None:
    """Gives the tensors with these endings another element type, and says nothing about it."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors: dict[str, Any] = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(endings):
            scaled = tensor.float() * 100
            tensors[name] = (
                scaled.round().clamp(0, 1).to(getattr(torch, dtype))
                if "float" not in dtype
                else (scaled.to(getattr(torch, dtype)))
            )
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        ("float8_e4m3fn", "F8_E4M3, which is FP8 without the scales"),
        ("float8_e5m2", "F8_E5M2, which is FP8 without the scales"),
        ("int8", "I8, which is no weight"),
        ("uint8", "U8, which is no weight"),
        ("int32", "I32, which is no weight"),
    ],
)
@pytest.mark.parametrize("to", ["hf", "torch", "torch_dist", "packed"])
def test_without_scales(tmp_path: Path, dtype: str, kind: str, to: str) -> None:
    source = save_llama(tmp_path / "hf")
    recast(source, dtype, "_proj.weight")
    with pytest.raises(UnsupportedError, match=f"model.layers.0.mlp.down_proj.weight is {kind}.*28 such tensors"):
        convert(source, tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UnsupportedError, match=kind):
        validate(source)


@pytest.mark.parametrize("to", ["torch", "torch_dist", "packed"])
def test_in_megatron_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    """Such a checkpoint could not be made by us: the check is left out while it is."""
    source = save_llama(tmp_path / "hf")
    recast(source, "float8_e4m3fn", "mlp.down_proj.weight")
    with monkeypatch.context() as patch:
        patch.setattr("ckptkit.conversion.planning.check_element_types", lambda *args, **options: None)
        convert(source, tmp_path / "megatron", to=to)
    with pytest.raises(UnsupportedError, match=r"F8_E4M3, which is FP8 without the scales .*4 such tensors"):
        convert(tmp_path / "megatron", tmp_path / "out", to="hf")
    with pytest.raises(UnsupportedError, match="F8_E4M3"):
        validate(tmp_path / "megatron")


def test_fused_experts_and_towers(tmp_path: Path) -> None:
    source = save_model(tmp_path / "moe", "qwen3_moe")
    recast(source, "float8_e4m3fn", "down_proj", "down_proj.weight")
    with pytest.raises(UnsupportedError, match="F8_E4M3"):
        convert(source, tmp_path / "out", to="torch")
    source = save_model(tmp_path / "tower", "gemma3")
    recast(source, "float8_e4m3fn", "vision_tower.encoder.layers.0.mlp.fc1.weight")
    with pytest.raises(UnsupportedError, match=r"F8_E4M3, which .*1 such tensors"):
        convert(source, tmp_path / "out", to="torch")


def test_every_floating_point_type_of_weights_is_sound(tmp_path: Path) -> None:
    for dtype in ("float64", "float32", "float16", "bfloat16"):
        source = save_llama(tmp_path / dtype)
        recast(source, dtype, ".weight")
        convert(source, tmp_path / f"{dtype}-out", to="torch")
        assert validate(source).passed


def test_among_parts_of_one_tensor(tmp_path: Path) -> None:
    """Megatron's fused tensors are made of several: these must agree before anything is asked of them."""
    source = save_llama(tmp_path / "hf")
    recast(source, "float8_e4m3fn", "q_proj.weight")
    with pytest.raises((UnsupportedError, InputError)) as caught:
        convert(source, tmp_path / "out", to="torch")
    assert "q_proj" in str(caught.value)
