"""How many threads are started follows the machine, and the share of it that a container has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ckptkit.io import cores

GROUPS = "9:memory:/a\n4:cpu,cpuacct:/jobs/one\n"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 64 cores without control groups."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(cores, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "_TREE", tmp_path / "tree")
    return tmp_path


def put(place: Path, **files: str) -> None:
    place.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (place / name.replace("cpu_", "cpu.")).write_text(text)


def test_without_control_groups(tree: Path) -> None:
    assert cores.usable_cores() == 64


@pytest.mark.parametrize(
    ("text", "expected"),
    [("max 100000\n", 64), ("250000 100000\n", 2), ("50000 100000\n", 1), ("9900000 100000", 64), ("nonsense", 64)],
)
def test_quota_of_version_2(tree: Path, text: str, expected: int) -> None:
    put(tree, cgroup="0::/jobs/one\n")
    put(tree / "tree/jobs/one", cpu_max=text)
    assert cores.usable_cores() == expected


def test_quota_of_a_group_above(tree: Path) -> None:
    put(tree, cgroup="0::/jobs/one\n")
    put(tree / "tree/jobs/one", cpu_max="max 100000")
    put(tree / "tree/jobs", cpu_max="800000 100000")
    assert cores.usable_cores() == 8


@pytest.mark.parametrize(("quota", "expected"), [("-1\n", 64), ("300000\n", 3)])
def test_quota_of_version_1(tree: Path, quota: str, expected: int) -> None:
    put(tree, cgroup=GROUPS)
    put(tree / "tree/cpu,cpuacct/jobs/one", cpu_cfs_quota_us=quota, cpu_cfs_period_us="100000\n")
    put(tree / "tree/memory/a", cpu_max="100000 100000")  # of another controller
    assert cores.usable_cores() == expected


@pytest.mark.parametrize(("number", "moving", "reading"), [(1, 4, 1), (2, 4, 2), (6, 6, 6), (16, 8, 16), (64, 8, 16)])
def test_threads(tree: Path, monkeypatch: pytest.MonkeyPatch, number: int, moving: int, reading: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(number)))
    assert (cores.moving_threads(), cores.reading_threads()) == (moving, reading)
