"""Megatron-LM's flags: against its parser and what it restores, as recorded, and in every output."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ckptkit import convert, inspect
from ckptkit.cli.app import app
from ckptkit.megatron_args.fields import FIELDS, GRID_FIELDS
from ckptkit.megatron_args.flags import FLAGS, GRID_FLAGS, USE_CHECKPOINT_ARGS, Flag
from ckptkit.sharding.grid import Parallelism
from tests.models import save_llama, save_model

ROOT = Path(__file__).resolve().parents[2]
RECORDED = json.loads((ROOT / "fixtures" / "megatron_lm.json").read_text(encoding="utf-8"))
OPTIONS: dict[str, dict[str, Any]] = RECORDED["options"]
NO_OPTION = {"add_position_embedding", "use_rotary_position_embeddings", "rotary_interleaved", "init_method_std"}
"""Arguments with an option that no model needs: what they do is done anyway, or matters to new weights alone."""


def dest(flag: Flag) -> str:
    """Where Megatron-LM's parser puts the argument of a flag."""
    renamed = {"virtual_pipeline_model_parallel_size": "num_virtual_stages_per_pipeline_rank"}
    return flag.dest or renamed.get(flag.args, flag.args)


def test_the_recorded_release() -> None:
    assert RECORDED["version"] == "0.19.2"
    assert len(OPTIONS) > 500 and len(RECORDED["restored"]) > 40


@pytest.mark.parametrize("flag", [*FLAGS, *GRID_FLAGS], ids=lambda flag: flag.option)
def test_the_parser_takes_it(flag: Flag) -> None:
    recorded = OPTIONS[dest(flag)]
    takes = recorded["flags"][flag.option]
    assert takes == {"sets": not flag.default} if flag.switch else takes == 1
    default = tuple(recorded["default"]) if isinstance(recorded["default"], list) else recorded["default"]
    assert flag.default == default


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.option)
def test_what_is_said_to_be_restored_is(flag: Flag) -> None:
    conditions = RECORDED["restored"].get(dest(flag))
    assert flag.restored == (conditions is not None)
    allowed = {
        "not on the command line, and None by default",
        "getattr(checkpoint_args, 'num_experts', None) is not None",
    }
    assert set(conditions or ()) <= allowed
    if "not on the command line, and None by default" in (conditions or ()):
        assert flag.default is None


def test_every_argument_of_a_model_and_of_a_grid_has_its_flag() -> None:
    known = {flag.args for flag in (*FLAGS, *GRID_FLAGS)} | {flag.dest for flag in FLAGS}
    written = {field.args for field in (*FIELDS, *GRID_FIELDS) if field.args is not None}
    missing = {name for name in written - known if name in OPTIONS}
    assert missing - {"bf16", "fp16", "squared_relu", "apply_query_key_layer_scaling"} == NO_OPTION
    assert {flag.args for flag in (*FLAGS, *GRID_FLAGS)} - written == {
        "mla_down_proj_fusion",
        "moe_grouped_gemm",
        "transformer_impl",
    }


CASES = {
    "gqa": "",
    "llama3": "--use-rope-scaling",
    "qwen2": "--norm-epsilon 1e-06",
    "qwen3": "--norm-epsilon 1e-06 --qk-layernorm",
    "qwen3_moe": "--norm-epsilon 1e-06 --qk-layernorm",
    "mistral": "--norm-epsilon 1e-06 --window-size 15,0",
    "mixtral": "--no-use-tokenizer-model-from-checkpoint-args",
    "gemma3_text": None,
    "apertus": None,
}


