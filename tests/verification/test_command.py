"""`ckptkit verify` on the command line: reports, options and exit codes."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from ckptkit import convert
from ckptkit.cli.app import app
from ckptkit.sharding.grid import Parallelism
from tests.megatron.test_families_against_transformers import put, rewrite, shards
from tests.models import MODELS, save_model

ROOT = Path(__file__).parents[2]
WORKFLOW = ROOT / "examples" / "ci" / "github-workflow.yml"


def run(*arguments: object) -> int:
    return CliRunner().invoke(app, [str(argument) for argument in arguments]).exit_code


@pytest.fixture
def pair(llama: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    source = llama("gqa", num_hidden_layers=2)
    convert(source, tmp_path / "meg", to="torch", grid=Parallelism(2))
    return source, tmp_path / "meg"


def test_all_reports_at_once(pair: tuple[Path, Path], tmp_path: Path) -> None:
    files = {name: tmp_path / f"report.{name}" for name in ("json", "junit", "html")}
    options = [part for name, file in files.items() for part in (f"--{name}", file)]
    assert run("verify", *pair, "--no-replay", *options) == 0
    assert json.loads(files["json"].read_text())["verdict"] == "same"
    names = [str(suite.get("name")) for suite in ElementTree.parse(files["junit"]).getroot()]
    assert names == ["structure", "weights", "logits"]
    assert "Same model" in files["html"].read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "two checkpoints are missing"),
        (["a"], "CANDIDATE is missing"),
        (["--rollouts", "file"], "CANDIDATE is missing"),
    ],
    ids=str,
)
def test_checkpoints_that_are_missing(arguments: list[str], words: str) -> None:
    found = CliRunner().invoke(app, ["verify", *arguments])
    assert found.exit_code == 2 and words in found.output


def test_the_help_says_which_checkpoints_may_be_left_out() -> None:
    text = CliRunner().invoke(app, ["verify", "--help"]).output
    assert "[REFERENCE] [CANDIDATE]" in text and "required" not in text


FAMILIES = ["mixtral", *(pytest.param(kind, marks=pytest.mark.slow) for kind in MODELS if kind != "mixtral")]


@pytest.mark.parametrize("kind", FAMILIES)
def test_families(tmp_path: Path, kind: str) -> None:
    """As a user does it: two commands, and ranks that the second one starts."""
    source = save_model(tmp_path / "hf", kind)
    assert run("convert", source, tmp_path / "meg", "--to", "torch", "--tp", 2) == 0
    assert run("verify", source, tmp_path / "meg", "--json", tmp_path / "r.json", "--tolerance", 1e-5) == 0
    levels = json.loads((tmp_path / "r.json").read_text())["levels"]
    assert [level["name"] for level in levels] == ["structure", "weights", "logits"]
    assert (levels[2]["details"]["routing"] is not None) == any("experts" in key for key in MODELS[kind][1])


def test_a_difference_is_a_failed_test_case(pair: tuple[Path, Path], tmp_path: Path) -> None:
    change: Any = put("decoder.layers.1.mlp.linear_fc2.weight", lambda weight: weight * 2)
    rewrite(shards(pair[1])[0], lambda content: change(content["model"]))
    assert run("verify", *pair, "--junit", tmp_path / "r.xml", "--html", tmp_path / "r.html") == 1
    failures = list(ElementTree.parse(tmp_path / "r.xml").iter("failure"))
    assert len(failures) == 1 and "linear_fc2" in str(failures[0].get("message"))
    assert "The models differ" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_what_could_not_be_run_is_a_test_case_in_error(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (pair[1] / "latest_checkpointed_iteration.txt").write_text("nonsense")
    code = run("verify", *pair, "--junit", tmp_path / "r.xml", "--html", tmp_path / "r.html")
    assert code in (3, 6)
    assert len(list(ElementTree.parse(tmp_path / "r.xml").iter("error"))) == 1
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("option", ["--json", "--junit", "--html", "--save-logits"])
def test_reports_need_a_directory_before_anything_runs(tmp_path: Path, option: str) -> None:
    assert run("verify", "a", "b", option, tmp_path / "absent" / "r") == 2


def test_the_workflow_uses_commands_that_exist() -> None:
    text = re.sub(r"\n {10}(?=[-\w\"])", " ", WORKFLOW.read_text(encoding="utf-8"))
    commands = re.findall(r"ckptkit (convert|verify) (.*)", text)
    assert [name for name, _ in commands] == ["convert", "verify"]
    for name, rest in commands:
        help_text = CliRunner().invoke(app, [name, "--help"]).output
        options = [word.partition("=")[0] for word in shlex.split(rest) if word.startswith("--")]
        assert options and all(option in help_text for option in options)
    assert "--junit report.xml" in text and "--html report.html" in text
