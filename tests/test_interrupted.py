"""A conversion killed at any moment leaves no destination, or the old one; `--resume` finishes the same bytes."""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptkit.conversion.convert import convert
from ckptkit.errors import StorageError
from ckptkit.io import commit, system
from ckptkit.sharding.grid import Parallelism
from fixtures.make_damaged import SOUND
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


class Calls:
    """Counts the calls that write below a folder, and lets one of them fail as a disk would."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = str(folder)
        self._lock = threading.Lock()
        self._code = 0
        self.count = self.fails_at = 0
        for name in ("pwrite", "write", "copy_file_range", "ftruncate", "fsync", "fdatasync", "rename"):
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))
        monkeypatch.setattr(os, "mkdir", self._counted(os.mkdir, self._below))
        monkeypatch.setattr(os, "open", self._counted(os.open, self._creates))
        monkeypatch.setattr(io, "open", self._counted(io.open, self._writes))
        monkeypatch.setattr(system, "_call", self._counted(system._call, lambda name, *_: name != "sync_file_range"))

    def arm(self, fails_at: int, code: int) -> None:
        """From here on the call of this number (from 0 on) fails."""
        self.count, self.fails_at, self._code = 0, fails_at, code

    def _counted(self, function: Callable[..., Any], counts: Callable[..., bool] = lambda *_: True) -> Any:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            if self._code and counts(*arguments):
                with self._lock:
                    number, self.count = self.count, self.count + 1
                if number == self.fails_at:
                    raise OSError(self._code, os.strerror(self._code))
            return function(*arguments, **options)

        return wrapper

    def _below(self, path: object, *_: object) -> bool:
        return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self._folder)

    def _creates(self, path: object, flags: int, *_: object) -> bool:
        return self._below(path) and bool(flags & os.O_CREAT)

    def _writes(self, path: object, mode: str = "r", *_: object) -> bool:
        return self._below(path) and mode != "r" and "b" not in mode


def fail_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, old: bool) -> tuple[int, int]:
    """Lets each call fail once; how many there were, and how many of them stopped the conversion."""
    target, before = tmp_path / "out" / "meg", {"precious": b"the old model"} if old else {}
    convert(SOUND / "hf", tmp_path / "expected", to="torch", grid=Parallelism(2))
    expected = files_of(tmp_path / "expected")
    calls = Calls(tmp_path / "out", monkeypatch)
    number, struck, reached = 0, 0, True
    while reached:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (target if old else target.parent).mkdir(parents=True)
        for name, data in before.items():
            (target / name).write_bytes(data)
        calls.arm(number, code)
        error = error_of(target, overwrite=old)
        reached = calls.count > number
        calls.arm(-1, 0)
        assert error is None or ("\n" not in error and reached)
        assert files_of(target) in ((before, expected) if error else (expected,))
        assert target.exists() or not old
        convert(SOUND / "hf", target, to="torch", grid=Parallelism(2), overwrite=old, resume=True)
        assert files_of(target) == expected
        assert os.listdir(tmp_path / "out") == ["meg"]
        number, struck = number + reached, struck + (error is not None)
    return number, struck


def error_of(target: Path, overwrite: bool) -> str | None:
    """The message of a conversion that fails for its disk, or None."""
    try:
        convert(SOUND / "hf", target, to="torch", grid=Parallelism(2), overwrite=overwrite, threads=1)
    except StorageError as error:
        return str(error)
    return None


@pytest.mark.parametrize("old", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("code", ["ENOSPC", pytest.param("EIO", marks=pytest.mark.slow)])
def test_an_error_at_every_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, old: bool) -> None:
    """Every file made, every byte written, every sync, every rename: each fails once."""
    number, struck = fail_everywhere(tmp_path, monkeypatch, getattr(errno, code), old)
    assert number > 50 and struck > 0.9 * number


def test_an_old_model_that_is_removed_first_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(new: Path, old: Path) -> bool:
        shutil.rmtree(old)
        os.rename(new, old)
        return True

    monkeypatch.setattr(commit, "exchange", careless)
    with pytest.raises(AssertionError):
        fail_everywhere(tmp_path, monkeypatch, errno.ENOSPC, old=True)
