"""Merges are what mergekit makes of the same recipes: as it was recorded, and as it does now where it is installed."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from ckptkit import Parallelism, convert
from ckptkit.conversion.options import Options
from ckptkit.editing.commands import Output, merge
from ckptkit.editing.recipes import read_recipe, resolved
from ckptkit.errors import CkptkitError, InputError, UnsupportedError
from ckptkit.io import computed
from ckptkit.io.cache import Cache
from fixtures.make_merges import CASES, FOLDER, RECIPES, RECORD, name_of, out_of, write_models, write_recipe
from tests.editing.models import in_modules, tensors_of, tuned, ulps
from tests.models import files_of, save_llama, save_model

Tensors = dict[str, torch.Tensor]
RANDOM = ("dare_ties", "dare_linear")
EXACT = [case for case in CASES if case[1] not in RANDOM]
MERGEKIT = shutil.which("mergekit-yaml")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[tuple[str, str], Path] = {}

    def get(kind: str, dtype: str) -> Path:
        if (kind, dtype) not in made:
            made[kind, dtype] = tmp_path_factory.mktemp(f"{kind}-{dtype}")
            write_models(made[kind, dtype], kind, dtype)
        return made[kind, dtype]

    return get


def limits(recipe: dict[str, Any], name: str, base: Tensors, models: dict[str, Tensors]) -> torch.Tensor:
    """Where a difference is as large as the smallest one that ties keeps: which of them are kept is nobody's choice."""
    alike = torch.zeros(base[name].shape, dtype=torch.bool)
    kind = getattr(torch, recipe.get("dtype", str(base[name].dtype).removeprefix("torch.")))
    stem = name.partition(".layers.")[0]
    last = max((int(one.split(".layers.")[1].split(".")[0]) for one in base if f"{stem}.layers." in one), default=0)
    for one in recipe["models"]:
        if one["model"] == "base":
            continue
        layer = re.search(r"layers[.](\d)", name)
        density = resolved([one["parameters"]], "density", name, int(layer[1]) / last if layer else 0, "")
        size = (models[one["model"]][name].to(kind) - base[name].to(kind)).abs().float()
        alike |= size == size.flatten().sort(descending=True).values[max(1, int(density * size.numel())) - 1]
    return alike


def room(name: str, tensor: torch.Tensor, models: dict[str, Tensors]) -> torch.Tensor:
    """How far mergekit's float32 may be off: its norms and sums of whole tensors are not those of float64."""
    largest = torch.stack([model[name].double().abs() for model in models.values()]).amax(dim=0)
    return 16 * torch.finfo(torch.float32).eps * largest + torch.finfo(tensor.dtype).eps * tensor.double().abs()


def check(recipe: str, found: Tensors, expected: Tensors, folder: Path) -> None:
    """Whether a merge is mergekit's: bit for bit, but for ties at the limit and what depends on norms."""
    wanted = RECIPES[recipe]
    models = {name: in_modules(folder / name) for name in ("base", "a", "b") if (folder / name).is_dir()}
    for name, tensor in expected.items():
        mine = found[name]
        assert mine.dtype == tensor.dtype, name
        differs = mine != tensor
        if wanted["merge_method"] == "ties":
            differs &= ~limits(wanted, name, models["base"], models)
        if recipe == "slerp-sliced":  # in float64, of which float32 is written
            assert ulps(mine, tensor)[1] <= 1, name
        elif recipe in ("slerp", "ties-rescaled"):
            beyond = (mine.double() - tensor.double()).abs() > room(name, tensor, models)
            assert not (beyond & differs).any(), name
        else:
            assert not differs.any(), name


@pytest.mark.parametrize("case", EXACT, ids=lambda case: name_of(*case))
def test_what_mergekit_made(folders: Any, tmp_path: Path, case: tuple[str, str, str]) -> None:
    kind, recipe, dtype = case
    folder = folders(kind, dtype)
    merge(write_recipe(folder, recipe), Output(tmp_path / "out"))
    expected = load_file(FOLDER / f"{name_of(*case)}.safetensors")
    found = in_modules(tmp_path / "out")
    assert found.keys() == expected.keys()
    check(recipe, found, expected, folder)
    config = json.loads((tmp_path / "out/config.json").read_text())
    layers = {name.split(".")[2] for name in expected if ".layers." in name}
    assert config["num_hidden_layers"] == len(layers)
    assert config["dtype"] == str(next(iter(expected.values())).dtype).removeprefix("torch.")


def test_the_record_names_its_versions() -> None:
    record = json.loads(RECORD.read_text())
    assert {"mergekit", "torch", "transformers"} <= record["versions"].keys()
    assert [tuple(case) for case in record["cases"]] == CASES


