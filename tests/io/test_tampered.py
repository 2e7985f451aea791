"""What a stopped run left is input: whatever is done to it, one line or a right result, and no link leads outside."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptkit.conversion.convert import convert
from ckptkit.errors import CkptkitError, InputError, StorageError
from ckptkit.io import faults
from fixtures.make_damaged import SOUND
from tests.models import files_of


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """A conversion that was stopped when its files were finished."""
    with faults.inject("eio:sync"), pytest.raises(StorageError):
        convert(SOUND / "torch", tmp_path / "out", to="hf", threads=1)
    partial = tmp_path / ".out.ckptkit-partial"
    assert len((partial / "journal.jsonl").read_text().splitlines()) > 1
    return partial


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("expected") / "out"
    convert(SOUND / "torch", out, to="hf")
    return files_of(out)


def resume(left: Path, expected: dict[str, bytes]) -> str | None:
    """Goes on, and returns the error; without one, the output is the right one."""
    out = left.parent / "out"
    try:
        convert(SOUND / "torch", out, to="hf", resume=True, threads=1)
    except CkptkitError as error:
        assert not out.exists()
        assert error.exit_code in (3, 5)
        assert "\n" not in str(error)
        return str(error)
    assert files_of(out) == expected
    return None


VALUES: dict[str, object] = {
    "nothing": None,
    "true": True,
    "negative": -1,
    "huge": 10**300,
    "real": 1.5,
    "text": "x",
    "long": "x" * 100_000,
    "empty": "",
    "outside": "../../x",
    "absolute": "/etc/passwd",
    "list": [[-1, 10**30], [0]],
    "object": {"a": []},
}


@pytest.mark.parametrize("name", VALUES)
def test_values_of_other_types(left: Path, expected: dict[str, bytes], name: str) -> None:
    journal = left / "journal.jsonl"
    lines = journal.read_text().splitlines()
    for number, line in enumerate(lines):
        for key in json.loads(line):
            changed = {**json.loads(line), key: VALUES[name]}
            journal.write_text("\n".join([*lines[:number], json.dumps(changed), *lines[number + 1 :], ""]))
            kept = left.with_name("kept")
            shutil.copytree(left, kept)
            resume(left, expected)
            shutil.rmtree(left, ignore_errors=True)
            shutil.rmtree(left.parent / "out", ignore_errors=True)
            kept.rename(left)


LINES: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "no lines": lambda lines: [],
    "not json": lambda lines: [lines[0], b"{\n", *lines[1:]],
    "nested": lambda lines: [lines[0], b"[" * 200_000 + b"\n"],
    "number": lambda lines: [lines[0], b"1" * 10_000 + b"\n"],
    "zeros": lambda lines: [bytes(1000)],
    "list": lambda lines: [lines[0], b"[]\n", *lines[1:]],
    "plan again": lambda lines: [*lines, lines[0]],
    "twice": lambda lines: lines * 2,
    "binary": lambda lines: [*lines, bytes(range(256)), b"\n"],
    "cut": lambda lines: [*lines[:-1], lines[-1][:-9]],
    "long line": lambda lines: [*lines, b'{"path": "' + b"x" * 1_000_000 + b'"}\n'],
}


@pytest.mark.parametrize("name", LINES)
def test_other_lines(left: Path, expected: dict[str, bytes], name: str) -> None:
    journal = left / "journal.jsonl"
    journal.write_bytes(b"".join(LINES[name](journal.read_bytes().splitlines(keepends=True))))
    resume(left, expected)


def victim(left: Path) -> Path:
    """A file that nobody named."""
    path = left.parent / "victim"
    path.write_bytes(b"precious")
    return path


@pytest.mark.parametrize("place", ["journal.jsonl", "output/config.json", "output/model.safetensors.index.json"])
@pytest.mark.parametrize("with_resume", [True, False])
def test_no_link_is_written_through(left: Path, expected: dict[str, bytes], place: str, with_resume: bool) -> None:
    precious = victim(left)
    (left / place).unlink(missing_ok=True)
    (left / place).symlink_to(precious)
    if with_resume:
        resume(left, expected)
    else:
        convert(SOUND / "torch", left.parent / "out", to="hf")
    assert precious.read_bytes() == b"precious"


@pytest.mark.parametrize("place", ["", "output"])
def test_no_linked_folder_is_written_into(left: Path, expected: dict[str, bytes], place: str) -> None:
    elsewhere = left.parent / "elsewhere"
    (left / place).rename(elsewhere)
    (left / place).symlink_to(elsewhere)
    before = sorted(os.listdir(elsewhere))
    told = resume(left, expected)
    assert told is not None and "a symbolic link" in told
    assert sorted(os.listdir(elsewhere)) == before


def test_a_pipe_for_a_journal(left: Path, expected: dict[str, bytes]) -> None:
    (left / "journal.jsonl").unlink()
    os.mkfifo(left / "journal.jsonl")
    resume(left, expected)


SEALS: dict[str, Any] = {"list": [], "plan": {"plan": 1, "output": []}, "number": 10**200, "nested": "[" * 3000}


@pytest.mark.parametrize("name", SEALS)
def test_other_seals(left: Path, expected: dict[str, bytes], name: str) -> None:
    seal = SEALS[name]
    (left / "sealed.json").write_text(seal if isinstance(seal, str) else json.dumps(seal))
    assert resume(left, expected) is None


def test_writes_that_take_nothing(tmp_path: Path, expected: dict[str, bytes]) -> None:
    """A file system may answer 0 for ever; asking again would be a hang."""
    for at in (0, 1, 2000, 4000):
        with faults.inject(f"zero:{at}"), pytest.raises(StorageError, match="takes no more bytes"):
            convert(SOUND / "torch", tmp_path / f"out{at}", to="hf", threads=2)
        assert not (tmp_path / f"out{at}").exists()
        convert(SOUND / "torch", tmp_path / f"out{at}", to="hf", resume=True)
        assert files_of(tmp_path / f"out{at}") == expected


@pytest.mark.parametrize("write", ["journal", "seal", "text"])
def test_other_writes_that_take_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str) -> None:
    from ckptkit.io.system import write_text

    real = os.write

    def nothing(fd: int, data: Any) -> int:
        name = os.readlink(f"/proc/self/fd/{fd}")
        return 0 if {"journal": "journal", "seal": "sealed", "text": "report"}[write] in name else real(fd, data)

    monkeypatch.setattr(os, "write", nothing)
    with pytest.raises(StorageError, match="takes no more bytes"):
        if write == "text":
            write_text(str(tmp_path / "report"), "text")
        else:
            convert(SOUND / "torch", tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()


def test_an_empty_destination_or_source_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a variable of the shell gives that is not set; a path made of it would be the current directory."""
    from ckptkit.errors import UsageError
    from ckptkit.inspection.hashing import hash_checkpoint

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for dry_run in (False, True):
        with pytest.raises(UsageError, match="the destination is empty"):
            convert(SOUND / "torch", "", to="hf", dry_run=dry_run)
    shutil.copytree(SOUND / "hf", tmp_path / "here", dirs_exist_ok=True)
    with pytest.raises(UsageError, match="no checkpoint is named"):
        convert("", tmp_path / "out", to="torch")
    with pytest.raises(UsageError, match="no checkpoint is named"):
        hash_checkpoint("")
    with pytest.raises(UsageError, match="no checkpoint is named"):
        convert(SOUND / "torch", tmp_path / "out", to="hf", hf_reference="")
    with pytest.raises(InputError, match="no such directory"):
        convert("absent", tmp_path / "out", to="torch")
