"""Mapped bytes are those of the file, and none are given out that would raise a signal."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ckptkit.io import system
from ckptkit.io.mapped import mapped

CONTENT = np.random.default_rng(5).bytes(9003)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("start, stop", [(0, 9003), (4090, 9003), (4096, 8192), (8999, 9000), (4096, 4096)])
def test_any_range(fd: int, start: int, stop: int) -> None:
    view = mapped(fd, start, stop)
    assert view is not None and bytes(view) == CONTENT[start:stop]


def test_what_is_written_later(fd: int) -> None:
    view = mapped(fd, 4090, 9003)
    os.pwrite(fd, b"new", 4095)
    assert view is not None and bytes(view[4:9]) == CONTENT[4094:4095] + b"new" + CONTENT[4098:4099]


def test_beyond_the_end(fd: int) -> None:
    assert mapped(fd, 4090, 9004) is None


def test_what_cannot_be_mapped() -> None:
    with open(os.devnull, "rb") as device:
        assert mapped(device.fileno(), 0, 1) is None


@pytest.mark.parametrize("code", [errno.EFAULT, errno.EINVAL], ids=["a disk that cannot read", "an older kernel"])
def test_pages_that_are_not_there(fd: int, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Libc:
        @staticmethod
        def madvise(*arguments: object) -> int:
            return -1

    monkeypatch.setattr(system, "_libc", Libc)
    monkeypatch.setattr(system.ctypes, "get_errno", lambda: code)
    assert mapped(fd, 0, len(CONTENT)) is None
