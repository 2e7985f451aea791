"""Layers of multi-token prediction: converted whatever config.json counts, and named wherever they are or are not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ckptkit import Parallelism, convert, open_checkpoint, verify
from ckptkit.errors import InputError, UnsupportedError, UsageError
from tests.models import add_prediction, files_of, save_model

CASES: list[tuple[str, dict[str, Any]]] = [
    ("torch", {"grid": Parallelism(2, 2, ep=2)}),
    ("torch_dist", {"grid": Parallelism(1, 2), "spec": "local"}),
    ("packed", {}),
    ("torch", {"grid": Parallelism(2, 2, 2, ep=2), "spec": "local"}),
    ("torch", {"grid": Parallelism(1, 2, last_stage_layers=1)}),
    ("torch_dist", {"grid": Parallelism(2, 2, ep=2)}),
]
SLOW = [pytest.param(kind, 1, *case, marks=pytest.mark.slow) for kind in ("glm4_moe", "deepseek_v3") for case in CASES]


def said(notes: Any) -> str:
    return "; ".join(note for note in notes if "multi-token" in note)


@pytest.mark.parametrize(
    ("kind", "count", "to", "options"),
    [("glm4_moe", 2, *CASES[0]), ("deepseek_v3", 1, *CASES[1]), ("glm4_moe_lite", 1, *CASES[3]), *SLOW],
)
def test_round_trip(tmp_path: Path, kind: str, count: int, to: str, options: dict[str, Any]) -> None:
    source = add_prediction(save_model(tmp_path / "hf", kind, dtype="bfloat16"), count)
    result = convert(source, tmp_path / "meg", to=to, **options)
    assert f"{count} layer" in said(result.notes)
    back = convert(tmp_path / "meg", tmp_path / "back", to="hf")
    assert files_of(tmp_path / "back") == files_of(source)
    assert f"{count} layer" in said(back.notes)
    assert open_checkpoint(tmp_path / "meg").args["mtp_num_layers"] == count
    shutil.rmtree(tmp_path / "meg" / "ckptkit")
    convert(tmp_path / "meg", tmp_path / "bare", to="hf", hf_reference=source)
    assert files_of(tmp_path / "bare") == files_of(source)


def test_by_args_alone(tmp_path: Path) -> None:
    source = add_prediction(save_model(tmp_path / "hf", "deepseek_v3"), copies=False)
    convert(source, tmp_path / "meg", to="torch", grid=Parallelism(1, 2))
    shutil.rmtree(tmp_path / "meg" / "ckptkit")
    convert(tmp_path / "meg", tmp_path / "back", to="hf")
    assert open_checkpoint(tmp_path / "back").config.mtp_layers == 1
    assert json.loads((tmp_path / "back" / "config.json").read_text())["num_nextn_predict_layers"] == 1


@pytest.mark.parametrize("grid", [Parallelism(2), Parallelism(1, 2, 2)])
def test_names_of_either_release(tmp_path: Path, grid: Parallelism) -> None:
    """A rank of Megatron-Core 0.19 calls the layer inside `mtp_model_layer`; distributed checkpoints do not."""
    import torch

    source = add_prediction(save_model(tmp_path / "hf", "glm4_moe"))
    convert(source, tmp_path / "old", to="torch", grid=grid)
    convert(source, tmp_path / "meg", to="torch", grid=grid, megatron_core="0.19")
    changed = 0
    for path in (tmp_path / "meg").glob("release/*/model_optim_rng.pt"):
        old = tmp_path / "old" / path.relative_to(tmp_path / "meg")
        contents = [torch.load(file, weights_only=False) for file in (old, path)]
        for key in contents[0].keys() & {"model", "model0", "model1"}:
            renamed = [name.replace(".transformer_layer.", ".mtp_model_layer.") for name in contents[0][key]]
            assert renamed == list(contents[1][key])
            changed += renamed != list(contents[0][key])
    assert changed == grid.tp
    convert(tmp_path / "meg", tmp_path / "back", to="hf")
    assert files_of(tmp_path / "back") == files_of(source)
    for to in ("packed", "torch_dist", "hf"):
        with pytest.raises(UsageError, match="--megatron-core applies only to files of ranks"):
            convert(source, tmp_path / "no", to=to, megatron_core="0.19")


def test_copies_must_be_equal(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = add_prediction(save_model(tmp_path / "hf", "deepseek_v3"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.4.shared_head.head.weight"][3, 5] += 1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"shared_head\.head\.weight repeats lm_head\.weight"):
        convert(source, tmp_path / "meg", to="packed")


def test_the_embedding_of_the_last_stage_must_be_that_of_the_first(tmp_path: Path) -> None:
    import torch

    source = add_prediction(save_model(tmp_path / "hf", "glm4_moe"))
    convert(source, tmp_path / "meg", to="torch", grid=Parallelism(1, 2))
    path = tmp_path / "meg" / "release" / "mp_rank_00_001" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    content["model"]["embedding.word_embeddings.weight"][1] *= 2
    torch.save(content, path)
    with pytest.raises(InputError, match="the embedding of the last stage, for multi-token prediction"):
        convert(tmp_path / "meg", tmp_path / "back", to="hf")
    del content["model"]["embedding.word_embeddings.weight"]
    torch.save(content, path)
    with pytest.raises(InputError, match="the copy for multi-token prediction on the last stage"):
        convert(tmp_path / "meg", tmp_path / "again", to="hf")


@pytest.mark.parametrize("gone", ["eh_proj.weight", "mlp.experts.3.up_proj.weight", "shared_head.norm.weight"])
def test_a_missing_tensor_is_named(tmp_path: Path, gone: str) -> None:
    from safetensors.torch import load_file, save_file

    source = add_prediction(save_model(tmp_path / "hf", "glm4_moe"))
    tensors = load_file(source / "model.safetensors")
    del tensors[f"model.layers.4.{gone}"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"missing: model\.layers\.4\.{gone}"):
        convert(source, tmp_path / "meg", to="packed")


def test_trained_without_against_a_reference_with(tmp_path: Path) -> None:
    plain = save_model(tmp_path / "plain", "deepseek_v3")
    convert(plain, tmp_path / "meg", to="torch", grid=Parallelism(2))
    reference = add_prediction(save_model(tmp_path / "reference", "deepseek_v3"))
    result = convert(tmp_path / "meg", tmp_path / "back", to="hf", hf_reference=reference)
    assert "counts 1 of multi-token prediction" in said(result.notes)
    report = verify(reference, tmp_path / "back", level="weights")
    assert not report.passed and report.levels[-1].summary.startswith("mtp_layers is 1 in the reference, 0 in")
    assert verify(plain, tmp_path / "back", level="weights").passed


def test_args_that_count_what_is_not_there(tmp_path: Path) -> None:
    from tests.checkpoints.args_files import set_args

    convert(save_model(tmp_path / "hf", "glm4_moe"), tmp_path / "meg", to="packed")
    set_args(tmp_path / "meg", mtp_num_layers=1)
    with pytest.raises(UnsupportedError, match=r"mtp_num_layers 1 \(layers of multi-token prediction\)"):
        open_checkpoint(tmp_path / "meg")


def test_what_has_no_place_for_them(tmp_path: Path) -> None:
    source = add_prediction(save_model(tmp_path / "hf", "deepseek_v3"))
    result = convert(source, tmp_path / "value", to="hf", head="value")
    assert "of multi-token prediction, are left out" in said(result.lossy)
    assert not open_checkpoint(tmp_path / "value").config.mtp_layers
    with pytest.raises(UsageError, match="--megatron-model hybrid"):
        convert(source, tmp_path / "hybrid", to="torch", megatron_model="hybrid")


def test_it_is_said_that_no_level_runs_them(tmp_path: Path) -> None:
    source = add_prediction(save_model(tmp_path / "hf", "glm4_moe"))
    convert(source, tmp_path / "meg", to="packed")
    report = verify(source, tmp_path / "meg", level="weights")
    assert report.passed and "by its weights alone" in said(report.messages)


def test_exchanged_halves_are_named(tmp_path: Path) -> None:
    """The projection takes the embedding first and the hidden state behind it, in both libraries."""
    import torch

    source = add_prediction(save_model(tmp_path / "hf", "glm4_moe"))
    convert(source, tmp_path / "meg", to="torch")
    path = tmp_path / "meg" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    weight = content["model"]["mtp.layers.0.eh_proj.weight"]
    content["model"]["mtp.layers.0.eh_proj.weight"] = torch.cat(weight.chunk(2, dim=1)[::-1], dim=1)
    torch.save(content, path)
    report = verify(source, tmp_path / "meg", level="weights")
    assert not report.passed and "eh_proj" in json.dumps(report.levels[-1].details)


@pytest.mark.slow
def test_logits_do_not_depend_on_them(tmp_path: Path) -> None:
    source = add_prediction(save_model(tmp_path / "hf", "deepseek_v3"))
    convert(source, tmp_path / "meg", to="torch", spec="local", grid=Parallelism(1, 2))
    report = verify(source, tmp_path / "meg", tolerance=1e-5, device="cpu")
    assert report.passed and [level.name for level in report.levels][2:] == ["logits", "prediction"]
    assert not said(report.messages)
