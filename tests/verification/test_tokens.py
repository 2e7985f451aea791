"""Token ids from a file: what is none is a mistake of the request, said in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptkit.errors import UsageError
from ckptkit.verification.tokens import read_rows


def test_rows(tmp_path: Path) -> None:
    (tmp_path / "tokens.json").write_text("[[1, 2], [3]]")
    assert read_rows(tmp_path / "tokens.json") == [[1, 2], [3]]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"[[1, 2]", "cannot read token ids"),
        (b"\xff\xfe\x00", "cannot read token ids"),
        (b"{}", "not a JSON list of lists of token ids"),
        (b"[1, 2]", "not a JSON list of lists of token ids"),
        (None, "cannot read token ids .*No such file"),
    ],
)
def test_what_is_none(tmp_path: Path, content: bytes | None, text: str) -> None:
    path = tmp_path / "tokens.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=f"tokens.json: {text}"):
        read_rows(path)