@pytest.mark.parametrize("recipe", RANDOM)
def test_random_methods_by_density_and_sums(folders: Any, tmp_path: Path, recipe: str) -> None:
    """Ours and mergekit's keep the same share, up to chance, and give a difference back its sum of absolute values."""
    folder = folders("llama", "bfloat16")
    path = write_recipe(folder, recipe)
    merge(path, Output(tmp_path / "one"), seed=3)
    merge(path, Output(tmp_path / "same"), seed=3, threads=1)
    merge(path, Output(tmp_path / "other"), seed=4)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "same")
    ours, other = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "other")
    theirs = load_file(FOLDER / f"{name_of('llama', recipe, 'bfloat16')}.safetensors")
    base, first = tensors_of(folder / "base"), tensors_of(folder / "a")
    assert sum(not torch.equal(ours[name], other[name]) for name in ours) > len(ours) / 2
    if recipe == "dare_linear":
        check_random(ours, theirs, base, first)


def check_random(ours: Tensors, theirs: Tensors, base: Tensors, first: Tensors) -> None:
    """Whether both keep half of a difference, up to chance, and give back its sum of absolute values."""
    kept = {"ours": 0, "theirs": 0}
    total = 0
    for name in theirs:
        start = base[name]
        delta = first[name].float() - start.float()
        for who, found in (("ours", ours), ("theirs", theirs)):
            moved = found[name] - start.float()
            kept[who] += int((moved != 0).sum())
            assert float(moved.abs().sum()) == pytest.approx(float(delta.abs().sum()), rel=1e-4)
            factors = (moved / delta)[(moved != 0) & (delta != 0)]
            assert float(factors.max() - factors.min()) < 0.02 * float(factors.mean())  # float32 of small differences
        total += int((delta != 0).sum())
    for who, count in kept.items():
        assert abs(count - total / 2) < 5 * math.sqrt(total / 4), who


def test_slerp_in_float32_is_that_of_float64(folders: Any, tmp_path: Path) -> None:
    """What mergekit makes in float64, rounded. Its own float32 is off by what its float32 norms are off."""
    folder = folders("llama", "bfloat16")
    path = folder / "slerp-float32.yaml"
    path.write_text(yaml.safe_dump({**RECIPES["slerp-sliced"], "dtype": "float32"}))
    merge(path, Output(tmp_path / "out"))
    exact = load_file(FOLDER / f"{name_of('llama', 'slerp-sliced', 'bfloat16')}.safetensors")
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert ulps(tensor, exact[name])[1] <= 1, name


@pytest.mark.slow
@pytest.mark.skipif(MERGEKIT is None, reason="mergekit-yaml is not on PATH")
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "gemma3", "mixtral", "qwen3_moe"])
def test_what_mergekit_makes_now(tmp_path: Path, kind: str) -> None:
    """All recipes, by mergekit in its own environment. Of multimodal models it takes no slices."""
    base = (
        save_llama(tmp_path / "base", dtype="bfloat16")
        if kind == "llama"
        else save_model(tmp_path / "base", kind, dtype="bfloat16")
    )
    if kind == "gemma3":
        as_on_the_hub(base / "model.safetensors")
    for seed, name in enumerate(("a", "b"), 1):
        tuned(base, tmp_path / name, seed)
    recipes = [name for name, recipe in RECIPES.items() if kind != "gemma3" or "models" in recipe]
    paths = {name: write_recipe(tmp_path, name) for name in recipes}
    mergekit(*paths.values())
    for name, path in paths.items():
        merge(path, Output(tmp_path / "ours", options=Options()), overwrite=True)
        found, expected = in_modules(tmp_path / "ours"), tensors_of(out_of(path))
        missing = [one for one in found if one not in expected]
        assert all(one.startswith("vision_tower.vision_model.head.") for one in missing), "mergekit leaves out others"
        if name == "dare_linear":
            check_random(found, expected, in_modules(base), in_modules(tmp_path / "a"))
        elif name not in RANDOM:
            check(name, found, expected, tmp_path)


