"""Checkpoints on a web server, which has no list of files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptkit import convert, inspect
from ckptkit.errors import InputError, StorageError
from ckptkit.sharding.grid import Parallelism
from tests.models import files_of, save_llama
from tests.web import Web, serving

SOURCES: dict[str, dict[str, Any]] = {
    "packed": {"to": "packed", "shard_size": 200_000},
    "torch": {"to": "torch", "grid": Parallelism(tp=2, pp=2)},
    "torch_dist": {"to": "torch_dist", "grid": Parallelism(tp=2)},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    model = save_llama(folder / "a model", shard="400KB")
    (model / "tokenizer" / "notes.txt").unlink()  # nothing names it
    (model / "tokenizer").rmdir()
    (model / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def web(folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    with serving(folder, tmp_path_factory.mktemp("tls")) as web:
        monkeypatch.setenv("SSL_CERT_FILE", str(web.certificate))
        yield web


@pytest.mark.parametrize("kind", ["hf", *SOURCES])
def test_the_same_bytes(kind: str, folder: Path, web: Web, tmp_path: Path) -> None:
    source = folder / "a model"
    if kind != "hf":
        source = folder / kind
        convert(folder / "a model", source, **SOURCES[kind])
    wanted: dict[str, Any] = {"to": "torch", "grid": Parallelism(tp=2)} if kind == "hf" else {"to": "hf"}
    convert(source, tmp_path / "from-disk", **wanted)
    result = convert(f"{web.url}/{source.name}", tmp_path / "from-web", **wanted)
    assert files_of(tmp_path / "from-web") == files_of(tmp_path / "from-disk")
    assert result.source["path"] == f"{web.url}/{source.name}"


def test_headers_are_enough_for_inspect(web: Web) -> None:
    assert inspect(f"{web.url}/a model").architecture == "LlamaForCausalLM"
    assert len([path for method, path in web.asked if method == "GET" and path.endswith(".safetensors")]) == 4


@pytest.mark.parametrize("tags", [True, False])
def test_a_change_is_noticed(
    web: Web, folder: Path, tmp_path: Path, tags: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckptkit.io import engine

    web.tags = tags
    file = folder / "a model" / "config.json"
    before = file.read_bytes()

    def changing(*args: Any, **options: Any) -> Any:
        file.write_bytes(before + b" ")
        return run(*args, **options)

    run = engine.run
    monkeypatch.setattr("ckptkit.io.team.run", changing)
    try:
        with pytest.raises(InputError, match=f"{web.url}/a model/config.json: source changed"):
            convert(f"{web.url}/a model", tmp_path / "out", to="packed")
    finally:
        file.write_bytes(before)
    assert not (tmp_path / "out").exists()


def test_a_server_without_ranges_is_refused(web: Web) -> None:
    web.ranges = False
    with pytest.raises(StorageError, match="does not give ranges of files; copy the files to a disk first"):
        inspect(f"{web.url}/a model")


def test_nothing_there(web: Web) -> None:
    with pytest.raises(InputError, match=f"{web.url}/nothing: none of the files that name the others is there"):
        inspect(f"{web.url}/nothing")


def test_a_server_that_forbids_what_is_not_there(web: Web) -> None:
    web.missing = 403
    assert inspect(f"{web.url}/a model").architecture == "LlamaForCausalLM"
    with pytest.raises(StorageError, match=f"{web.url}/nothing: the server does not allow it"):
        inspect(f"{web.url}/nothing")
