"""Files are opened for reading in one place, which takes regular files alone and never blocks."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import pytest

import ckptkit
from ckptkit.errors import InputError
from ckptkit.io.reading import hash_file
from ckptkit.io.regular import open_regular, read_bounded, walk
from ckptkit.io.source import Sources


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(os.path.relpath(path))


def make_circle(path: Path) -> None:
    path.symlink_to(path.name)


KINDS = {
    "a pipe, not a regular file": make_pipe,
    "a device, not a regular file": make_device,
    "a socket or a device, not a regular file": make_socket,
    "a folder, not a regular file": Path.mkdir,
    "a symbolic link that leads nowhere, not a file": make_circle,
}
READERS = {
    "open_regular": open_regular,
    "read_bounded": lambda path: read_bounded(path, 1 << 20),
    "hash_file": hash_file,
    "sources": lambda path: Sources().fd(str(path)),
}


@pytest.mark.parametrize("message", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_other_kinds_of_files_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str, reader: str
) -> None:
    monkeypatch.chdir(tmp_path)
    KINDS[message](tmp_path / "x")
    with pytest.raises(InputError, match=message):
        READERS[reader](tmp_path / "x")


def test_links_are_followed_unless_they_may_not_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"123")
    (tmp_path / "link").symlink_to("file")
    assert read_bounded(tmp_path / "link", 3) == b"123"
    with pytest.raises(InputError, match="a symbolic link, not a file"):
        read_bounded(tmp_path / "link", 3, follow=False)
    with pytest.raises(InputError, match="larger than 2 bytes"):
        read_bounded(tmp_path / "file", 2)


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(InputError):
            open_regular(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_folder_is_walked_by_name_and_never_in_circles(tmp_path: Path) -> None:
    for name in ("b/2", "a/x/1", "skipped/3", "c", "a/y"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [str(item.relative_to(tmp_path)) for item in walk(tmp_path, {"skipped"})] == ["a/x/1", "a/y", "b/2", "c"]
    (tmp_path / "b" / "again").symlink_to("..")
    with pytest.raises(InputError, match="the same folder as"):
        list(walk(tmp_path))


def test_reading_is_done_through_it() -> None:
    """Whatever a command reads could be anything: no module opens a file for reading by itself."""
    opening = re.compile(
        r"(?<!def )(\bread_bytes\(|\bread_text\(|\.open\(\"rb?\"|\bO_RDONLY\b|\bopen\((?!open_regular)[a-z_.]+, \"rb)"
    )
    root = Path(ckptkit.__file__).parent
    found = {
        str(file.relative_to(root))
        for file in root.rglob("*.py")
        if opening.search(file.read_text()) and not file.is_relative_to(root / "megatron")
    }
    ours = {"io/regular.py", "io/system.py"}  # the second to sync folders and files that a run has written
    assert found - ours <= NOT_INPUT


NOT_INPUT = {
    "verification/ranks/processes.py",  # what its own workers said
    "verification/ranks/forking.py",  # /dev/null
    "verification/environment/disk.py",  # a file that it wrote itself, to measure the disk
    "verification/tokens.py",  # the user names these two: they may well be pipes
    "surgery/calibration.py",
    "io/stores/mirror.py",  # the sparse files that it made, and its list of them
    "verification/reports/html.py",  # a file of the package
}