def mergekit(*recipes: Path) -> None:
    """Has mergekit carry recipes out, each into `out_of` it."""
    python = Path(str(MERGEKIT)).parent / "python"
    command = [str(python), "-m", "fixtures.make_merges", *map(str, recipes)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(command, check=True, capture_output=True, env=environment)


def as_on_the_hub(file: Path) -> None:
    """Gives a tower the names that released files have, and mergekit looks for; transformers saves shorter ones."""
    renamed = {
        name.replace("vision_tower.", "vision_tower.vision_model."): one for name, one in load_file(file).items()
    }
    save_file(renamed, file, metadata={"format": "pt"})


@pytest.mark.parametrize("recipe", ["ties", "slerp", "ties-rescaled", "dare_linear"])
def test_tiles_and_threads_give_the_same_bytes(folders: Any, tmp_path: Path, recipe: str, monkeypatch: Any) -> None:
    """Whole tensors in one block, and many small blocks of many tiles: limits, sums and random numbers are the same."""
    folder = folders("llama", "bfloat16")
    path = write_recipe(folder, recipe)
    merge(path, Output(tmp_path / "whole"), threads=1)
    monkeypatch.setattr(computed, "_tiles", Cache(0, len))
    monkeypatch.setattr(computed, "TILE", 100)
    monkeypatch.setattr(computed, "BLOCK", 33)
    merge(path, Output(tmp_path / "small"), threads=4)
    assert (tmp_path / "small/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_models_of_megatron_and_into_megatron(folders: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(folders("llama", "bfloat16"), tmp_path / "models")
    path = write_recipe(folder, "ties")
    merge(path, Output(tmp_path / "hf"))
    for name, to, grid in (("base", "torch", Parallelism(2, 2)), ("a", "torch_dist", Parallelism(2))):
        convert(folder / name, folder / "meg", to=to, grid=grid)
        shutil.rmtree(folder / name)
        (folder / "meg").rename(folder / name)
    merge(path, Output(tmp_path / "again"))
    one, other = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "again")
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    merge(path, Output(tmp_path / "tp2", "torch", Options(grid=Parallelism(2))))
    convert(tmp_path / "tp2", tmp_path / "back", to="hf")
    back = tensors_of(tmp_path / "back")
    assert all(torch.equal(tensor, back[name]) for name, tensor in one.items())
    assert (tmp_path / "back/mergekit_config.yml").read_bytes() == path.read_bytes()
    assert "merge_method: ties" in (tmp_path / "back/README.md").read_text()


def test_experts_towers_and_per_layer_inputs(tmp_path: Path) -> None:
    """What mergekit does not know. Towers are merged, too, but not by slices: these are about the text model alone."""
    for kind in ("qwen3_moe", "gemma4", "gemma4_text-moe"):
        folder = tmp_path / kind
        base = save_model(folder / "base", kind, dtype="bfloat16")
        tuned(base, folder / "a", 1)
        for recipe in ("slerp", "slerp-sliced"):
            wanted = RECIPES[recipe]
            if recipe == "slerp-sliced":
                layers = json.loads((base / "config.json").read_text())
                count = layers.get("text_config", layers)["num_hidden_layers"]
                sources = [{"model": name, "layer_range": [0, count]} for name in ("base", "a")]
                wanted = {**wanted, "slices": [{"sources": sources}], "dtype": "bfloat16", "out_dtype": "bfloat16"}
            (folder / "recipe.yaml").write_text(yaml.safe_dump(wanted))
            merge(folder / "recipe.yaml", Output(folder / "out"), overwrite=True)
            found, before, after = (tensors_of(folder / name) for name in ("out", "base", "a"))
            assert found.keys() == before.keys()
            moved = [name for name in found if not torch.equal(found[name], before[name])]
            tower = [name for name in found if "tower" in name or "embed_vision" in name]
            assert any(name in moved for name in tower) == (recipe == "slerp" and kind == "gemma4")
            assert any("experts" in name for name in moved) == ("moe" in kind)
            assert all(found[name].isfinite().all() or not before[name].isfinite().all() for name in found)
            for name in moved:
                low, high = torch.minimum(before[name], after[name]), torch.maximum(before[name], after[name])
                assert found[name].shape == low.shape == high.shape


TIES: dict[str, Any] = RECIPES["ties"]
LINEAR: dict[str, Any] = RECIPES["linear"]
PASSED: dict[str, Any] = RECIPES["passthrough"]


def layers_of_a(*span: int) -> list[dict[str, Any]]:
    return [{"model": "a", "layer_range": list(span)}]


@pytest.mark.parametrize(
    ("recipe", "error", "match"),
    [
        ({**TIES, "merge_method": "della"}, UnsupportedError, r"merge_method 'della'.*done are passthrough"),
        ({**TIES, "modules": {}}, UnsupportedError, "modules of a recipe is not done"),
        ({**TIES, "tokenizer": {"source": "union"}}, UnsupportedError, r"no tokenizer.json to know the tokens by"),
        ({**TIES, "chat_template": "auto"}, InputError, "no tokenizer that it could belong to"),
        ({**TIES, "x" * 5000: 1}, UnsupportedError, r"yaml: x+[.]{3}[+]\d+[.]{3}x+ of a recipe is not done"),
        ({**TIES, "base_mdoel": "base"}, UnsupportedError, r"base_mdoel.*did you mean base_model"),
        ({**TIES, "parameters": {"gamma": 0.1}}, UnsupportedError, r"parameters.gamma of a recipe"),
        ({**LINEAR, "models": [{"model": "a", "weight": 1}]}, UnsupportedError, r"models\[0\].weight"),
        ({**PASSED, "slices": [{**PASSED["slices"][0], "residual_weight": 0.5}]}, UnsupportedError, "residual_weight"),
        ({**TIES, "tokenizer_source": "elsewhere"}, InputError, "none of the models"),
        ({**TIES, "tokenizer_source": "base"}, UnsupportedError, r"no tokenizer.json"),
        ({**TIES, "base_model": None}, InputError, "needs a base_model"),
        ({**TIES, "dtype": "int8"}, UnsupportedError, "dtype int8 of a recipe; one of bfloat16"),
        ({**TIES, "out_dtype": "x" * 5000}, UnsupportedError, r"out_dtype x+[.]{3}[+]\d+[.]{3}x+ of a recipe"),
        ({**LINEAR, "models": LINEAR["models"] * 2}, InputError, "names a model twice"),
        ({**LINEAR, "models": [{"model": "a"}]}, InputError, r"parameter weight is missing for a \(model"),
        ({**LINEAR, "models": [{"model": "a", "parameters": {"weight": "x"}}]}, InputError, "weight must be a number"),
        ({**LINEAR, "models": [{"model": "a", "parameters": {"weight": 0}}]}, InputError, "add up to 0"),
        ({**LINEAR, "parameters": {"normalize": 3}}, InputError, "normalize must be true or false"),
        ({**LINEAR, "slices": PASSED["slices"]}, InputError, "either models or slices"),
        ({**LINEAR, "models": []}, InputError, "models must be a list"),
        ({**LINEAR, "models": [{"model": "nowhere", "parameters": {"weight": 1}}]}, InputError, "no such directory"),
        ({**LINEAR, "models": [{"model": "a+b", "parameters": {"weight": 1}}]}, UnsupportedError, "adapter merge a b"),
        ({**PASSED, "merge_method": "slerp"}, InputError, "needs a base_model"),
        (
            {**PASSED, "slices": [{"sources": [{"model": "a", "layer_range": [2, 5]}]}]},
            InputError,
            "which has 4 layers",
        ),
        (
            {**PASSED, "slices": [{"sources": [{"model": "a", "layer_range": [2, 2]}]}]},
            InputError,
            "layer_range must be",
        ),
        ({**PASSED, "slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}] * 2}]}, InputError, "twice"),
        (
            {**LINEAR, "models": [{"model": "a", "parameters": {"weight": [{"filter": 3, "value": 1}]}}]},
            InputError,
            r"weight\[0\].filter must be a path or a name",
        ),
    ],
)
def test_what_is_refused(
    folders: Any, tmp_path: Path, recipe: dict[str, Any], error: type[CkptkitError], match: str
) -> None:
    path = folders("llama", "bfloat16") / "wrong.yaml"
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(error, match=match):
        merge(path, Output(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("- 1", "the recipe must be a mapping"),
        ("a: [", "not valid YAML"),
        ("merge_method: linear\nmerge_method: ties", "twice"),
        ("a: &x [1]\nb: {<<: *x}", "not valid YAML"),
        ("x" * 600_000, "larger|bytes"),
        *((f"merge_method: !!{kind}", "not valid YAML") for kind in ("int ''", "float ''", "bool x", "timestamp x")),
        ("merge_method: linear\n".encode("utf-16"), "byte 0 is not UTF-8"),
    ],
)
def test_hostile_recipes(tmp_path: Path, text: str | bytes, match: str) -> None:
    (tmp_path / "recipe.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=match):
        merge(tmp_path / "recipe.yaml", Output(tmp_path / "out"))


def test_numbers_that_would_overflow(tmp_path: Path) -> None:
    text = "merge_method: linear\nmodels: [{model: a, parameters: {weight: [1, 1e300]}}]"
    recipe = read_recipe(text.encode(), "r")
    with pytest.raises(InputError, match=r"weight must be a number of at most 1e\+06, not '1e300'"):
        resolved([recipe.slices[0].sources[0].parameters], "weight", "x", 0.0, "r")


def test_gradients_and_filters() -> None:
    """As `evaluate_setting` of mergekit has it."""
    gradient = {"weight": [0.0, 1.0, 0.5]}
    assert [resolved([gradient], "weight", "x", t, "") for t in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.5, 1, 0.75, 0.5]
    flags = {"normalize": [True, False, True]}
    assert [resolved([flags], "normalize", "x", t, "") for t in (0, 0.49, 0.5, 1)] == [True, True, False, True]
    filtered = {"weight": [{"filter": "mlp", "value": "1e-1"}, {"filter": "*", "value": 2}]}
    assert resolved([filtered], "weight", "a.mlp.b", 0, "") == 0.1
    assert resolved([filtered], "weight", "a.b", 0, "") == 2
    only = {"weight": {"filter": "mlp", "value": 1}}
    assert resolved([only, {"weight": 3}], "weight", "a.b", 0, "") == 3
    assert resolved([only], "weight", "a.b", 0, "") is None
