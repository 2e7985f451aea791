"""Quantised directories as sources: every number, in every type and format, and what is said of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptkit.conversion.convert import convert
from ckptkit.errors import InputError
from ckptkit.inspection.summary import inspect
from ckptkit.inspection.validation import validate
from ckptkit.sharding.grid import Parallelism
from ckptkit.sizes import human_size
from tests.models import files_of, save_model
from tests.quantised import FP8_PLAIN, Array, quantise_fp8, quantise_int4, rounded

Quantise = Callable[[Path, Path], dict[str, Array]]
KINDS: dict[str, Quantise] = {
    "blocks": quantise_fp8,
    "blocks, e8m0": lambda source, out: quantise_fp8(source, out, scales="F8_E8M0"),
    "blocks, uint8": lambda source, out: quantise_fp8(source, out, scales="U8"),
    "rows and tensors": lambda source, out: quantise_fp8(source, out, config=FP8_PLAIN, scales="BF16"),
    "int4": quantise_int4,
}
GRIDS = {
    "torch": Parallelism(4, 2, ep=2, etp=2),
    "torch_dist": Parallelism(2, 2, ep=2),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("plain") / "hf", "deepseek_v3", dtype="bfloat16")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def expected(plain: Path, numbers: dict[str, Array], dtype: str) -> dict[str, torch.Tensor]:
    others = {name: tensor for name, tensor in tensors_of(plain).items() if name not in numbers}
    return {**others, **{name: rounded(values, dtype) for name, values in numbers.items()}}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and left[name].shape == right[name].shape
        and torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8))
        for name in left
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_in_every_format(plain: Path, tmp_path: Path, kind: str) -> None:
    numbers = KINDS[kind](plain, tmp_path / "quantised")
    result = convert(tmp_path / "quantised", tmp_path / "hf", to="hf")
    assert same(tensors_of(tmp_path / "hf"), expected(plain, numbers, "bfloat16"))
    config = json.loads((tmp_path / "hf" / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config and len(numbers) == result.source["quantised"]["tensors"]
    for to, grid in GRIDS.items():
        convert(tmp_path / "quantised", tmp_path / to, to=to, grid=grid)
        convert(tmp_path / to, tmp_path / f"{to}-back", to="hf")
        assert files_of(tmp_path / f"{to}-back") == files_of(tmp_path / "hf")


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("quantise", [quantise_fp8, quantise_int4])
def test_other_types_are_rounded_once(plain: Path, tmp_path: Path, quantise: Quantise, dtype: str) -> None:
    numbers = quantise(plain, tmp_path / "quantised")
    convert(tmp_path / "quantised", tmp_path / "hf", to="hf", dtype=dtype)
    found = tensors_of(tmp_path / "hf")
    for name, values in numbers.items():
        assert torch.equal(found[name].view(torch.uint8), rounded(values, dtype).view(torch.uint8))


def test_what_is_said(plain: Path, tmp_path: Path) -> None:
    numbers = quantise_fp8(plain, tmp_path / "quantised")
    stored = sum((tmp_path / "quantised" / f"model-0000{n}-of-00002.safetensors").stat().st_size for n in (1, 2))
    facts = inspect(tmp_path / "quantised").quantised
    assert facts is not None
    assert facts["scheme"] == "FP8, blocks of 32 x 32" and facts["tensors"] == len(numbers)
    assert facts["bytes_read"] == 2 * sum(values.size for values in numbers.values())
    assert facts["bytes_added"] == facts["bytes_read"] - facts["bytes_stored"] and facts["bytes_stored"] < stored
    result = convert(tmp_path / "quantised", tmp_path / "out", to="hf", dry_run=True)
    assert result.source["quantised"] == facts
    assert any(
        "FP8, blocks of 32 x 32" in note and f"takes {human_size(facts['bytes_added'])} more" in note
        for note in result.notes
    )
    written = sum(file["bytes"] for file in result.files if file["path"].endswith(".safetensors"))
    assert abs(written - stored - facts["bytes_added"]) < 40_000  # headers


def test_a_quantised_reference_describes_trained_weights(plain: Path, tmp_path: Path) -> None:
    quantise_fp8(plain, tmp_path / "quantised")
    convert(plain, tmp_path / "meg", to="torch_dist", grid=Parallelism(2))
    convert(tmp_path / "meg", tmp_path / "back", to="hf", hf_reference=tmp_path / "quantised")
    assert same(tensors_of(tmp_path / "back"), tensors_of(plain))


def damage(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    kept = {name: shard for name, shard in index["weight_map"].items() if shard != file.name}
    index["weight_map"] = {**kept, **dict.fromkeys(tensors, file.name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


SCALE = "model.layers.0.mlp.gate_proj.weight_scale_inv"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda tensors: tensors.pop(SCALE), f"{SCALE} is missing"),
        (lambda tensors: tensors.update({SCALE: tensors[SCALE].T.contiguous()}), f"{SCALE} is .3, 5., which is no"),
        (lambda tensors: tensors.update({SCALE: tensors[SCALE][1:].contiguous()}), f"{SCALE} is .4, 3., which is no"),
    ],
)
def test_scales_that_are_dropped_or_transposed(
    plain: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], text: str
) -> None:
    quantise_fp8(plain, tmp_path / "quantised")
    damage(tmp_path / "quantised", change)
    with pytest.raises(InputError, match=text):
        convert(tmp_path / "quantised", tmp_path / "out", to="hf")


def test_a_shape_that_is_not_that_of_the_codes(plain: Path, tmp_path: Path) -> None:
    quantise_int4(plain, tmp_path / "quantised")
    assert validate(tmp_path / "quantised").passed
    damage(tmp_path / "quantised", lambda tensors: tensors["model.layers.0.mlp.gate_proj.weight_shape"].add_(8))
    tensors = next(check for check in validate(tmp_path / "quantised").checks if check.name == "tensors")
    (problem,) = tensors.problems
    assert problem.endswith("model.layers.0.mlp.gate_proj.weight_shape is not [144, 96], the shape of the codes")
    with pytest.raises(InputError, match=r"gate_proj.weight_shape is not \[144, 96\]"):
        convert(tmp_path / "quantised", tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()


def test_a_config_that_speaks_of_codes_where_there_are_none(plain: Path, tmp_path: Path) -> None:
    quantise_fp8(plain, tmp_path / "quantised")
    convert(tmp_path / "quantised", tmp_path / "hf", to="hf")
    config = tmp_path / "hf" / "config.json"
    config.write_text((tmp_path / "quantised" / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    assert "config.json says FP8, blocks of 32 x 32, and no tensor is quantised" in inspect(tmp_path / "hf").notes


def test_operations_on_models_take_quantised_ones(plain: Path, tmp_path: Path) -> None:
    """An average of two, whose files and index are those of a model that was never quantised."""
    from ckptkit.editing.commands import Output, average

    for seed in (0, 1):
        quantise_fp8(plain, tmp_path / f"{seed}", seed=seed)
        convert(tmp_path / f"{seed}", tmp_path / f"plain{seed}", to="hf")
    average([tmp_path / "0", tmp_path / "1"], Output(tmp_path / "average"))
    average([tmp_path / "plain0", tmp_path / "plain1"], Output(tmp_path / "expected"))
    assert same(tensors_of(tmp_path / "average"), tensors_of(tmp_path / "expected"))
    index = json.loads((tmp_path / "average" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    held = {name: file.name for file in (tmp_path / "average").glob("*.safetensors") for name in load_file(file)}
    assert index["weight_map"] == held
    assert "quantization_config" not in json.loads((tmp_path / "average" / "config.json").read_text(encoding="utf-8"))


def test_codes_beside_plain_numbers_of_the_same_weight(plain: Path, tmp_path: Path) -> None:
    """Two sources of one weight are never chosen between in silence."""
    quantise_int4(plain, tmp_path / "quantised")
    packed = next(name for name in tensors_of(tmp_path / "quantised") if name.endswith(".weight_packed"))
    weight = packed.removesuffix("_packed")
    for file in (tmp_path / "quantised").glob("*.safetensors"):
        tensors = load_file(file)
        if packed in tensors:
            save_file({**tensors, weight: tensors_of(plain)[weight]}, file, metadata={"format": "pt"})
    index = tmp_path / "quantised" / "model.safetensors.index.json"
    if index.exists():
        raw = json.loads(index.read_text())
        raw["weight_map"][weight] = raw["weight_map"][packed]
        index.write_text(json.dumps(raw))
    with pytest.raises(InputError, match=f"{weight} is there twice: quantised, and as plain numbers"):
        convert(tmp_path / "quantised", tmp_path / "out", to="hf")
