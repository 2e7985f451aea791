"""Room is counted as a file system counts it: in whole blocks, and in entries."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ckptkit.errors import StorageError
from ckptkit.io.commit import Destination
from ckptkit.io.plan import OutputFile, Plan, literal
from ckptkit.io.plan import Segment as Part
from ckptkit.io.room import Room, entries_of


def plan_of(*paths: str, size: int = 1) -> Plan:
    return Plan(tuple(OutputFile(path, size, (Part(0, literal(bytes(size))),)) for path in paths))


def pretend(monkeypatch: pytest.MonkeyPatch, **values: int) -> None:
    """A file system that says other things of itself."""
    real = os.statvfs

    class Status:
        def __init__(self, path: Any) -> None:
            self.real = real(path)

        def __getattr__(self, name: str) -> int:
            return values.get(name, getattr(self.real, name))

    monkeypatch.setattr(os, "statvfs", Status)


@pytest.mark.parametrize(("paths", "entries"), [(["a"], 2), (["a", "b"], 3), (["x/a", "x/y/b", "z/c"], 7)])
def test_entries_are_those_that_are_made(tmp_path: Path, paths: list[str], entries: int) -> None:
    plan = plan_of(*paths)
    assert entries_of(plan.files) == entries
    Destination(tmp_path / "out", plan).write()
    assert 1 + len(list((tmp_path / "out").rglob("*"))) == entries


def test_inodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of("a", "b", "c/d")
    needed = entries_of(plan.files) + 4
    pretend(monkeypatch, f_files=100, f_favail=needed - 1)
    with pytest.raises(
        StorageError, match=f"not enough inodes: the output has {needed} files and folders, {needed - 1}"
    ):
        Destination(tmp_path / "out", plan)
    assert not list(tmp_path.iterdir())
    pretend(monkeypatch, f_files=100, f_favail=needed)
    Destination(tmp_path / "out", plan).write()


def test_a_file_system_that_does_not_count_inodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, f_files=0, f_favail=0)
    Destination(tmp_path / "out", plan_of("a")).write()


def test_small_files_take_whole_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(*(f"f{number}" for number in range(10)), size=100)
    pretend(monkeypatch, f_blocks=100, f_bavail=9, f_frsize=4096)
    with pytest.raises(StorageError, match=r"not enough space: the output needs 41.0 kB, 36.9 kB are free"):
        Destination(tmp_path / "out", plan)
    pretend(monkeypatch, f_blocks=100, f_bavail=10, f_frsize=4096)
    Destination(tmp_path / "out", plan).write()


def test_what_an_earlier_run_left_is_used_again(tmp_path: Path) -> None:
    left = tmp_path / "left"
    (left / "folder").mkdir(parents=True)
    (left / "folder" / "file").write_bytes(bytes(100_000))
    before, after = Room.of(tmp_path, tmp_path / "absent"), Room.of(tmp_path, left)
    assert after.entries - before.entries >= 2
    assert Room.of(left / "folder", left / "folder").entries - Room.of(left, tmp_path / "absent").entries >= 1
