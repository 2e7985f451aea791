"""The server of these tests holds what it is given."""

from __future__ import annotations

from pathlib import Path

from tests.stores import Server, s3_fixture  # noqa: F401  a fixture


def test_holds_a_folder(s3: Server, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.bin").write_bytes(b"12")
    assert s3.upload(tmp_path, "x/y") == "s3://models/x/y"
    assert s3.contents("x/y") == {"a/b.bin": b"12"}
    assert s3.uploads("x") == []
