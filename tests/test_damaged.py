"""Damaged and odd inputs, each through the command itself: one clear line, its exit code, and nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from ckptkit.cli import app as cli
from fixtures.make_damaged import MARKER, SOUND, Case, catalogue
from tests.models import files_of

CASES = {case.name: case for case in catalogue()}
REFUSED = [name for name, case in CASES.items() if case.exit_code]
ACCEPTED = [name for name, case in CASES.items() if not case.exit_code]
# What only the values tell.
FOUND_WHILE_CONVERTING = {"ranks-disagree-on-a-norm"}


def command(*words: object) -> Result:
    arguments = [str(word) for word in words]
    return CliRunner().invoke(cli.app, arguments, prog_name="ckptkit", catch_exceptions=False)


def convert(source: Path, base: str, target: Path) -> Result:
    return command("convert", source, target, "--to", "torch" if base == "hf" else "hf", "--json")


def line(case: Case, source: Path) -> str:
    """The message of a case with the paths of this run."""
    return case.message.replace("SRC", str(source)).replace("BESIDE", str(source.parent))


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str) -> None:
    case, out = CASES[name], tmp_path / "out"
    source = case.make(tmp_path / "in")
    before = sorted((tmp_path / "in").rglob("*"))
    out.mkdir()
    result = convert(source, case.base, out / "model")
    assert (result.exit_code, result.stderr) == (case.exit_code, f"error: {line(case, source)}\n")
    assert json.loads(result.stdout)["error"]["message"] == line(case, source)
    assert list(out.iterdir()) == []
    assert sorted((tmp_path / "in").rglob("*")) == before
    assert not (tmp_path / "in" / MARKER).exists()


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_inspect(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    source = case.make(tmp_path)
    result = command("inspect", source)
    if name in FOUND_WHILE_CONVERTING:
        assert result.exit_code == 0
    else:
        assert (result.exit_code, result.stderr) == (case.exit_code, f"error: {line(case, source)}\n")
    assert not (tmp_path / MARKER).exists()


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_with_a_note(tmp_path: Path, name: str) -> None:
    """What is no part of the model is named, stays behind and is not read: it could not be."""
    case = CASES[name]
    result = convert(case.make(tmp_path), case.base, tmp_path / "out")
    assert (result.exit_code, result.stderr) == (0, "")
    assert case.message in json.loads(result.stdout)["notes"]
    assert convert(SOUND / case.base, case.base, tmp_path / "expected").exit_code == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")


@pytest.mark.parametrize("base", ["hf", "torch", "torch_dist"])
def test_without_the_damage_nothing_is_wrong(tmp_path: Path, base: str) -> None:
    result = convert(SOUND / base, base, tmp_path / "out")
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout)["notes"] == []
    if base != "hf":
        assert files_of(tmp_path / "out") == files_of(SOUND / "hf")
