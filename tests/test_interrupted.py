"""A conversion killed at any moment leaves no destination, or the old one; `--resume` finishes the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ckptkit.conversion import convert
from ckptkit.sharding.grid import Parallelism
from tests.models import files_of, save_llama


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("meg") / "model"
    convert(source, path, to="torch", grid=Parallelism(2, 2))
    return files_of(path)


def run(source: Path, target: Path, *options: str, fault: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ckptkit", "convert", str(source), str(target), "--to", "torch", "--tp", "2"]
    environment = {**os.environ, "CKPTKIT_FAULT": fault}
    return subprocess.run([*command, "--pp", "2", *options], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.999])
@pytest.mark.parametrize("old", [False, True])
def test_killed_and_resumed(source: Path, expected: dict[str, bytes], tmp_path: Path, share: float, old: bool) -> None:
    target = tmp_path / "meg"
    if old:
        target.mkdir()
        (target / "precious").write_text("the old model")
    before = files_of(tmp_path)
    options = ["--overwrite"] if old else []
    size = sum(map(len, expected.values()))
    assert run(source, target, *options, fault=f"kill:{int(size * share)}").returncode == 137
    assert {name: data for name, data in files_of(tmp_path).items() if name.startswith("meg/")} == before
    assert target.exists() == old
    assert run(source, target, *options, "--resume").returncode == 0
    assert files_of(target) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["meg"]


@pytest.mark.parametrize(("fault", "code"), [("enospc:50000", 5), ("eio:50000", 5)])
def test_disk_errors_are_one_line(source: Path, tmp_path: Path, fault: str, code: int) -> None:
    result = run(source, tmp_path / "meg", fault=fault)
    assert result.returncode == code
    assert len(result.stderr.strip().splitlines()) <= 2 and "error:" in result.stderr
    assert not (tmp_path / "meg").exists()
