"""From a store to a store: the same bytes as over a disk, each fetched once, and no destination inside a source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ckptkit import convert
from ckptkit.errors import UsageError
from ckptkit.sharding.grid import Parallelism
from tests.folder_store import Fetched, none_twice, note_fetched
from tests.io.stores.uploads import HF, server_fixture, small_parts_fixture  # noqa: F401  fixtures
from tests.models import files_of
from tests.stores import BUCKET, Server

TWO = Parallelism(2)
TARGETS: list[tuple[str, dict[str, Any]]] = [
    ("torch", {"grid": TWO, "spec": "local"}),
    ("torch_dist", {"grid": TWO}),
    ("packed", {}),
]


@pytest.fixture
def model() -> Path:
    return HF


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Fetched:
    return note_fetched(monkeypatch)


@pytest.mark.parametrize(("to", "how"), TARGETS, ids=[to for to, _ in TARGETS])
def test_there_and_back(
    server: Server, small_parts: None, model: Path, tmp_path: Path, fetched: Fetched, to: str, how: dict[str, Any]
) -> None:
    source = server.upload(model, f"{to}/hf")
    convert(source, f"s3://{BUCKET}/{to}/there", to=to, threads=2, **how)
    assert none_twice(fetched)
    convert(model, tmp_path / "there", to=to, **how)
    assert dict(server.contents(f"{to}/there")) == files_of(tmp_path / "there")
    fetched.clear()
    convert(f"s3://{BUCKET}/{to}/there", f"s3://{BUCKET}/{to}/back", to="hf", threads=2)
    assert none_twice(fetched)
    assert dict(server.contents(f"{to}/back")) == files_of(model)
    assert server.uploads(to) == []


@pytest.mark.parametrize("out", ["", "/inside", "/../source"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_destination_apart_from_the_source(server: Server, model: Path, out: str, overwrite: bool) -> None:
    source = server.upload(model, "apart/source")
    before = dict(server.contents("apart"))
    with pytest.raises(UsageError):
        convert(source, f"{source}{out}", to="packed", overwrite=overwrite)
    with pytest.raises(UsageError):  # the source is inside of it
        convert(source, f"s3://{BUCKET}/apart", to="packed", overwrite=overwrite)
    assert dict(server.contents("apart")) == before


def test_a_reference_is_a_source_too(server: Server, model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "packed", to="packed")
    reference = server.upload(model, "reference/hf")
    with pytest.raises(UsageError, match="the destination holds the source"):
        convert(tmp_path / "packed", reference, to="hf", hf_reference=reference, overwrite=True)
