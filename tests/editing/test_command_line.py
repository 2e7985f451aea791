"""The options of `ckptkit surgery` reach what they control."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ckptkit.cli import app as cli
from ckptkit.conversion.options import Options
from ckptkit.dtypes import DTYPES
from ckptkit.editing import commands
from ckptkit.sharding.grid import Parallelism
from tests.cli.test_cli import RESULT, Callee
from tests.models import files_of, save_llama


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["surgery", *arguments], prog_name="ckptkit", catch_exceptions=False)


@pytest.fixture
def callee(monkeypatch: pytest.MonkeyPatch) -> Callee:
    callee = Callee(RESULT)
    for name in ("average", "slice_layers", "stack_layers", "merge", "resize_vocabulary"):
        monkeypatch.setattr(commands, name, callee)
    return callee


COMMON = ["-o", "out", "--to", "torch", "--tp", "2", "--dtype", "bf16", "--hash-inputs", "--iteration", "7", "--resume"]


@pytest.mark.parametrize(
    ("arguments", "positional", "options"),
    [
        (
            ["average", "a", "b", "--weights", "1,2.5", "--precision", "float64", "--accept-differences"],
            ["a", "b"],
            {"weights": [1.0, 2.5], "precision": "float64", "accept_differences": True, "last": None, "decay": None},
        ),
        (
            ["average", "a", "--iterations", "5,10", "--decay", "ema:0.9"],
            ["a"],
            {"iterations": [5, 10], "decay": "ema:0.9", "weights": None},
        ),
        (["average", "a", "--last", "3"], ["a"], {"last": 3, "iterations": None}),
        (["slice", "a", "--layers", "0-3"], "a", {"layers": "0-3", "drop": None}),
        (["slice", "a", "--drop", "1"], "a", {"drop": "1", "layers": None}),
        (["stack", "a:0-1", "b", "--accept-differences"], ["a:0-1", "b"], {"accept_differences": True}),
        (["merge", "a.yaml", "--seed", "7"], "a.yaml", {"seed": 7, "accept_differences": False}),
        (
            ["resize-vocab", "a", "--tokenizer", "t", "--size", "9", "--new-rows", "normal", "--seed", "2"],
            "a",
            {"tokenizer": "t", "size": 9, "new_rows": "normal", "seed": 2},
        ),
    ],
)
def test_options(callee: Callee, arguments: list[str], positional: object, options: dict[str, Any]) -> None:
    assert run(*arguments, *COMMON).exit_code == 0
    given, output = callee.arguments
    assert given == positional
    wanted = Options(grid=Parallelism(2), dtype=DTYPES["BF16"])
    assert output == commands.Output("out", "torch", wanted, hash_inputs=True)
    assert {name: callee.options[name] for name in options} == options
    assert callee.options["source"]["iteration"] == 7
    assert callee.options["resume"]


@pytest.mark.parametrize("command", ["average", "slice", "stack", "merge", "resize-vocab"])
def test_a_destination_is_required(callee: Callee, command: str) -> None:
    done = run(command, "a")
    assert done.exit_code == 2 and "-o" in done.stderr
    shown = run(command, "--help").stdout.split("--out")[1].split("--help")[0]
    assert "[required]" in shown and "default" not in shown


def test_a_dry_run_and_errors_in_one_line(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    found = run("slice", str(base), "-o", str(tmp_path / "out"), "--layers", "0", "--dry-run", "--json")
    result = json.loads(found.stdout)
    assert (result["dry_run"], result["source"]["operation"]["layers"]) == (True, "0")
    assert not (tmp_path / "out").exists()
    for wrong in (["average", "a", "--weights", "x"], ["slice", "a", "--lora-alpha", "2", "--drop", "0"]):
        assert CliRunner().invoke(cli.app, ["surgery", *wrong, "-o", "out"]).exit_code == 2
    assert run("slice", str(base), "-o", str(tmp_path / "out"), "--layers", "0").exit_code == 0
    once = files_of(tmp_path / "out")
    assert run("slice", str(base), "-o", str(tmp_path / "out"), "--layers", "0", "--overwrite").exit_code == 0
    assert files_of(tmp_path / "out") == once


def test_a_card_is_one_document(tmp_path: Path) -> None:
    """Backticks in recipes and names end nothing."""
    base = save_llama(tmp_path / "a`b``")
    text = "# ```\nmerge_method: passthrough\nmodels: [{model: 'a`b``'}]\n# ````\n"
    (tmp_path / "recipe.yaml").write_text(text)
    commands.merge(tmp_path / "recipe.yaml", commands.Output(tmp_path / "out"))
    card = (tmp_path / "out/README.md").read_text()
    assert f"`````yaml\n{text}`````\n" in card
    assert "- ``` a`b`` ``` (LlamaForCausalLM" in card
    assert base.is_dir()
