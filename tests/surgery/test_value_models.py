"""Split Llamas with a value head: through every format and back, in transformers, and on ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptkit import convert, open_checkpoint, verify
from ckptkit.errors import UsageError
from ckptkit.sharding.grid import Parallelism
from ckptkit.verification.logits import Side, verify_logits
from ckptkit.verification.ranks.pool import RankPool
from tests.models import files_of
from tests.precision import relative_error
from tests.surgery.pairs import KINDS, WIDE, load_remote

EXACT = 2e-5
ROW = 7
TOKENS = [[(7 * i + 3 * i * i + 5 * n) % 250 for i in range(n)] for n in (24, 3, 17, 1, 24)]
CODE = {"configuration_custom_split_llama.py", "modeling_custom_split_llama.py"}


@pytest.fixture(scope="module")
def values(wide_splits: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind of the adapter -> a value model whose head is one row of the split Llama's own head."""
    folder = tmp_path_factory.mktemp("values")
    for kind, source in wide_splits.items():
        head = load_file(source / "model.safetensors")["lm_head.weight"][ROW : ROW + 1].clone()
        save_file({"score.weight": head}, folder / "head.safetensors")
        convert(source, folder / kind, to="hf", head="value", head_init=f"file:{folder}/head.safetensors")
    return {kind: folder / kind for kind in wide_splits}


def load_values(path: Path, name: str = "AutoModelForTokenClassification") -> Any:
    """A value model as a user loads it; nothing may be missing or left."""
    import transformers

    auto = getattr(transformers, name)
    model, info = auto.from_pretrained(path, trust_remote_code=True, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_values_are_the_logits_of_the_row(wide_splits: dict[str, Path], values: dict[str, Path], kind: str) -> None:
    tokens = torch.tensor(TOKENS[:1])
    expected = load_remote(wide_splits[kind])(tokens).logits[..., ROW]
    model = load_values(values[kind])
    found = model(tokens).logits[..., 0]
    assert model.config.num_labels == 1 and model.score.weight.shape == (1, WIDE)
    assert relative_error(found, expected) < EXACT < 1e-2 < relative_error(found.roll(1, 1), expected)


@torch.no_grad()
def test_a_classifier_of_sequences(values: dict[str, Path], tmp_path: Path, pool: RankPool) -> None:
    """The same model without a bias, read at the last token; it converts and verifies as well."""
    source = tmp_path / "sequences"
    shutil.copytree(values["mlp"], source)
    raw = json.loads((source / "config.json").read_text())
    raw["architectures"] = ["CustomSplitLLamaForSequenceClassification"]
    (source / "config.json").write_text(json.dumps(raw))
    tensors = load_file(source / "model.safetensors")
    del tensors["score.bias"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    tokens = torch.tensor(TOKENS[:1])
    last = load_values(source, "AutoModelForSequenceClassification")(tokens).logits[..., 0]
    assert relative_error(last, load_values(values["mlp"])(tokens).logits[:, -1, 0]) < EXACT
    convert(source, tmp_path / "meg", to="torch", grid=Parallelism(1, 2, first_stage_layers=2), spec="local")
    assert verify(source, tmp_path / "meg", tokens=TOKENS, tolerance=EXACT, pool=pool).passed


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_and_back(values: dict[str, Path], tmp_path: Path, kind: str) -> None:
    source = values[kind]
    assert {path.name for path in source.iterdir()} >= CODE
    stages = Parallelism(2, 2, first_stage_layers=2)
    for to, grid in (("packed", Parallelism()), ("torch", stages), ("torch_dist", stages)):
        convert(source, tmp_path / to, to=to, grid=grid)
        assert verify(source, tmp_path / to, level="weights").passed
        convert(tmp_path / to, tmp_path / "hf", to="hf", overwrite=True)
        assert files_of(tmp_path / "hf") == files_of(source)
    for tp in range(2):
        first, last = (open_checkpoint(source).shard(tp_rank=tp, pp_rank=pp, grid=stages) for pp in range(2))
        assert last["output_layer.weight"].shape == (1, WIDE) and last["output_layer.bias"].shape == (1,)
        assert not any(name.startswith("output_layer") for name in first)


@pytest.mark.parametrize(
    ("kind", "grid", "how"),
    [
        ("linear", Parallelism(2), {"sequence_parallel": True, "packed": True}),
        ("mlp", Parallelism(1, 2, first_stage_layers=2, adapter_first=True), {}),
        pytest.param(
            "two-linear", Parallelism(2, 2, first_stage_layers=2), {"sequence_parallel": True}, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_values_on_ranks(
    values: dict[str, Path], tmp_path: Path, pool: RankPool, kind: str, grid: Parallelism, how: dict[str, Any]
) -> None:
    source = values[kind]
    convert(source, tmp_path / "meg", to="torch", grid=grid, spec="local")
    report = verify(source, tmp_path / "meg", tokens=TOKENS, tolerance=EXACT, pool=pool, **how)
    assert report.passed, report.levels[-1].summary
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    tensors = load_file(source / "model.safetensors")
    tensors["score.weight"] *= 1.001
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    sides = Side(broken, "hf"), Side(tmp_path / "meg", "megatron")
    assert not verify_logits(*sides, tokens=TOKENS, tolerance=EXACT, pool=pool, **how).passed


def test_code_of_an_older_directory_is_replaced(wide_splits: dict[str, Path], tmp_path: Path) -> None:
    """`auto_map` names classes that the code beside an older checkpoint does not have."""
    source = tmp_path / "old"
    shutil.copytree(wide_splits["linear"], source)
    raw = json.loads((source / "config.json").read_text())
    for name in ("AutoModelForTokenClassification", "AutoModelForSequenceClassification"):
        del raw["auto_map"][name]
    (source / "config.json").write_text(json.dumps(raw))
    file = source / "modeling_custom_split_llama.py"
    file.write_text(file.read_text().partition("class CustomSplitLLamaForTokenClassification")[0])
    convert(source, tmp_path / "values", to="hf", head="value", head_init="normal")
    assert load_values(tmp_path / "values").score.weight.any()


def test_there_is_no_legacy_layout_of_a_value_model(wide_splits: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--layout legacy: a value model has no such layout"):
        convert(wide_splits["linear"], tmp_path / "out", to="hf", head="value", layout="legacy")
    convert(wide_splits["linear"], tmp_path / "values", to="hf", head="value")
    with pytest.raises(UsageError, match="--layout legacy"):
        convert(tmp_path / "values", tmp_path / "out", to="hf", layout="legacy")
    assert not (tmp_path / "out").exists()
