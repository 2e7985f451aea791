"""Layers of multi-token prediction in models made of models: made like all others, or left out by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptkit import Parallelism, convert, open_checkpoint
from ckptkit.conversion.options import Options
from ckptkit.dtypes import DTYPES
from ckptkit.editing.commands import Output, average, merge, slice_layers, stack_layers
from ckptkit.errors import UnsupportedError, UsageError
from ckptkit.inspection.differences import diff
from tests.editing.models import each, tensors_of, tuned, ulps
from tests.models import add_prediction, save_model

WEIGHTS = [0.5, 0.25, 0.75]
PREDICTION = re.compile(r"model\.layers\.([4-9])\.")
COPIES = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}


def edited(folder: Path, change: Any) -> Path:
    """A directory whose tensors a function changes in place."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    return folder


def with_copies(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        for ending, of in COPIES.items():
            if PREDICTION.match(name) and name.endswith(ending):
                tensors[name] = tensors[of]


def alike(folder: Path, kind: str, number: int, count: int = 1) -> list[Path]:
    """Some models with layers of multi-token prediction, tuned differently."""
    first = add_prediction(save_model(folder / "0", kind), count)
    return [first, *(edited(tuned(first, folder / str(seed), seed), with_copies) for seed in range(1, number))]


def predicting(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors_of(folder).items() if PREDICTION.match(name)}


def without_copies(names: Any) -> set[str]:
    """Names of files that are laid out anew: what layers of multi-token prediction repeat is not in them."""
    return {name for name in names if not (PREDICTION.match(name) and name.endswith(tuple(COPIES)))}


@pytest.mark.parametrize("kind", ["glm4_moe", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_an_average(tmp_path: Path, kind: str) -> None:
    """Every number is the rounded sum; the copies of embedding and head are those of the average."""
    models = alike(tmp_path, kind, 3, 2)
    convert(models[1], tmp_path / "meg", to="torch", grid=Parallelism(1, 2, ep=2))
    options = Options(dtype=DTYPES["F32"])
    sources = [models[0], tmp_path / "meg", models[2]]
    average(sources, Output(tmp_path / "mean", options=options), weights=WEIGHTS, precision="float64")
    exact = each(lambda *all_: sum(w * x for w, x in zip(WEIGHTS, all_, strict=True)) / 1.5, *models)
    found = tensors_of(tmp_path / "mean")
    assert found.keys() == exact.keys() and len(predicting(tmp_path / "mean")) > 50
    for name, tensor in found.items():
        share, most = ulps(tensor, exact[name])
        assert share < 1e-3 and most <= 1, name
    for name, tensor in predicting(tmp_path / "mean").items():
        for ending, of in COPIES.items():
            assert not name.endswith(ending) or torch.equal(tensor, found[of])
    assert open_checkpoint(tmp_path / "mean").config.mtp_layers == 2
    average(sources, Output(tmp_path / "pp2", "torch", Options(grid=Parallelism(1, 2))), weights=WEIGHTS)
    average(sources, Output(tmp_path / "again"), weights=WEIGHTS)
    assert diff(tmp_path / "pp2", tmp_path / "again").same


RECIPES = {
    "linear": "merge_method: linear\nmodels:\n  - {{model: {0}, parameters: {{weight: 0.5}}}}\n"
    "  - {{model: {1}, parameters: {{weight: [0.1, 0.7]}}}}\n",
    "ties": "merge_method: ties\nbase_model: {0}\nmodels:\n  - model: {1}\n    parameters:\n      density: 0.3\n"
    "      weight: [{{filter: self_attn, value: [0.2, 0.6]}}, {{value: 0.4}}]\n"
    "  - {{model: {2}, parameters: {{density: 0.5, weight: 0.7}}}}\n",
    "slerp": "merge_method: slerp\nbase_model: {0}\nmodels: [{{model: {0}}}, {{model: {1}}}]\n"
    "parameters: {{t: [0, 0.9]}}\n",
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", ["glm4_moe", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_merges_take_them_for_further_last_layers(tmp_path: Path, kind: str, recipe: str) -> None:
    """Where the decoder layer inside is the model's last one, what is made of it is what is made of that."""

    def like_the_last(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if (last := name.replace("model.layers.4.", "model.layers.3.")) != name and last in tensors:
                tensors[name] = tensors[last]

    models = [edited(folder, like_the_last) for folder in alike(tmp_path, kind, 3)]
    (tmp_path / "recipe.yaml").write_text(RECIPES[recipe].format(*models) + "dtype: float32\n")
    result = merge(tmp_path / "recipe.yaml", Output(tmp_path / "merged"))
    found, checked = tensors_of(tmp_path / "merged"), 0
    for name, tensor in predicting(tmp_path / "merged").items():
        last = name.replace("model.layers.4.", "model.layers.3.")
        if last in found:
            assert torch.equal(tensor, found[last]), name
            # of which something was computed: an expert bias is nobody's weight
            moved = not torch.equal(tensor, tensors_of(models[0])[name])
            assert moved or "norm" in name, name
            checked += 1
    assert checked > 20 and result.coverage["merged"] > 0
    own = [name for name in found if name.endswith(("enorm.weight", "eh_proj.weight"))]
    assert len(own) == 2 and not any(torch.equal(found[name], tensors_of(models[0])[name]) for name in own)


def test_a_linear_merge_is_the_sum(tmp_path: Path) -> None:
    models = alike(tmp_path, "glm4_moe_lite", 2)
    text = "\n".join(
        f"  - {{model: {model}, parameters: {{weight: {w}}}}}" for model, w in zip(models, (1, 3), strict=True)
    )
    (tmp_path / "recipe.yaml").write_text(f"merge_method: linear\ndtype: float32\nmodels:\n{text}\n")
    merge(tmp_path / "recipe.yaml", Output(tmp_path / "merged"))
    exact = each(lambda a, b: (a + 3 * b) / 4, *models)
    found = tensors_of(tmp_path / "merged")
    assert found.keys() == without_copies(exact)
    for name, tensor in found.items():
        assert torch.allclose(tensor.double(), exact[name], rtol=1e-6, atol=1e-6), name


def test_a_slice_keeps_them_behind_the_last_layer(tmp_path: Path) -> None:
    (model,) = alike(tmp_path, "glm4_moe", 1, 2)
    slice_layers(model, Output(tmp_path / "cut"), layers="0,2-3")
    before, after = tensors_of(model), tensors_of(tmp_path / "cut")
    for name in without_copies(predicting(model)):
        moved = PREDICTION.sub(lambda match: f"model.layers.{int(match[1]) - 1}.", name)
        assert torch.equal(after[moved], before[name]), moved
    assert len(after) == len(without_copies(before)) - sum(name.startswith("model.layers.1.") for name in before)
    opened = open_checkpoint(tmp_path / "cut")
    assert (opened.config.num_layers, opened.config.mtp_layers) == (3, 2)


def test_a_slice_without_the_last_layer(tmp_path: Path) -> None:
    """They go on from a layer that is not there: refused, unless they are left out, which is said."""
    (model,) = alike(tmp_path, "deepseek_v3", 1)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    for layers in ("0-2", "0-3,1"):
        with pytest.raises(UnsupportedError, match=r"go on from layer 3, .* layer [12].*--drop-prediction"):
            slice_layers(model, Output(tmp_path / "cut"), layers=layers)
    result = slice_layers(model, Output(tmp_path / "cut"), layers="0-2", drop_prediction=True)
    assert any("1 layer of multi-token prediction of" in line for line in result.lossy)
    assert not any("enorm" in name for name in tensors_of(tmp_path / "cut"))
    assert json.loads((tmp_path / "cut/config.json").read_text())["num_nextn_predict_layers"] == 0
    assert open_checkpoint(tmp_path / "cut").config.mtp_layers == 0


def test_a_stack_has_those_of_its_last_model(tmp_path: Path) -> None:
    one, two = alike(tmp_path, "glm4_moe", 2)
    stack_layers([f"{one}:0-1", f"{two}:2-3"], Output(tmp_path / "joined"))
    found, theirs = tensors_of(tmp_path / "joined"), tensors_of(two)
    assert found.keys() == without_copies(theirs)
    for name, tensor in predicting(tmp_path / "joined").items():
        assert torch.equal(tensor, theirs[name]), name
    with pytest.raises(UnsupportedError, match="go on from layer 3"):
        stack_layers([f"{one}:0-3", f"{two}:1-2"], Output(tmp_path / "no"))
    (tmp_path / "recipe.yaml").write_text(
        "merge_method: passthrough\nslices:\n"
        f"  - sources: [{{model: {one}, layer_range: [0, 2]}}]\n"
        f"  - sources: [{{model: {two}, layer_range: [2, 4]}}]\n"
    )
    merge(tmp_path / "recipe.yaml", Output(tmp_path / "passed"))
    assert diff(tmp_path / "passed", tmp_path / "joined").same


def test_slices_that_are_merged(tmp_path: Path) -> None:
    """All models of the last slice must end there."""
    one, two = alike(tmp_path, "glm4_moe", 2)
    text = (
        "merge_method: linear\nparameters: {{weight: 0.5}}\nslices:\n"
        "  - sources: [{{model: {0}, layer_range: [0, 2]}}, {{model: {1}, layer_range: [0, 2]}}]\n"
        "  - sources: [{{model: {0}, layer_range: [2, 4]}}, {{model: {1}, layer_range: [{2}, {3}]}}]\n"
    )
    (tmp_path / "recipe.yaml").write_text(text.format(one, two, 1, 3))
    with pytest.raises(UnsupportedError, match=r"go on from layer 3, .* layer 2"):
        merge(tmp_path / "recipe.yaml", Output(tmp_path / "no"))
    (tmp_path / "recipe.yaml").write_text(text.format(one, two, 2, 4))
    merge(tmp_path / "recipe.yaml", Output(tmp_path / "merged"))
    exact = each(lambda a, b: (a + b) / 2, one, two)
    found = predicting(tmp_path / "merged")
    assert len(found) > 20
    for name, tensor in found.items():
        assert torch.allclose(tensor.double(), exact[name], rtol=1e-6, atol=1e-6), name


def test_numbers_of_them_that_differ(tmp_path: Path) -> None:
    with_them, tuned_alike = alike(tmp_path, "glm4_moe", 2)
    without = edited(
        tuned_alike, lambda tensors: [tensors.pop(name) for name in list(tensors) if PREDICTION.match(name)]
    )
    pair = [with_them, without]
    with pytest.raises(UnsupportedError, match=r"mtp_layers is 0, and 1 in .*--drop-prediction leaves out"):
        average(pair, Output(tmp_path / "no"))
    result = average(pair, Output(tmp_path / "mean"), drop_prediction=True)
    assert result.lossy == [f"1 layer of multi-token prediction of {with_them}, left out (--drop-prediction)"]
    assert tensors_of(tmp_path / "mean").keys() == tensors_of(without).keys()
    with pytest.raises(UsageError, match="--drop-prediction: no model has layers of multi-token prediction"):
        average([without, without], Output(tmp_path / "none"), drop_prediction=True)


def test_archives_that_have_them_apart(tmp_path: Path) -> None:
    """Their names do not depend on the number of layers; another key of config.json counts them."""
    first = add_prediction(save_model(tmp_path / "0", "qwen3_next"))
    config = json.loads((first / "config.json").read_text())
    (first / "config.json").write_text(json.dumps({**config, "mtp_num_hidden_layers": 1}))
    second = tuned(first, tmp_path / "1", 1)
    average([first, second], Output(tmp_path / "mean", options=Options(dtype=DTYPES["F32"])), precision="float64")
    exact, found = each(lambda a, b: (a + b) / 2, first, second), tensors_of(tmp_path / "mean")
    names = [name for name in found if name.startswith("mtp.")]
    assert found.keys() == exact.keys() and len(names) > 15
    for name in names:
        share, most = ulps(found[name], exact[name])
        assert share < 1e-3 and most <= 1, name
    layers = open_checkpoint(first).config.num_layers
    slice_layers(first, Output(tmp_path / "cut"), layers=f"0-{layers - 1}")
    assert all(torch.equal(tensors_of(tmp_path / "cut")[name], tensors_of(first)[name]) for name in names)
    slice_layers(first, Output(tmp_path / "dropped"), layers="0-3", drop_prediction=True)
    assert not any(name.startswith("mtp.") for name in tensors_of(tmp_path / "dropped"))
    assert json.loads((tmp_path / "dropped/config.json").read_text())["mtp_num_hidden_layers"] == 0
