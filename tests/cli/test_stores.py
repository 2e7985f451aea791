"""Destinations in a store on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ckptkit.cli.app import app
from tests.io.stores.uploads import HF, expected, only, server_fixture, small_parts_fixture  # noqa: F401  fixtures
from tests.models import files_of
from tests.stores import BUCKET, Server


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in arguments], prog_name="ckptkit")


def test_convert_to_a_store(server: Server, tmp_path: Path, small_parts: None) -> None:
    out = f"s3://{BUCKET}/cli/a"
    planned = run("convert", HF, out, "--to", "hf", "--dry-run", "--json")
    assert planned.exit_code == 0 and server.keys("cli") == []
    done = run("convert", HF, out, "--to", "hf", "--json")
    result = json.loads(done.stdout)
    assert result["target"]["path"] == out and result["disk_free"] is None
    assert only(server, "cli/a", expected(tmp_path))
    again = run("convert", HF, out, "--to", "hf")
    assert again.exit_code == 2 and "--overwrite" in again.stderr and len(again.stderr.splitlines()) == 1
    assert "free" not in run("convert", HF, out, "--to", "hf", "--overwrite").stdout


def test_surgery_to_a_store(server: Server, tmp_path: Path, small_parts: None) -> None:
    words = ["surgery", "average", HF, HF]
    assert run(*words, "-o", tmp_path / "a").exit_code == 0
    done = run(*words, "-o", f"s3://{BUCKET}/surgery/a")
    assert done.exit_code == 0, done.stderr
    assert only(server, "surgery/a", files_of(tmp_path / "a"))


@pytest.mark.parametrize(
    "words",
    [
        ["watch", "run", "--to", "hf", "-o", "s3://b/x"],
        ["delta", "make", HF, HF, "-o", "s3://b/x"],
        ["delta", "apply", HF, "delta", "--to", "hf", "-o", "s3://b/x"],
        ["convert", HF, "https://host/x", "--to", "hf"],
        ["convert", HF, "gs://b/x", "--to", "hf"],
        ["convert", HF, "s3://b", "--to", "hf"],
        ["convert", HF, "s3://key:secret-word@b/x", "--to", "hf"],
    ],
    ids=lambda words: " ".join(map(str, words[:2])),
)
def test_what_cannot_be_written_to_is_one_line(
    words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*words)
    assert done.exit_code in (2, 4), done.stderr
    assert len(done.stderr.splitlines()) == 1 and "secret-word" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["x", "1", "99999999999999", "5242879"])
def test_a_size_of_parts_is_checked(server: Server, monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    monkeypatch.setenv("CKPTKIT_PART_SIZE", size)
    done = run("convert", HF, f"s3://{BUCKET}/sized", "--to", "hf")
    assert done.exit_code == 2 and "CKPTKIT_PART_SIZE" in done.stderr
