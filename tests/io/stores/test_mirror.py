"""Sparse files that stand for those of a store."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ckptkit.errors import InputError, StorageError, UsageError
from ckptkit.io.engine import run
from ckptkit.io.plan import OutputFile, Plan
from ckptkit.io.reading import hash_file
from ckptkit.io.regular import open_header, open_regular, read_bounded
from ckptkit.io.source import Fingerprint, Seen, fingerprints
from ckptkit.io.stores.address import Address, parse
from ckptkit.io.stores.mirror import Mirror, fetch_folder, mirror_around, mirror_of, mirrored, shown
from ckptkit.io.stores.objects import Object

WEIGHTS = os.urandom(3 << 20)
SMALL = b'{"a": 1}'
ADDRESS = parse("s3://models/run")


class Memory:
    """A store in memory that notes what is asked of it."""

    def __init__(self, address: Address = ADDRESS) -> None:
        self.address = address
        self.data = {"config.json": SMALL, "inner/weights": WEIGHTS}
        self.etag = '"one"'
        self.asked: list[tuple[str, int, int]] = []
        self.lists = 0

    def list(self) -> list[Object]:
        self.lists += 1
        return [Object(name, len(data), self.etag, 10**18) for name, data in self.data.items()]

    def read(self, file: Object, start: int, view: memoryview) -> int:
        self.asked.append((file.name, start, start + len(view)))
        view[:] = self.data[file.name][start : start + len(view)]
        return 1


@pytest.fixture
def store() -> Memory:
    return Memory()


@pytest.fixture
def mirror(store: Memory) -> Iterator[Mirror]:
    with mirror_of(store, store.list()) as mirror:
        yield mirror


@pytest.fixture
def weights(mirror: Mirror) -> Path:
    return mirror.folder / "inner" / "weights"


def test_names_and_sizes_are_true_and_nothing_is_there(mirror: Mirror, store: Memory, weights: Path) -> None:
    assert weights.stat().st_size == len(WEIGHTS)
    assert sum(file.stat().st_blocks for file in mirror.folder.rglob("*") if file.is_file()) == 0
    assert store.asked == []


def test_every_way_to_read(mirror: Mirror, weights: Path) -> None:
    assert read_bounded(mirror.folder / "config.json", 100) == SMALL
    with open_header(weights) as file:
        assert file.seek(0, os.SEEK_END) == len(WEIGHTS)
        file.seek(70_000)
        assert file.read(100_000) == WEIGHTS[70_000:170_000]
    with open(open_regular(weights), "rb") as file:
        assert file.read() == WEIGHTS
    import hashlib

    assert hash_file(weights) == hashlib.sha256(WEIGHTS).hexdigest()


def test_what_stays_is_asked_for_once(store: Memory, weights: Path) -> None:
    file = mirrored(weights)
    assert file is not None
    file.keep(2 << 20, (2 << 20) + 300_000)
    whole = bytearray(1 << 20)
    for _ in range(2):
        file.read_into(memoryview(whole), 2 << 20)
        assert whole == WEIGHTS[2 << 20 :]
        assert file.header(5, 10) == WEIGHTS[5:15]
    kept = [asked for asked in store.asked if asked[1] == 2 << 20]
    past = [asked for asked in store.asked if asked[1] == (2 << 20) + 300_000]
    assert kept == [("inner/weights", 2 << 20, (2 << 20) + 300_000)]
    assert len(past) == 2 and len(store.asked) == 4
    assert weights.stat().st_blocks * 512 < 400_000


def test_a_file_ends_where_it_ends(weights: Path) -> None:
    file = mirrored(weights)
    assert file is not None
    with pytest.raises(InputError, match="ends before byte"):
        file.read_into(memoryview(bytearray(10)), len(WEIGHTS) - 5)
    assert file.header(len(WEIGHTS) - 5, 10) == WEIGHTS[-5:]
    assert file.header(len(WEIGHTS) + 5, 10) == b""


def test_the_engine_copies_past_the_sparse_file(mirror: Mirror, store: Memory, weights: Path, tmp_path: Path) -> None:
    plan = Plan((OutputFile.copy("one", str(weights), len(WEIGHTS)),))
    run(plan, tmp_path)
    assert (tmp_path / "one").read_bytes() == WEIGHTS
    assert weights.stat().st_blocks == 0
    assert sum(stop - start for _, start, stop in store.asked) == len(WEIGHTS)


def test_what_two_outputs_take_is_fetched_once(store: Memory, weights: Path, tmp_path: Path) -> None:
    plan = Plan(tuple(OutputFile.copy(name, str(weights), len(WEIGHTS)) for name in ("one", "two")))
    run(plan, tmp_path)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == WEIGHTS
    assert sum(stop - start for _, start, stop in store.asked) == len(WEIGHTS)


def test_memory_does_not_grow_with_a_file(store: Memory, tmp_path: Path) -> None:
    """Of a file of 64 MiB that is copied, buffers are in memory, and none of it is on the disk."""
    store.data["large"] = bytes(64 << 20)
    with mirror_of(store, store.list()) as mirror:
        file = mirror.folder / "large"
        tracemalloc.start()
        try:
            run(Plan((OutputFile.copy("one", str(file), 64 << 20),)), tmp_path, threads=2)
            hash_file(file)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert file.stat().st_blocks == 0
    assert (tmp_path / "one").stat().st_size == 64 << 20
    assert peak < 16 << 20


def test_fingerprints_name_the_store(store: Memory, mirror: Mirror, weights: Path) -> None:
    (found,) = fingerprints([str(weights)])
    assert found.path == "s3://models/run/inner/weights"
    assert found.identity == ("s3://models/run/inner/weights", len(WEIGHTS), 10**18, '"one"')
    with mirror_of(store, store.list()) as other:
        assert fingerprints([str(other.folder / "inner" / "weights")]) == (found,)
        plans = [
            Plan((OutputFile.copy("one", str(place.folder / "inner" / "weights"), 5),)).digest([found])
            for place in (mirror, other)
        ]
    assert plans[0] == plans[1]
    assert store.asked == []


def test_a_change_is_noticed(store: Memory, mirror: Mirror, weights: Path) -> None:
    found, seen = Fingerprint.of(str(weights)), Seen.of(mirror.folder)
    found.check()
    seen.check([str(weights)])
    store.etag = '"two"'
    for check in (found.check, lambda: seen.check([str(weights)])):
        with pytest.raises(InputError, match="s3://models/run/inner/weights: source changed"):
            check()
    store.etag = '"one"'
    del store.data["inner/weights"]
    with pytest.raises(InputError, match="source changed"):
        found.check()


def test_one_list_answers_for_all_files(store: Memory, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptkit.io.stores.mirror._FRESH", 10**6)
    before = store.lists
    found = [Fingerprint.of(str(mirror.folder / name)) for name in store.data]
    for _ in range(2):
        for one in found:
            one.check()
    assert store.lists == before + 2


def test_errors_name_the_store_and_the_folder_goes(store: Memory) -> None:
    with pytest.raises(InputError) as caught, mirror_of(store, store.list()) as mirror:
        folder = mirror.root
        raise InputError(f"bad {mirror.folder}/a", where=mirror.folder / "b", hint=f"see {mirror.folder}")
    assert str(caught.value) == "s3://models/run/b: bad s3://models/run/a; see s3://models/run"
    assert not folder.exists()
    assert shown(f"{folder}/files/x") == "s3://models/run/x"
    assert mirrored(folder / "files" / "config.json") is None


def test_a_full_disk_is_that_of_temporary_files(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match="no space left for temporary files; free some space, or set TMPDIR"):
        read_bounded(mirror.folder / "config.json", 100)


def test_files_are_fetched_whole_for_others(store: Memory, mirror: Mirror, weights: Path) -> None:
    fetch_folder(mirror.folder, lambda name: name.endswith(".json"))
    assert (mirror.folder / "config.json").read_bytes() == SMALL and weights.stat().st_blocks == 0
    fetch_folder(mirror.folder / "inner")
    assert weights.read_bytes() == WEIGHTS
    fetch_folder(mirror.folder)
    assert sum(stop - start for _, start, stop in store.asked) == len(WEIGHTS) + len(SMALL)


def test_another_process_finds_the_store(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads the list beside the files, if the same user wrote it; bytes are never taken for zeros."""
    text = json.loads((mirror.root / "list.json").read_text())
    assert text["address"] == "s3://models/run" and len(text["files"]) == 2
    from ckptkit.io.stores import mirror as module
    from ckptkit.io.stores import opening

    monkeypatch.setattr(module, "_open", {})
    monkeypatch.setattr(opening, "store_at", lambda address: replace_store(address))
    assert read_bounded(mirror.folder / "config.json", 100) == SMALL
    monkeypatch.setattr(module, "_open", {})
    with monkeypatch.context() as patch:
        patch.setattr(module.os, "getuid", lambda: os.geteuid() + 1)
        with pytest.raises(InputError, match="its bytes are not there"):
            mirrored(mirror.folder / "config.json")
    odd = {"address": "s3://models/run", "files": [{"name": 1, "size": "1", "etag": "", "modified": 0}]}
    for change in (
        lambda: os.mkfifo(mirror.root / "list.json"),
        lambda: (mirror.root / "list.json").write_text(json.dumps(odd)),
        lambda: os.symlink("/dev/zero", mirror.root / "list.json"),
    ):
        (mirror.root / "list.json").unlink()
        with pytest.raises(InputError, match="its bytes are not there"):
            open_regular(mirror.folder / "config.json")
        change()
        with pytest.raises(InputError, match="its bytes are not there"):
            mirrored(mirror.folder / "config.json")


