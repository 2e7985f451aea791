"""A hash that follows its writers is that of the finished file, in whatever order and sizes they write."""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptkit.errors import StorageError
from ckptkit.io import following
from ckptkit.io.checksums import Checksums
from ckptkit.io.engine import run
from ckptkit.io.following import Follower
from ckptkit.io.plan import Checksum, OutputFile, Plan

SIZE = 4000
CONTENT = np.random.default_rng(3).bytes(SIZE)
HOLES = (0, 4, 900, 1200, 3990)
SUMS = (Checksum(10, 700, (0, 3990)), Checksum(700, 900, (4,)), Checksum(1300, 3900, (900, 1200)))
"""Checksums before, between and after the bytes that they cover."""


def finished() -> bytes:
    content = bytearray(CONTENT)
    for hole in HOLES:
        content[hole : hole + 4] = bytes(4)
    for checksum in SUMS:
        for at in checksum.at:
            content[at : at + 4] = zlib.crc32(content[checksum.start : checksum.stop]).to_bytes(4, "little")
    return bytes(content)


def follower(path: Path, checksums: tuple[Checksum, ...] = SUMS) -> tuple[Follower, Checksums, int]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    sums = Checksums(checksums)
    return Follower(OutputFile("f", SIZE, (), checksums), sums, lambda: fd), sums, fd


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("following") / "file"


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_STEP", 64)
    monkeypatch.setattr(following, "_BUFFER", 97)
    monkeypatch.setattr(following, "_place", threading.local())


@pytest.fixture(params=[True, False], ids=["mapped", "read"])
def mappable(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the file system can map files into memory."""
    if not request.param:
        monkeypatch.setattr(following, "mapped", lambda fd, start, stop: None)
    return bool(request.param)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_order(path: Path, mappable: bool, data: st.DataObject) -> None:
    cuts = sorted({0, SIZE, *data.draw(st.lists(st.integers(0, SIZE), max_size=30))})
    follow, sums, fd = follower(path)
    placeholders = bytearray(CONTENT)
    for hole in HOLES:
        placeholders[hole : hole + 4] = bytes(4)
    for start, stop in data.draw(st.permutations(list(pairwise(cuts)))):
        part = memoryview(bytes(placeholders[start:stop]))
        sums.add(part, start)
        os.pwrite(fd, part, start)
        if follow.written(start, stop) and data.draw(st.booleans()):
            follow.advance()
    assert follow.finish() == hashlib.sha256(finished()).hexdigest()
    os.close(fd)


def test_it_keeps_up(path: Path) -> None:
    """What is final is hashed as it is written, and what a checksum is still to be put into is not."""
    follow, _, fd = follower(path, (Checksum(3000, 3900, (2950,)),))
    turns = []
    for start in range(0, SIZE, 100):
        os.pwrite(fd, CONTENT[start : start + 100], start)
        if follow.written(start, start + 100):
            turns.append(start)
            follow.advance()
    assert turns == [*range(0, 2900, 100), 3800, 3900]
    os.close(fd)


def test_bytes_that_nobody_wrote(path: Path) -> None:
    follow, _, fd = follower(path)
    with pytest.raises(RuntimeError, match="were not written"):
        follow.finish()
    os.close(fd)


def test_a_file_cut_short_meanwhile(path: Path, mappable: bool) -> None:
    follow, _, fd = follower(path, ())
    os.pwrite(fd, CONTENT[:1000], 0)
    follow.written(0, SIZE)
    with pytest.raises(StorageError, match="became shorter"):
        follow.finish()
    os.close(fd)


@pytest.mark.parametrize("threads", [1, 3])
def test_in_a_run(tmp_path: Path, threads: int) -> None:
    """Real files, larger than a step, copied inside the kernel."""
    contents = {f"{index}": np.random.default_rng(index).bytes(100_000 + index) for index in range(3)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    plan = Plan(tuple(OutputFile.copy(name, str(tmp_path / name), len(contents[name])) for name in contents))
    result = run(plan, tmp_path / "out", threads=threads, hash=True)
    assert result.hashes == {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
