"""`verify` on converted checkpoints: every level says yes to a conversion and no, by name, to a fault in a file."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from ckptkit import convert, verify
from ckptkit.errors import InputError, UsageError
from ckptkit.sharding.grid import Parallelism
from ckptkit.verification.logits import Side
from ckptkit.verification.ranks.pool import RankPool
from tests.models import LLAMAS, raw_config

GRIDS = [Parallelism(2, 2), Parallelism(1, 2, 2), Parallelism(4)]


def levels_of(report: Any) -> dict[str, bool]:
    return {level.name: level.passed for level in report.levels}


@pytest.mark.parametrize(("kind", "grid"), [(kind, GRIDS[i % 3]) for i, kind in enumerate(LLAMAS)], ids=str)
def test_against_transformers_after_conversion(
    llama: Callable[..., Path], tmp_path: Path, pool: RankPool, kind: str, grid: Parallelism
) -> None:
    source = llama(kind)
    convert(source, tmp_path / "meg", to="torch", grid=grid, spec="local")
    report = verify(source, tmp_path / "meg", tolerance=1e-5, pool=pool)
    assert levels_of(report) == {"structure": True, "weights": True, "logits": True}, report.levels[-1].summary
    assert any("ColumnParallelLinear" in name for name in report.levels[-1].details["megatron_modules"])


def test_packed_and_either_order(llama: Callable[..., Path], tmp_path: Path, pool: RankPool) -> None:
    source = llama("gqa")
    convert(source, tmp_path / "packed", to="packed")
    convert(source, tmp_path / "meg", to="torch", grid=Parallelism(2))
    assert verify(tmp_path / "packed", source, tolerance=1e-5, pool=pool).passed
    report = verify(tmp_path / "packed", tmp_path / "meg", tolerance=1e-5, pool=pool)
    assert report.passed and "both sides ran in megatron-core" in report.messages[0]


def test_distributed_checkpoint_on_its_own_grid(llama: Callable[..., Path], tmp_path: Path, pool: RankPool) -> None:
    source = llama("gqa")
    convert(source, tmp_path / "dist", to="torch_dist", grid=Parallelism(2, 2))
    report = verify(source, tmp_path / "dist", tolerance=1e-5, pool=pool)
    assert levels_of(report) == {"structure": True, "weights": True, "logits": True}


def change_tensor(path: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Rewrites one rank's file with a tensor changed."""
    import torch

    content = torch.load(path, weights_only=False)
    content["model"][name] = change(content["model"][name])
    torch.save(content, path)


def swap_halves(weight: Any) -> Any:
    import torch

    return torch.cat([weight[weight.shape[0] // 2 :], weight[: weight.shape[0] // 2]])


FAULTS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "qkv permuted": ("decoder.layers.1.self_attention.linear_qkv.weight", lambda w: w.roll(8, 0)),
    "gate and up swapped": ("decoder.layers.0.mlp.linear_fc1.weight", swap_halves),
    "one bit": ("decoder.layers.1.mlp.linear_fc2.weight", lambda w: w + (w == w.max()) * 1e-6),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_in_files_are_named(llama: Callable[..., Path], tmp_path: Path, fault: str) -> None:
    name, change = FAULTS[fault]
    source = llama("gqa")
    convert(source, tmp_path / "meg", to="torch", grid=Parallelism(2, 2))
    change_tensor(tmp_path / "meg" / "release" / "mp_rank_01_001" / "model_optim_rng.pt", name, change)
    report = verify(source, tmp_path / "meg", level="weights")
    layer = int(name.split(".")[2]) + 2
    assert levels_of(report) == {"structure": True, "weights": False}
    assert name.replace(f"layers.{name.split('.')[2]}", f"layers.{layer}") in report.levels[-1].summary


def test_shifted_layers_are_named(llama: Callable[..., Path], tmp_path: Path) -> None:
    import torch

    source = llama("gqa")
    convert(source, tmp_path / "meg", to="torch", grid=Parallelism(1, 2))
    path = tmp_path / "meg" / "release" / "mp_rank_00_001" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    model = content["model"]
    other = {"0": "1", "1": "0"}
    swapped = {re.sub(r"layers\.([01])\.", lambda m: f"layers.{other[m[1]]}.", name): model[name] for name in model}
    torch.save({**content, "model": swapped}, path)
    report = verify(source, tmp_path / "meg", level="weights")
    assert not report.passed and "decoder.layers.2." in report.levels[-1].summary


def test_diverging_replicas_are_named(llama: Callable[..., Path], tmp_path: Path) -> None:
    source = llama("tied")
    convert(source, tmp_path / "meg", to="torch", grid=Parallelism(2, 2))
    files = tmp_path / "meg" / "release"
    change_tensor(files / "mp_rank_01_001" / "model_optim_rng.pt", "decoder.final_layernorm.weight", lambda w: w * 2)
    report = verify(source, tmp_path / "meg", level="weights")
    assert "decoder.final_layernorm.weight on tensor parallel ranks 0 and 1" in report.levels[-1].summary
    with pytest.raises(InputError, match="tensor parallel ranks 0 and 1"):
        convert(tmp_path / "meg", tmp_path / "back", to="hf")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("field", "value", "match"), [("rotary_base", 77777, "rope"), ("norm_epsilon", 1e-2, "norm_eps is 1e-05")]
)
def test_args_that_lie_are_named(
    llama: Callable[..., Path], tmp_path: Path, field: str, value: float, match: str
) -> None:
    import torch

    source = llama("gqa")
    convert(source, tmp_path / "meg", to="torch")
    path = tmp_path / "meg" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    setattr(content["args"], field, value)
    torch.save(content, path)
    report = verify(source, tmp_path / "meg")
    assert levels_of(report) == {"structure": False}
    assert match in report.levels[0].summary
    with pytest.raises(InputError, match="contradicts itself"):
        convert(tmp_path / "meg", tmp_path / "back", to="hf")


def test_padding_rows_read_as_real_are_named(llama: Callable[..., Path], tmp_path: Path) -> None:
    source = llama("gqa")
    convert(source, tmp_path / "meg", to="torch")
    config = tmp_path / "meg" / "ckptkit" / "hf" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 256}))
    report = verify(source, tmp_path / "meg")
    assert "vocab_size is 250 in the reference, 256 in the candidate" in report.levels[0].summary