@pytest.mark.parametrize("kind", CASES)
def test_what_an_output_needs(tmp_path: Path, kind: str) -> None:
    source = (save_llama if kind in ("gqa", "llama3") else save_model)(tmp_path / "hf", kind)
    expected = None if CASES[kind] is None else f"{USE_CHECKPOINT_ARGS} {CASES[kind]}".split()
    result = convert(source, tmp_path / "dist", to="torch_dist", grid=Parallelism(2))
    assert result.target["megatron_flags"] == expected
    manifest = json.loads((tmp_path / "dist" / "ckptkit" / "manifest.json").read_text())
    assert manifest["megatron_flags"] == expected
    assert inspect(tmp_path / "dist").megatron_flags == expected
    ranks = convert(source, tmp_path / "torch", to="torch", grid=Parallelism(2), spec="local")
    if expected is not None:
        of_ranks = [word for word in expected if "tokenizer" not in word]
        local = ["--transformer-impl", "local", "--tensor-model-parallel-size", "2"]
        assert ranks.target["megatron_flags"] == [*of_ranks, *local] == inspect(tmp_path / "torch").megatron_flags


def test_a_checkpoint_that_megatron_cannot_load_is_described_as_a_whole(tmp_path: Path) -> None:
    source = save_model(tmp_path / "hf", "qwen3_moe")
    words = inspect(source).megatron_flags
    assert words is not None and USE_CHECKPOINT_ARGS not in words
    flags = {flag.option: flag for flag in FLAGS}
    assert {word for word in words if word.startswith("--")} <= flags.keys()
    values = dict(pairwise(words))
    assert values["--num-experts"] == "4" and values["--num-layers"] == "4"
    assert {"--swiglu", "--qk-layernorm", "--disable-bias-linear"} <= set(words)


def test_windows_on_some_layers_and_uneven_stages(tmp_path: Path) -> None:
    source = save_model(tmp_path / "hf", "mixtral")
    config = json.loads((source / "config.json").read_text())
    assert config["num_hidden_layers"] == 4
    grid = Parallelism(1, 2, vpp=1, ep=2, first_stage_layers=1, last_stage_layers=3)
    result = convert(source, tmp_path / "m", to="torch", grid=grid)
    words = shlex.join(result.target["megatron_flags"])
    assert words.endswith(
        "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1 --decoder-last-pipeline-num-layers 3"
        " --expert-model-parallel-size 2"
    )
    virtual = convert(source, tmp_path / "v", to="torch", grid=Parallelism(1, 2, 2)).target["megatron_flags"]
    assert virtual[-2:] == ["--num-virtual-stages-per-pipeline-rank", "2"]
    layout = Parallelism(1, 2, 2, pipeline_layout="Et|t|t|tL")
    assert convert(source, tmp_path / "l", to="torch", grid=layout).target["megatron_flags"][-4:] == [
        *("--pipeline-model-parallel-size", "2", "--pipeline-model-parallel-layout", "Et|t|t|tL")
    ]
    by_option = {flag.option: flag for flag in FLAGS}
    assert by_option["--window-attn-skip-freq"].words([1, 0, 1]) == ["--window-attn-skip-freq", "[1,0,1]"]
    assert by_option["--rotary-seq-len-interpolation-factor"].words(8.0) == [
        *("--rotary-seq-len-interpolation-factor", "8")
    ]


def test_the_command(tmp_path: Path) -> None:
    source = save_model(tmp_path / "hf", "qwen3")
    shown = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "m"), "--to", "torch_dist"])
    line = f"{USE_CHECKPOINT_ARGS} {CASES['qwen3']}"
    assert shown.output.splitlines()[-1] == line
    flags = CliRunner().invoke(app, ["inspect", "--megatron-flags", str(tmp_path / "m")])
    assert flags.output == line + "\n"
    asked = CliRunner().invoke(app, ["inspect", "--megatron-flags", "--json", str(tmp_path / "m")])
    assert json.loads(asked.output) == {"megatron_flags": line.split()}
    other = save_model(tmp_path / "apertus", "apertus")
    refused = CliRunner().invoke(app, ["inspect", "--megatron-flags", str(other)])
    assert refused.exit_code == 4 and "xielu" in refused.output
    packed = convert(source, tmp_path / "p", to="packed")
    assert "megatron_flags" not in packed.target


def test_the_document_explains_each_that_is_not_restored() -> None:
    text = (ROOT / "docs" / "megatron.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"`(--[a-z0-9-]+)", text))
    assert {flag.option for flag in FLAGS if not flag.restored} <= explained
    assert {field.name for field in fields(Flag)} >= {"option", "restored"}
