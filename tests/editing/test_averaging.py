"""Averages are the rounded float64 averages, of any formats and into any; what is not alike is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ckptkit import Parallelism, convert
from ckptkit.conversion.options import Options
from ckptkit.dtypes import DTYPES
from ckptkit.editing.averaging import check_weights, decayed
from ckptkit.editing.commands import Output, average
from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.inspection.differences import diff
from tests.editing.models import each, run_of, tensors_of, tuned, ulps
from tests.models import files_of, save_llama, save_model

WEIGHTS = [0.5, 0.25, 0.75]
"""Their products with numbers of 16 bits are exact in float32, so that no sum lies beside a tie by mistake."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    first = save_llama(folder / "a", dtype="bfloat16")
    return [first, tuned(first, folder / "b", 1), tuned(first, folder / "c", 2)]


def test_of_three_formats_straight_to_two(models: list[Path], tmp_path: Path) -> None:
    convert(models[1], tmp_path / "b", to="torch", grid=Parallelism(2, 2))
    convert(models[2], tmp_path / "c", to="torch_dist", grid=Parallelism(4))
    sources = [models[0], tmp_path / "b", tmp_path / "c"]
    result = average(sources, Output(tmp_path / "mean"), weights=WEIGHTS)
    assert result.coverage == {"averaged": 39, "copied": 0}
    exact = each(lambda *all_: sum(w * x for w, x in zip(WEIGHTS, all_, strict=True)) / 1.5, *models)
    for name, tensor in tensors_of(tmp_path / "mean").items():
        share, most = ulps(tensor, exact[name])
        assert share < 1e-3 or tensor.numel() < 1000, name
        assert most <= 1
    assert json.loads((tmp_path / "mean/config.json").read_text()) == json.loads(
        (models[0] / "config.json").read_text()
    )
    average(sources, Output(tmp_path / "tp4", "torch", Options(grid=Parallelism(4))), weights=WEIGHTS)
    assert diff(tmp_path / "tp4", tmp_path / "mean").same
    average(sources, Output(tmp_path / "again"), weights=WEIGHTS, threads=1)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "mean")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float64_sums_are_rounded_once(models: list[Path], tmp_path: Path, dtype: str) -> None:
    options = Options(dtype=DTYPES["F32" if dtype == "float32" else "BF16"])
    average(models, Output(tmp_path / "mean", options=options), weights=WEIGHTS, precision="float64")
    exact = each(lambda *all_: sum(w * x for w, x in zip(WEIGHTS, all_, strict=True)) / 1.5, *models)
    for name, tensor in tensors_of(tmp_path / "mean").items():
        assert tensor.dtype == getattr(torch, dtype)
        share, most = ulps(tensor, exact[name])
        assert share < 1e-3  # float64 sums in another order, next to a tie
        assert most <= 1
    assert json.loads((tmp_path / "mean/config.json").read_text())["dtype"] == dtype


def test_iterations_of_a_run(models: list[Path], tmp_path: Path) -> None:
    run = run_of(models, tmp_path / "run", "torch", Parallelism(2, 2))
    source = {"hf_reference": str(models[0])}
    average([run], Output(tmp_path / "two"), iterations=[3000, 1000], source=source)
    exact = each(lambda a, b: (a + b) / 2, models[0], models[2])
    assert all(ulps(tensor, exact[name])[1] == 0 for name, tensor in tensors_of(tmp_path / "two").items())
    result = average([run], Output(tmp_path / "ema"), last=3, decay="ema:0.5", source=source)
    assert result.source["operation"]["weights"] == [0.25, 0.25, 0.5]
    exact = each(lambda a, b, c: a / 4 + b / 4 + c / 2, *models)
    assert all(ulps(tensor, exact[name])[1] == 0 for name, tensor in tensors_of(tmp_path / "ema").items())
    for last, iterations, match in (
        (4, None, "3 iterations"),
        (None, [1000, 7], "no iteration 7"),
        (2, [1000], "both|exc"),
    ):
        with pytest.raises(UsageError, match=match):
            average([run], Output(tmp_path / "out"), last=last, iterations=iterations, source=source)


def test_weights_by_age() -> None:
    assert decayed("uniform", 3) == [1, 1, 1]
    assert decayed("linear", 3) == [1, 2, 3]
    assert decayed("sqrt", 4) == [1, 2**0.5, 3**0.5, 2]
    assert decayed("ema:0.9", 3) == pytest.approx([0.81, 0.09, 0.1])
    for wrong in ("ema", "ema:1", "ema:x", "cosine", "linear:2"):
        with pytest.raises(UsageError, match=r"--decay"):
            decayed(wrong, 3)
    assert check_weights([2, -1], 2) == [2, -1]
    for weights in ([1, 2, 3], [1, -1], [1e308, 1e308], [1e39, 1], [float("nan"), 1]):
        with pytest.raises(UsageError, match=r"--weights"):
            check_weights(weights, 2)


