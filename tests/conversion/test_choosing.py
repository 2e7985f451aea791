"""`ckptkit convert SRC` without --to: what it says is so, and the commands that it gives run."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ckptkit import Parallelism, convert
from ckptkit.cli import app as cli
from ckptkit.cli.choices import FORMATS
from ckptkit.conversion.choosing import MEANINGS, choices_of
from fixtures.make_damaged import SOUND
from tests.lora import save_adapter
from tests.models import save_llama, save_model


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, list(arguments), prog_name="ckptkit")


def test_every_format_has_a_meaning() -> None:
    assert set(MEANINGS) == set(FORMATS)


@pytest.mark.parametrize("kind", ["gqa", "qwen3_moe", "mqa"])
def test_commands_for_a_hugging_face_directory_run(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (save_model if kind == "qwen3_moe" else save_llama)(tmp_path / "model", kind)
    found = json.loads(run("convert", "model", "--json").stdout)
    assert (found["format"], found["path"]) == ("hf", "model")
    assert [choice["to"] for choice in found["choices"]] == ["torch", "torch_dist", "packed", "hf"]
    assert ("--ep 2" in found["choices"][0]["command"]) == (kind == "qwen3_moe")
    for choice in found["choices"]:
        words = shlex.split(choice["command"])
        done = run(*words[1:])
        assert done.exit_code == 0, done.output
        assert (tmp_path / words[3]).is_dir()


def test_a_grid_that_does_not_divide_is_not_proposed(tmp_path: Path) -> None:
    save_llama(tmp_path / "model", num_attention_heads=3, num_key_value_heads=3, hidden_size=24, intermediate_size=9)
    commands = [choice.command for choice in choices_of(tmp_path / "model").choices]
    assert not any("--tp" in command for command in commands)


@pytest.mark.parametrize("to", ["torch", "torch_dist", "packed"])
def test_a_converted_checkpoint_goes_back_without_a_reference(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    convert(SOUND / "hf", tmp_path / "there", to=to)
    first = choices_of("there").choices[0]
    assert first.to == "hf" and "--hf-reference" not in first.command
    assert run(*shlex.split(first.command)[1:]).exit_code == 0


def test_a_trained_checkpoint_asks_for_a_reference(tmp_path: Path) -> None:
    convert(SOUND / "hf", tmp_path / "run", to="torch", grid=Parallelism(tp=2))
    shutil.rmtree(tmp_path / "run" / "ckptkit")
    found = choices_of(tmp_path / "run")
    assert all("--hf-reference DIR" in choice.command for choice in found.choices)
    assert any("supplies config.json and tokenizer" in note for note in found.notes)
    given = choices_of(tmp_path / "run", hf_reference=str(SOUND / "hf"))
    assert all(f"--hf-reference {SOUND / 'hf'}" in choice.command for choice in given.choices)


def test_adapters_and_quantised_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_llama(tmp_path / "model", dtype="bfloat16")
    save_adapter(tmp_path / "adapter", tmp_path / "model")
    found = choices_of("adapter", hf_reference="model")
    assert [choice.to for choice in found.choices] == ["torch_dist"]
    assert run(*shlex.split(found.choices[0].command)[1:]).exit_code == 0
    assert any("ckptkit adapter merge BASE adapter" in note for note in found.notes)
    assert run("convert", "model", "fp8", "--to", "hf", "--quantise", "fp8-block").exit_code == 0
    assert any("--quantise original" in note and "`--quantise like:fp8`" in note for note in choices_of("fp8").notes)


def test_text_and_exit_codes(tmp_path: Path) -> None:
    source = str(SOUND / "hf")
    said = run("convert", source)
    assert said.exit_code == 0 and f"\n  ckptkit convert {source} hf-torch --to torch" in said.stdout
    for arguments, message in (
        ([source, str(tmp_path / "out")], "--to is missing, nothing was converted; ckptkit convert "),
        ([source, "--to", "torch"], "DST is missing; ckptkit convert SRC DST --to torch"),
    ):
        refused = run("convert", *arguments)
        assert refused.exit_code == 2 and message in refused.stderr and refused.stdout == ""
    assert run("convert", str(tmp_path / "gone")).exit_code == 3 and list(tmp_path.iterdir()) == []


def test_a_folder_too_deep_names_the_one_above(tmp_path: Path) -> None:
    convert(SOUND / "hf", tmp_path / "there", to="torch", grid=Parallelism(tp=2))
    refused = run("inspect", str(tmp_path / "there" / "release" / "mp_rank_00"))
    assert refused.exit_code == 3
    assert refused.stderr.endswith(f"; give the folder above it: {(tmp_path / 'there' / 'release').resolve()}\n")
