"""Commands that open a checkpoint, on a store: they say the same as on a disk, and name the store."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ckptkit import convert, diff, hash_checkpoint, inspect, validate, verify
from ckptkit.cli.app import app
from ckptkit.errors import StorageError, UnsupportedError, UsageError
from ckptkit.io.stores import mirror
from ckptkit.io.stores.mirror import Mirror
from ckptkit.io.stores.objects import Object
from ckptkit.sharding.grid import Parallelism
from ckptkit.surgery.build import SplitRecipe, build
from tests.folder_store import Fetched, none_twice, note_fetched, stand_in
from tests.lora import save_adapter
from tests.models import files_of, save_llama
from tests.surgery.pairs import recipe, save_pair

AddressOf = Callable[[Path], str]


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Fetched:
    return note_fetched(monkeypatch)


def without_paths(result: Any) -> dict[str, Any]:
    """A result as JSON values, without what depends on place and time."""

    def stripped(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: stripped(item) for key, item in value.items() if key not in ("path", "seconds", "command")}
        return [stripped(item) for item in value] if isinstance(value, list | tuple) else value

    found: dict[str, Any] = stripped(result.to_dict())
    return found


@pytest.fixture
def address_of(monkeypatch: pytest.MonkeyPatch) -> AddressOf:
    return stand_in(monkeypatch)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model") / "model", shard="150KB")


@pytest.fixture(scope="module")
def shards(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shards = tmp_path_factory.mktemp("shards") / "shards"
    convert(model, shards, to="torch", grid=Parallelism(tp=2))
    return shards


@pytest.fixture(params=["hf", "torch"])
def disk(request: pytest.FixtureRequest, model: Path, shards: Path) -> Path:
    return model if request.param == "hf" else shards


def test_commands_that_read(disk: Path, address_of: AddressOf) -> None:
    address = address_of(disk)
    for command in (inspect, hash_checkpoint, partial(validate, values=True, checksums=True)):
        found, expected = command(address), command(disk)
        assert without_paths(found) == without_paths(expected)
        assert found.path == address
        assert "ckptkit-store-" not in str(found.to_dict())


def test_two_sides(model: Path, shards: Path, address_of: AddressOf) -> None:
    found, expected = diff(address_of(model), address_of(shards)), diff(model, shards)
    assert found.same and without_paths(found) == without_paths(expected)
    report = verify(address_of(model), address_of(shards), level="weights")
    assert report.passed and "ckptkit-store-" not in str(report.to_dict())


def test_a_plan_takes_headers_alone(
    disk: Path, address_of: AddressOf, tmp_path: Path, fetched: Fetched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "AHEAD", 4096)
    plan = convert(address_of(disk), tmp_path / "out", to="packed", dry_run=True)
    expected = convert(disk, tmp_path / "out", to="packed", dry_run=True)
    assert (plan.files, plan.coverage) == (expected.files, expected.coverage)
    assert none_twice(fetched)
    assert sum(stop - start for _, start, stop in fetched) < plan.bytes_total // 3


def test_a_run_that_was_stopped_goes_on(
    model: Path, address_of: AddressOf, tmp_path: Path, fetched: Fetched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another mirror, in another folder, is the same source."""
    monkeypatch.setattr(mirror, "AHEAD", 4096)
    address = address_of(model)
    options: dict[str, Any] = {"to": "hf", "shard_size": 150_000, "dtype": "bfloat16", "threads": 1}
    convert(model, tmp_path / "expected", **options)
    convert(address, tmp_path / "whole", **options)
    whole = sum(stop - start for _, start, stop in fetched)
    fetched.clear()
    read = Mirror.read

    def failing(self: Mirror, file: Object, start: int, view: memoryview) -> None:
        if sum(stop - first for _, first, stop in fetched) > whole * 2 // 3:
            raise StorageError("the store is too busy", where=file.name)
        read(self, file, start, view)

    with monkeypatch.context() as patch:
        patch.setattr(Mirror, "read", failing)
        with pytest.raises(StorageError, match="too busy"):
            convert(address, tmp_path / "out", **options)
    fetched.clear()
    convert(address, tmp_path / "out", resume=True, **options)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")
    assert sum(stop - start for _, start, stop in fetched) <= whole


def test_adapters_and_references(model: Path, address_of: AddressOf, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", model)
    convert(model, tmp_path / "bare", to="torch", grid=Parallelism(tp=2))
    shutil.rmtree(tmp_path / "bare" / "ckptkit")
    reference, at = address_of(model), address_of(adapter)
    convert(tmp_path / "bare", tmp_path / "one", to="hf", hf_reference=model)
    convert(address_of(tmp_path / "bare"), tmp_path / "two", to="hf", hf_reference=reference)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    convert(model, tmp_path / "three", to="torch", adapter=adapter)
    convert(reference, tmp_path / "four", to="torch", adapter=at)
    assert files_of(tmp_path / "three") == files_of(tmp_path / "four")


def test_a_destination_apart_from_all_that_is_read(model: Path, shards: Path, address_of: AddressOf) -> None:
    """A reference gives its headers alone, and a source may be a folder of iterations: they are not written over."""
    source, reference = address_of(shards), address_of(model)
    for out in (reference, f"{reference}/deep", source, f"{source}/deep"):
        with pytest.raises(UsageError, match=r"holds the source|lies inside the source"):
            convert(source, out, to="hf", hf_reference=reference, overwrite=True, dry_run=True)
    for out in (reference, source):
        arguments = ["surgery", "average", reference, source, "-o", out, "--overwrite", "--dry-run"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2 and "holds the source" in result.output


def test_a_split_llama_from_two_prefixes(address_of: AddressOf, tmp_path: Path) -> None:
    pair = save_pair(tmp_path)
    stored = SplitRecipe(address_of(pair[0]), address_of(pair[1]), 2, 3)
    build(recipe(pair), tmp_path / "one")
    build(stored, tmp_path / "two")
    found, expected = files_of(tmp_path / "two"), files_of(tmp_path / "one")
    assert found.keys() == expected.keys()
    assert {name for name in expected if found[name] != expected[name]} <= {"config.json"}
    assert "ckptkit-store-" not in found["config.json"].decode()


OUT = ["-o", "out", "--to", "hf"]
NO_CHECKPOINTS = {
    "delta": ["delta", "apply", "model", "s3://folder/delta", *OUT],
    "recipe": ["surgery", "merge", "s3://folder/recipe.yaml", *OUT],
    "tokens": ["verify", "model", "model", "--tokens", "s3://folder/tokens.json"],
    "run": ["watch", "s3://folder/run", *OUT],
    "average": ["surgery", "average", "s3://folder/run", "--last", "2", *OUT],
}


@pytest.mark.parametrize("what", NO_CHECKPOINTS)
def test_what_is_no_checkpoint(what: str, model: Path) -> None:
    """One line says that it is not read from a store."""
    words = [str(model) if word == "model" else word for word in NO_CHECKPOINTS[what]]
    done = CliRunner().invoke(app, words, prog_name="ckptkit")
    line = done.stderr
    assert done.exit_code == 2, done.output
    assert line.startswith("error: s3://folder/") and "only checkpoints are read from a store" in line
    assert line.count("\n") == 1


def test_without_the_packages(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptkit.io.stores.opening.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"pip install 'ckptkit-megatron\[stores\]'"):
        inspect("s3://models/one")
