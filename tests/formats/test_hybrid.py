"""HybridModel's schema, both ways: the real model (in megatron-core 0.16 MambaModel) writes and loads it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptkit.checkpoints.opening import open_checkpoint
from ckptkit.conversion.convert import convert
from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.inspection.differences import diff
from ckptkit.sharding.grid import Parallelism
from ckptkit.tables.hybrid_names import gpt_args, gpt_name, hybrid_args, hybrid_name, pattern_of
from tests.checkpoints.args_files import set_args
from tests.formats.golden_hf import save_hf
from tests.formats.megatron_ranks import Job
from tests.formats.rank_pool import RankProcesses
from tests.formats.round_trip import check, label
from tests.models import files_of, save_llama, save_model

MODELS = ("qwen3", "qwen3_tied", "qwen3_moe")
NAMES = (
    "decoder.layers.{i}.self_attention.linear_qkv.weight",
    "decoder.layers.{i}.self_attention.q_layernorm.weight",
    "decoder.layers.{i}.input_layernorm.weight",
    "decoder.layers.{i}.pre_mlp_layernorm.weight",
    "decoder.layers.{i}.mlp.linear_fc1.layer_norm_weight",
    "decoder.layers.{i}.mlp.experts.linear_fc1.weight3",
    "embedding.word_embeddings.weight",
    "decoder.final_layernorm.weight",
    "language_model.decoder.layers.{i}.mlp.linear_fc2.weight",
)


@given(st.sampled_from(NAMES), st.integers(0, 200), st.integers(0, 200))
def test_names_go_there_and_back(name: str, layer: int, before: int) -> None:
    gpt = name.format(i=layer)
    assert gpt_name(hybrid_name(gpt)) == gpt
    assert gpt_name(hybrid_name(gpt), 2 * before) == name.format(i=layer + before)


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.data())
def test_arguments_go_there_and_back(moe: list[bool], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, len(moe)), max_size=3)) | {0, len(moe)})
    stages = [range(start, stop) for start, stop in pairwise(cuts)]
    skip = data.draw(st.none() | st.lists(st.integers(0, 1), min_size=len(moe), max_size=len(moe)))
    freq = 1 if all(moe) else [int(has) for has in moe]
    args = {"num_layers": len(moe), "window_attn_skip_freq": skip, "moe_layer_freq": freq, "hidden_size": 8}
    hybrid = hybrid_args(args, moe, stages)
    assert hybrid["num_layers"] == 2 * len(moe)
    assert hybrid["hybrid_layer_pattern"].count("|") == len(stages) - 1
    pattern = hybrid["hybrid_layer_pattern"].replace("|", "")
    told = gpt_args(hybrid, pattern)
    assert {key: told[key] for key in args} == args
    with pytest.raises(InputError, match="args give the layer pattern"):
        gpt_args(hybrid, pattern + "*-")


def test_a_window_on_every_nth_layer_counts_layers_of_the_hybrid_model() -> None:
    """`window_attn_skip_freq` of 3: layers 3, 6, ... of HybridModel see everything, of which attention are the odd."""
    args = {"num_layers": 8, "window_attn_skip_freq": 3, "hybrid_layer_pattern": "*-*-*-*-"}
    assert gpt_args(args, "*-*-*-*-")["window_attn_skip_freq"] == [1, 0, 1, 1]


def test_layers_that_hugging_face_has_not() -> None:
    with pytest.raises(UnsupportedError, match="layer 1 of the HybridModel holds self_attention"):
        gpt_name("decoder.layers.1.self_attention.linear_qkv.weight")
    with pytest.raises(UnsupportedError, match="layer 0 of the HybridModel holds mixer"):
        gpt_name("decoder.layers.0.mixer.in_proj.weight")
    with pytest.raises(UnsupportedError, match="multi-token prediction"):
        gpt_args({"hybrid_layer_pattern": "*-*-/*-"}, "*-*-")
    with pytest.raises(UsageError, match="its layers have no layer_scalar"):
        hybrid_name("decoder.layers.3.layer_scalar")
    assert (
        pattern_of([f"decoder.layers.0.{name}.weight" for name in ("self_attention.linear_kv_down_proj", "mlp.router")])
        == "+E"
    )
    assert pattern_of(["decoder.layers.1.mlp.router.weight", "decoder.layers.0.mlp.linear_fc1.weight"]) == "*-*E"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("spec", ["te", pytest.param("local", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("to", "grid"),
    [
        ("torch", Parallelism(2, 2)),
        ("torch", Parallelism(1, 2, 2)),
        ("torch", Parallelism(1, 2, first_stage_layers=1)),
        ("torch_dist", Parallelism(2, 2)),
        ("packed", Parallelism()),
    ],
    ids=str,
)
def test_comes_back_byte_for_byte(tmp_path: Path, model: str, spec: str, to: str, grid: Parallelism) -> None:
    grid = replace(grid, ep=2 if model == "qwen3_moe" and to != "packed" else 1)
    source = save_hf(tmp_path / "hf", model)
    convert(source, tmp_path / "megatron", to=to, grid=grid, spec=spec, megatron_model="hybrid")
    assert str(open_checkpoint(tmp_path / "megatron").grid) == str(grid)
    convert(tmp_path / "megatron", tmp_path / "back", to="hf")
    assert files_of(tmp_path / "back") == files_of(source)
    shutil.rmtree(tmp_path / "megatron" / "ckptkit", ignore_errors=True)
    result = convert(tmp_path / "megatron", tmp_path / "alone", to="hf")
    assert "its tensors are those of Megatron-Core's HybridModel" in result.notes
    whole, alone = (json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "alone"))
    assert {key: alone[key] for key in whole if key in alone and key != "torch_dtype"} == {
        key: whole[key] for key in whole if key in alone and key != "torch_dtype"
    }


LATENT: list[tuple[str, str, str, Parallelism, str]] = [
    # kind, spec, format, grid, and the pattern
    ("deepseek_v3", "te_fused", "torch", Parallelism(2, 2, ep=2), "+-+E|+E+E"),
    ("deepseek_v3-moonlight", "local", "torch", Parallelism(1, 2, 2), "+-|+-|+-|+E"),
    ("glm4_moe_lite", "te", "torch_dist", Parallelism(2, 2), "+-+E|+-+E"),
    ("deepseek_v3", "te", "packed", Parallelism(), "+-+E+E+E"),
]


@pytest.mark.parametrize(("kind", "spec", "to", "grid", "pattern"), LATENT, ids=str)
def test_latent_attention(tmp_path: Path, kind: str, spec: str, to: str, grid: Parallelism, pattern: str) -> None:
    """Both ways, with and without the sidecar. A pattern with plain attention contradicts the tensors."""
    source = save_model(tmp_path / "hf", kind)
    convert(source, tmp_path / "megatron", to=to, grid=grid, spec=spec, megatron_model="hybrid")
    opened = open_checkpoint(tmp_path / "megatron")
    assert opened.args["hybrid_layer_pattern"] == pattern and not opened.disagreements
    convert(tmp_path / "megatron", tmp_path / "back", to="hf")
    assert files_of(tmp_path / "back") == files_of(source)
    shutil.rmtree(tmp_path / "megatron" / "ckptkit", ignore_errors=True)
    convert(tmp_path / "megatron", tmp_path / "alone", to="hf")
    assert diff(tmp_path / "alone", source).same
    set_args(tmp_path / "megatron", hybrid_layer_pattern=pattern.replace("+", "*"))
    with pytest.raises(InputError, match="args give the layer pattern"):
        open_checkpoint(tmp_path / "megatron")


def test_what_a_hybrid_model_cannot_be_told(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "hf", "llama3")
    plain = convert(source, tmp_path / "a", to="torch", dry_run=True)
    hybrid = convert(source, tmp_path / "a", to="torch", megatron_model="hybrid", dry_run=True)
    assert [note for note in hybrid.notes if note not in plain.notes] == [
        "not in Megatron's arguments: llama3 rope: HybridModel does not scale it (GPTModel does)"
    ]
    with pytest.raises(UnsupportedError, match="HybridModel does not scale it"):
        convert(source, tmp_path / "a", to="torch", megatron_model="hybrid", strict_config=True, dry_run=True)
    with pytest.raises(UsageError, match="--megatron-model applies only to Megatron formats"):
        convert(source, tmp_path / "a", to="hf", megatron_model="hybrid", dry_run=True)
    with pytest.raises(UsageError, match="--megatron-model mamba; one of gpt, hybrid"):
        convert(source, tmp_path / "a", to="torch", megatron_model="mamba", dry_run=True)


def test_windows_survive(tmp_path: Path) -> None:
    source = save_model(tmp_path / "hf", "qwen2-windowed")
    convert(source, tmp_path / "megatron", to="torch_dist", megatron_model="hybrid")
    assert open_checkpoint(tmp_path / "megatron").disagreements == ()
    shutil.rmtree(tmp_path / "megatron" / "ckptkit")
    windows = [layer.window for layer in open_checkpoint(tmp_path / "megatron").config.layers]
    assert windows == [None, None, 16, 16]


def jobs(size: int) -> list[Job]:
    """What real ranks do with `torch_dist` and `torch`; other grids than the writer's for the former."""
    grids: dict[str, list[dict[str, int]]] = {
        "qwen3": [{}] if size == 1 else [{"tp": 2, "pp": 2}, {"tp": 4}, {"pp": 4}],
        "qwen3_tied": [{}] if size == 1 else [{"pp": 2, "tp": 2}],
        "qwen3_moe": [{}] if size == 1 else [{"tp": 2, "ep": 2}, {"pp": 2, "ep": 2}],
    }
    return [
        Job(action, "", model, **grid, schema="hybrid")
        for model, found in grids.items()
        for grid in found
        for action in ("load", "load_torch", "save", "save_torch")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("job", jobs(1), ids=label)
def test_one_rank_of_the_real_model(megatron_ranks: RankProcesses, tmp_path: Path, job: Job) -> None:
    check(megatron_ranks, tmp_path, job)


@pytest.mark.slow
@pytest.mark.parametrize("job", jobs(4), ids=label)
def test_a_grid_of_the_real_model(megatron_ranks: RankProcesses, tmp_path: Path, job: Job) -> None:
    check(megatron_ranks, tmp_path, job)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["load", "load_torch", "save", "save_torch"])
def test_virtual_stages_of_the_real_model(megatron_ranks: RankProcesses, tmp_path: Path, action: str) -> None:
    pytest.importorskip("megatron.core.models.hybrid", reason="MambaModel of megatron-core 0.16 has no virtual stages")
    check(megatron_ranks, tmp_path, Job(action, "", "qwen3", pp=2, tp=2, vpp=2, schema="hybrid"))