def test_a_temporary_folder_may_have_the_name_of_a_mirror(
    store: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    around = tmp_path / "ckptkit-store-scratch" / "files"
    around.mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(around))
    with mirror_of(store, store.list()) as mirror:
        assert read_bounded(mirror.folder / "config.json", 100) == SMALL
        assert mirror_around(mirror.folder / "inner") is mirror
    (around / "config.json").write_bytes(SMALL)
    assert mirrored(around / "config.json") is None and mirror_around(around) is None


def replace_store(address: Address) -> Memory:
    return Memory(replace(address))


def test_what_is_no_checkpoint_is_not_read_from_a_store() -> None:
    with pytest.raises(UsageError, match="only checkpoints are read from a store"):
        read_bounded("s3://models/tokens.json", 100)


_HELD = """
import sys, tempfile
from ckptkit.cli.exits import *
from ckptkit.__main__ import main
from ckptkit.formats import stores
from tests.io.stores.test_mirror import Memory
import ckptkit.checkpoints.sources as sources, time
def held(address):
    print("ready", flush=True)
    return Memory()
def wait(*args, **options):
    print("open", flush=True)
    time.sleep(60)
stores.store_at = held
sources.open_checkpoint = wait
sys.argv = ["ckptkit", "inspect", "s3://models/run"]
main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing(number: int, tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", _HELD], env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert [child.stdout.readline(), child.stdout.readline()] == ["ready\n", "open\n"]
        assert [item.name.startswith("ckptkit-store-") for item in tmp_path.iterdir()] == [True]
        child.send_signal(number)
        assert child.wait(20) == 128 + number
    assert list(tmp_path.iterdir()) == []
