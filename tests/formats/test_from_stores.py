"""Checkpoints in S3: the same bytes as from a disk, each fetched once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ckptkit import convert
from ckptkit.io.stores.mirror import Mirror
from ckptkit.io.stores.objects import Object
from ckptkit.sharding.grid import Parallelism
from tests.models import files_of, save_llama
from tests.stores import Server, running

Fetched = list[tuple[str, int, int]]
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "hf": ({"to": "hf", "shard_size": 200_000}, {"to": "torch", "grid": Parallelism(tp=2, pp=2)}),
    "packed": ({"to": "packed"}, {"to": "torch_dist", "grid": Parallelism(tp=2)}),
    "torch": ({"to": "torch", "grid": Parallelism(tp=2, pp=2)}, {"to": "hf"}),
    "torch_dist": ({"to": "torch_dist", "grid": Parallelism(tp=2, pp=2)}, {"to": "hf"}),
}
"""How a source of each format is made, and what it is converted to."""


@pytest.fixture(scope="module")
def store() -> Iterator[Server]:
    with running() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model") / "model", shard="150KB")


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Fetched:
    """Every range that is fetched: name, first byte, end."""
    found: Fetched = []
    read = Mirror.read

    def noted(self: Mirror, file: Object, start: int, view: memoryview) -> None:
        found.append((f"{self.root}/{file.name}", start, start + len(view)))
        read(self, file, start, view)

    monkeypatch.setattr(Mirror, "read", noted)
    return found


def none_twice(fetched: Fetched) -> bool:
    ordered = sorted(fetched)
    return all(one[0] != other[0] or one[2] <= other[1] for one, other in pairwise(ordered))


@pytest.mark.parametrize("kind", WAYS)
def test_the_same_bytes_each_fetched_once(
    kind: str, store: Server, model: Path, tmp_path: Path, fetched: Fetched
) -> None:
    made, wanted = WAYS[kind]
    convert(model, tmp_path / kind, **made)
    address = store.upload(tmp_path / kind, kind)
    convert(tmp_path / kind, tmp_path / "from-disk", **wanted)
    result = convert(address, tmp_path / "from-store", **wanted)
    assert files_of(tmp_path / "from-store") == files_of(tmp_path / "from-disk")
    assert result.source["path"] == address
    assert none_twice(fetched)
    nbytes = sum(stop - start for _, start, stop in fetched)
    assert result.source["fetched"] == {"requests": len(fetched), "bytes": nbytes}
    assert nbytes <= sum(len(data) for data in files_of(tmp_path / kind).values())
    assert not any(b"ckptkit-store-" in data for data in files_of(tmp_path / "from-store").values())