def test_towers_and_what_is_the_same(tmp_path: Path) -> None:
    """Extras are averaged, too; unused slots stay; what all models take from the same bytes is copied."""
    one = save_model(tmp_path / "a", "gemma4", dtype="bfloat16")
    two = tuned(one, tmp_path / "b", 1)
    average([one, two], Output(tmp_path / "mean"))
    exact = each(lambda a, b: (a + b) / 2, one, two)
    found = tensors_of(tmp_path / "mean")
    assert found.keys() == tensors_of(one).keys()
    for name, tensor in found.items():
        same = tensor.isfinite()
        assert torch.equal(tensor[same], exact[name].to(tensor.dtype)[same]), name
    result = average([one, one], Output(tmp_path / "same"))
    assert result.coverage["averaged"] == 0
    assert (tmp_path / "same/model.safetensors").read_bytes() == (one / "model.safetensors").read_bytes()


def test_the_record(models: list[Path], tmp_path: Path) -> None:
    average(models, Output(tmp_path / "mean", hash_inputs=True))
    record = json.loads((tmp_path / "mean/ckptkit_surgery.json").read_text())
    assert [one["name"] for one in record["inputs"]] == [str(path) for path in models]
    assert all(len(file["sha256"]) == 64 for one in record["inputs"] for file in one["files"])
    card = (tmp_path / "mean/README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert str(models[2]) in card
    average(models, Output(tmp_path / "meg", "torch"))
    manifest = json.loads((tmp_path / "meg/ckptkit/manifest.json").read_text())
    assert manifest["operation"]["operation"] == "average"
    convert(tmp_path / "meg", tmp_path / "back", to="hf")
    assert json.loads((tmp_path / "back/ckptkit_surgery.json").read_text()) == manifest["operation"]


def test_what_is_not_alike(models: list[Path], tmp_path: Path) -> None:
    small = save_llama(tmp_path / "small", intermediate_size=96)
    roped = save_llama(tmp_path / "roped", "llama3", dtype="bfloat16")
    qwen, few = save_model(tmp_path / "qwen", "qwen2"), save_llama(tmp_path / "few", vocab_size=240)
    tied = save_llama(tmp_path / "tied", "tied", dtype="bfloat16")
    for other, error, match in (
        (small, UnsupportedError, r"small.*ffn_hidden_size is 96, and 144 in"),
        (roped, UsageError, r"rope kind is 'llama3'.*--accept-differences"),
        (qwen, UnsupportedError, "two kinds of models"),
        (few, UnsupportedError, r"vocab_size is 240.*resize-vocab"),
        (tied, UnsupportedError, r"tied is true, and false in"),
    ):
        with pytest.raises(error, match=match):
            average([models[0], other], Output(tmp_path / "out"), accept_differences=error is UnsupportedError)
    result = average([models[0], roped], Output(tmp_path / "out"), accept_differences=True)
    assert any("rope kind" in note for note in result.notes)
    for arguments, match in (
        ({"models": models[:1]}, "one model has no average"),
        ({"models": models, "weights": [1.0]}, "1 numbers for 3"),
        ({"models": models[:2], "weights": [1.0, -1.0]}, "sum not 0"),
        ({"models": models, "weights": [1, 1, 1], "decay": "sqrt"}, "exclude each other"),
        ({"models": models, "precision": "float16"}, "--precision float16"),
        ({"models": models[:1], "iterations": [1, 2]}, r"^[^;]*--iterations is about the root of a Megatron run"),
        ({"models": models[:1], "last": 2}, "--last 2 is about the root of a Megatron run"),
        ({"models": models[:1], "last": 2, "source": {"iteration": 3}}, "--iteration and --last 2 exclude"),
    ):
        with pytest.raises(UsageError, match=match):
            average(output=Output(tmp_path / "no"), **arguments)
    with pytest.raises(InputError, match="nowhere: no such directory"):
        average([tmp_path / "nowhere"], Output(tmp_path / "no"), last=2)
    gemma, broken = save_model(tmp_path / "gemma", "gemma3"), save_model(tmp_path / "broken", "gemma3")
    from safetensors.torch import save_file

    tensors = {name: one for name, one in tensors_of(broken).items() if "post_layernorm.bias" not in name}
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"broken.*no vision_tower.*post_layernorm.bias"):
        average([gemma, broken], Output(tmp_path / "no"))
    assert not (tmp_path / "no").exists()
