"""Checkpoints in S3: the same bytes as from a disk, each fetched once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptkit import convert, verify
from ckptkit.errors import InputError
from ckptkit.io import team
from ckptkit.io.stores.mirror import Mirror
from ckptkit.io.stores.objects import Object
from ckptkit.sharding.grid import Parallelism
from tests.folder_store import Fetched, none_twice, note_fetched
from tests.models import files_of, save_llama
from tests.stores import BUCKET, Server, found_by_environment

WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "hf": ({"to": "hf", "shard_size": 200_000}, {"to": "torch", "grid": Parallelism(tp=2, pp=2)}),
    "packed": ({"to": "packed"}, {"to": "torch_dist", "grid": Parallelism(tp=2)}),
    "torch": ({"to": "torch", "grid": Parallelism(tp=2, pp=2)}, {"to": "hf"}),
    "torch_dist": ({"to": "torch_dist", "grid": Parallelism(tp=2, pp=2)}, {"to": "hf"}),
}
"""How a source of each format is made, and what it is converted to."""


@pytest.fixture(scope="module")
def store() -> Iterator[Server]:
    with found_by_environment() as server:
        yield server


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model") / "model", shard="150KB")


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Fetched:
    return note_fetched(monkeypatch)


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


@pytest.fixture(scope="module")
def both(store: Server, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """A model and its shards, on a disk and in the store."""
    shards = tmp_path_factory.mktemp("shards") / "shards"
    convert(model, shards, to="torch", grid=Parallelism(tp=2))
    return {"hf": (model, store.upload(model, "one")), "torch": (shards, store.upload(shards, "two"))}


def test_verify_runs_models_of_a_store(both: dict[str, tuple[Path, str]]) -> None:
    report = verify(both["hf"][1], both["torch"][1], level="logits")
    assert report.passed and "ckptkit-store-" not in str(report.to_dict())


def test_a_source_that_changes_in_mid_run(
    store: Server, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = store.upload(model, "changing")
    last = sorted(model.glob("*.safetensors"))[-1]
    changed = bytearray(last.read_bytes())
    changed[-1] ^= 1
    read = Mirror.read

    def changing(self: Mirror, file: Object, start: int, view: memoryview) -> None:
        if start > 200:  # weights
            store.client.put_object(Bucket=BUCKET, Key=f"changing/{last.name}", Body=bytes(changed))
        read(self, file, start, view)

    monkeypatch.setattr(Mirror, "read", changing)
    with pytest.raises(InputError, match=f"{address}/{last.name}: source changed while converting"):
        convert(address, tmp_path / "out", to="torch")
    assert not (tmp_path / "out").exists()


def test_the_last_byte_is_read_before_the_change(
    store: Server, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No read sees this change: the list before the commit does."""
    address = store.upload(model, "late")
    last = sorted(model.glob("*.safetensors"))[-1]
    run = team.run

    def late(*args: Any, **options: Any) -> Any:
        result = run(*args, **options)
        store.client.put_object(Bucket=BUCKET, Key=f"late/{last.name}", Body=last.read_bytes()[::-1])
        return result

    monkeypatch.setattr(team, "run", late)
    with pytest.raises(InputError, match=f"{address}/{last.name}: source changed while converting"):
        convert(address, tmp_path / "out", to="torch")
    assert not (tmp_path / "out").exists()


def test_two_processes(both: dict[str, tuple[Path, str]], tmp_path: Path) -> None:
    """Each opens the store for itself; only rank 0 speaks."""
    disk, address = both["hf"]
    convert(disk, tmp_path / "expected", to="torch", grid=Parallelism(tp=2, pp=2))
    command = [sys.executable, "-m", "ckptkit", "convert", address, str(tmp_path / "out"), "--to", "torch"]
    ranks = [
        subprocess.Popen(
            [*command, "--tp", "2", "--pp", "2", "--json"],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "stores"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=100) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")
    result = json.loads(outputs[0][0])
    assert sum(rank["bytes_written"] for rank in result["ranks"]) == result["bytes_total"]
    assert result["source"]["path"] == address