def test_saved_logits_and_tokens(llama: Callable[..., Path], tmp_path: Path, pool: RankPool) -> None:
    import torch
    from safetensors.torch import load_file

    source = llama("gqa")
    convert(source, tmp_path / "meg", to="torch", grid=Parallelism(2))
    tokens = [[1, 2, 3, 4], [5, 6, 7, 249]]
    report = verify(source, tmp_path / "meg", tokens=tokens, save_logits=tmp_path / "out.safetensors", pool=pool)
    assert report.passed
    saved = load_file(tmp_path / "out.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in saved.items()} == {
        name: ((2, 4, 250), torch.float32) for name in ("reference", "candidate")
    }
    assert (saved["reference"] - saved["candidate"]).abs().max() <= 1e-4 * saved["reference"].abs().max()
    with pytest.raises(UsageError, match="999"):
        verify(source, tmp_path / "meg", tokens=[[1, 999]], pool=pool)
    with pytest.raises(UsageError, match="neither side has one"):
        verify(source, tmp_path / "meg", prompts=["hello"], pool=pool)


def test_a_copy_that_is_too_short_is_named(llama: Callable[..., Path], tmp_path: Path) -> None:
    """Its bytes are those that the other one begins with."""
    from safetensors.torch import load_file, save_file

    source, other = llama("tied"), tmp_path / "other"
    shutil.copytree(source, other)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][:100].clone()
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    report = verify(source, other, level="weights")
    assert not report.passed and "F32[" in report.levels[-1].summary


def test_a_config_may_leave_out_the_vocabulary(tmp_path: Path) -> None:
    """As the released Gemma 3 of 4B, 12B and 27B do; the class has a default."""
    from ckptkit.verification.ranks.jobs import OPENER
    from ckptkit.verification.sides import open_side

    raw = raw_config("gemma3")
    del raw["text_config"]["vocab_size"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert open_side(Side(tmp_path, "hf"), OPENER).vocab_size == 262208


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"packed": True, "dp": 2}, "--packed, --dp need --level logits; this run stops at weights"),
        ({"tokens": [[1, 2]]}, "--tokens needs --level logits"),
        ({"save_logits": "logits.safetensors"}, "--save-logits needs --level logits"),
    ],
)
def test_options_that_a_cheaper_level_does_not_have(
    llama: Callable[..., Path], options: dict[str, Any], match: str
) -> None:
    source = llama("gqa", num_hidden_layers=2)
    with pytest.raises(UsageError, match=match):
        verify(source, source, level="weights", **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dp": 0}, "--dp must be at least 1"),
        ({"sequence_parallel": True}, "TP 2 or more"),
        ({"dtype": "int8"}, "no logits in int8"),
        ({"device": "tpu"}, "no device 'tpu'"),
    ],
)
def test_what_cannot_run_is_said_before_bytes_are_compared(
    llama: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    match: str,
) -> None:
    source = llama("gqa", num_hidden_layers=2)
    convert(source, tmp_path / "meg", to="packed")
    module = import_module("ckptkit.verification.levels")
    monkeypatch.setattr(module, "check_weights", lambda *_: pytest.fail("bytes were compared"))
    with pytest.raises(UsageError, match=match):
        verify(source, tmp_path / "meg", **options)
