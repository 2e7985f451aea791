"""A checkpoint in a store: the bytes of a local one, visible at the end alone, and a killed run goes on by part."""

from __future__ import annotations

import json
import os
import socket
import threading
from itertools import pairwise
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from ckptkit.errors import InputError, StorageError, UsageError
from ckptkit.io.plan import Plan
from ckptkit.io.source import Sources
from ckptkit.io.stores import client, lock, session, uploading
from ckptkit.io.stores import destination as module
from ckptkit.io.stores.address import parse
from ckptkit.sharding.grid import Parallelism
from tests.io.stores.uploads import (  # noqa: F401  fixtures
    HF,
    Calls,
    calls_fixture,
    convert_to,
    expected,
    only,
    refusal,
    server_fixture,
    small_parts_fixture,
    stopped_at,
)
from tests.lora import save_adapter
from tests.models import save_llama
from tests.stores import BUCKET, CREDENTIALS, Server

pytestmark = pytest.mark.usefixtures("small_parts")

FORMATS: list[dict[str, Any]] = [
    {"to": "hf"},
    {"to": "hf", "dtype": "float16"},
    {"to": "packed"},
    {"to": "torch", "grid": Parallelism(tp=2, pp=2)},
    {"to": "torch_dist", "grid": Parallelism(tp=2)},
]


@pytest.mark.parametrize("how", FORMATS, ids=lambda how: "-".join(map(str, how.values())))
def test_the_bytes_of_a_local_output(server: Server, tmp_path: Path, how: dict[str, Any], request: Any) -> None:
    prefix = f"formats/{request.node.name.replace('[', '-').replace(']', '').replace(' ', '')}"
    result = convert_to(f"s3://{BUCKET}/{prefix}", **how)
    assert only(server, prefix, expected(tmp_path, **how))
    assert result.target["path"] == f"s3://{BUCKET}/{prefix}"
    assert result.disk_free is None and not result.notes


def test_hashes_are_of_what_the_store_holds(server: Server, tmp_path: Path) -> None:
    local = convert_to(tmp_path / "local", hash=True)
    assert convert_to(f"s3://{BUCKET}/hashes/a", hash=True).hashes == local.hashes


def test_a_path_has_lost_a_slash(server: Server, tmp_path: Path) -> None:
    result = convert_to(Path(f"s3://{BUCKET}/slash/a"))
    assert result.target["path"] == f"s3://{BUCKET}/slash/a"
    assert only(server, "slash/a", expected(tmp_path))


def test_a_dry_run_writes_nothing(server: Server, calls: Calls) -> None:
    convert_to(f"s3://{BUCKET}/dry/a", dry_run=True)
    assert set(calls.made) == {"ListObjectsV2"}


def test_memory_is_bounded_however_many_parts_wait(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[uploading.Memory] = []
    usual = uploading.Memory

    def kept(*arguments: Any) -> uploading.Memory:
        runs.append(usual(*arguments))
        return runs[-1]

    monkeypatch.setattr(uploading, "Memory", kept)
    convert_to(f"s3://{BUCKET}/memory/a", "torch", grid=Parallelism(tp=2, pp=2), threads=4)
    assert [memory.most <= 8 * 1024 for memory in runs] == [True]
    assert server.contents("memory/a") == expected(tmp_path, "torch", grid=Parallelism(tp=2, pp=2))


def test_what_makes_a_checkpoint_is_last(server: Server, calls: Calls) -> None:
    order: list[str] = []

    def note(name: str, count: int, request: Any) -> None:
        if name in ("CompleteMultipartUpload", "PutObject") and "/order/a/" in request.url:
            order.append(request.url.rpartition("/")[2].partition("?")[0])

    calls.answer = note
    convert_to(f"s3://{BUCKET}/order/a")
    assert order[-1] == "config.json" and order[-2] == "model.safetensors.index.json"
    assert len(order) == 4


# a run that is killed


@pytest.mark.parametrize("how", [{"to": "hf"}, {"to": "torch", "grid": Parallelism(tp=2)}], ids=["hf", "torch"])
@pytest.mark.parametrize("step", ["part-1", "part-4", "complete", "last", "clean-up"])
def test_a_stopped_run_goes_on_by_part(
    server: Server,
    calls: Calls,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    how: dict[str, Any],
) -> None:
    prefix = f"resumed/{how['to']}-{step}"
    address = f"s3://{BUCKET}/{prefix}"
    with stopped_at(monkeypatch, step), pytest.raises(KeyboardInterrupt) as stop:
        convert_to(address, threads=1, **how)
    if step.startswith("part") or step == "complete":
        assert server.keys(prefix) == []
        assert "--resume" in stop.value.__notes__[-1]
    before, kept = calls.made["UploadPart"], server.parts(prefix)
    calls.made.clear()
    convert_to(address, resume=True, **how)
    assert only(server, prefix, expected(tmp_path, **how))
    if how["to"] == "hf":
        left = 8 - kept if step.startswith("part") else 0  # two shards of three parts, and an index of two
        assert calls.made["UploadPart"] == left < before + left
    calls.made.clear()
    convert_to(address, resume=True, **how)  # it is complete, so there is nothing to do
    assert not calls.made.keys() & {"UploadPart", "CompleteMultipartUpload", "CreateMultipartUpload"}
    with pytest.raises(UsageError, match="exists"):
        convert_to(address, **how)


def test_parts_without_sums_are_uploaded_again(
    server: Server, calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files with checksums of their own bytes: the store knows parts, and not what their checksums need."""
    how: dict[str, Any] = {"to": "torch_dist", "threads": 1}
    with stopped_at(monkeypatch, "complete"), pytest.raises(KeyboardInterrupt):
        convert_to(f"s3://{BUCKET}/sums/a", **how)
    whole = calls.made["UploadPart"]
    sums = [key for key in server.keys("sums") if "/sums/" in key]
    assert sums and all(key.startswith(".a.ckptkit-partial/sums/") for key in sums)
    server.client.put_object(Bucket=BUCKET, Key=f"sums/{sums[0]}", Body=b'{"1": [[0, 0, 5, 3]], "2": "x"}')
    calls.made.clear()
    convert_to(f"s3://{BUCKET}/sums/a", resume=True, **how)
    assert 8 <= calls.made["UploadPart"] < whole
    assert only(server, "sums/a", expected(tmp_path, **how))


def test_a_run_without_resume_removes_what_was_left(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stopped_at(monkeypatch, "part-3"), pytest.raises(KeyboardInterrupt):
        convert_to(f"s3://{BUCKET}/fresh/a")
    other = server.client.create_multipart_upload(Bucket=BUCKET, Key="fresh/other")["UploadId"]
    assert len(server.uploads("fresh/")) == 4
    result = convert_to(f"s3://{BUCKET}/fresh/a")
    assert any("3 unfinished uploads" in note for note in result.notes)
    assert server.uploads("fresh/") == ["fresh/other"]
    server.client.abort_multipart_upload(Bucket=BUCKET, Key="fresh/other", UploadId=other)
    assert only(server, "fresh/a", expected(tmp_path))


def test_uploads_of_others_below_the_destination_stay(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = server.client.create_multipart_upload(Bucket=BUCKET, Key="others/a/nested/other")["UploadId"]
    data = module.StoreDestination._journal_data

    def strike(self: module.StoreDestination) -> bytes:
        if self._uploads:
            raise KeyboardInterrupt  # the uploads began and were not noted
        return data(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module.StoreDestination, "_journal_data", strike)
        convert_to(f"s3://{BUCKET}/others/a", "torch")
    begun = server.uploads("others/a/")
    assert len(begun) > 1 and "others/a/nested/other" in begun
    convert_to(f"s3://{BUCKET}/others/a")
    assert server.uploads("others/a/") == ["others/a/nested/other"]
    server.client.abort_multipart_upload(Bucket=BUCKET, Key="others/a/nested/other", UploadId=other)
    assert only(server, "others/a", expected(tmp_path))


def test_an_upload_that_somebody_aborted_begins_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stopped_at(monkeypatch, "part-4"), pytest.raises(KeyboardInterrupt):
        convert_to(f"s3://{BUCKET}/aborted/a")
    found = server.client.list_multipart_uploads(Bucket=BUCKET)["Uploads"][0]
    server.client.abort_multipart_upload(Bucket=BUCKET, Key=found["Key"], UploadId=found["UploadId"])
    convert_to(f"s3://{BUCKET}/aborted/a", resume=True)
    assert only(server, "aborted/a", expected(tmp_path))


def test_another_plan_or_a_changed_source_is_no_resume(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    copytree(HF, source)
    address = f"s3://{BUCKET}/changed/a"
    with stopped_at(monkeypatch, "part-3"), pytest.raises(KeyboardInterrupt):
        convert_to(address, source=source)
    with pytest.raises(InputError, match="another conversion"):
        convert_to(address, source=source, resume=True, dtype="float16")
    shard = source / "model-00001-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    with stopped_at(monkeypatch, "part-3"), pytest.raises(KeyboardInterrupt):
        convert_to(address, source=source)
    shard.write_bytes(data)
    with pytest.raises(InputError, match="changed since the run"):
        convert_to(address, source=source, resume=True)
    convert_to(address, source=source)
    assert only(server, "changed/a", expected(tmp_path, source=source))


def test_a_touched_source_is_uploaded_again(
    server: Server, calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    copytree(HF, source)
    with stopped_at(monkeypatch, "complete"), pytest.raises(KeyboardInterrupt):
        convert_to(f"s3://{BUCKET}/touched/a", source=source)
    shard = source / "model-00001-of-00002.safetensors"
    copy, status = shard.read_bytes(), shard.stat()
    shard.unlink()
    shard.write_bytes(copy)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    calls.made.clear()
    convert_to(f"s3://{BUCKET}/touched/a", source=source, resume=True)
    assert calls.made["UploadPart"] == 3
    assert only(server, "touched/a", expected(tmp_path, source=source))


def test_a_journal_is_input(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stopped_at(monkeypatch, "part-3"), pytest.raises(KeyboardInterrupt):
        convert_to(f"s3://{BUCKET}/journal/a")
    for journal in (b"{", b"[]", b'{"ckptkit_store_journal": 9}', b'{"ckptkit_store_journal": 1}'):
        server.client.put_object(Bucket=BUCKET, Key="journal/.a.ckptkit-partial/journal.json", Body=journal)
        with pytest.raises(InputError, match="journal"):
            convert_to(f"s3://{BUCKET}/journal/a", resume=True, dry_run=False)
        server.client.put_object(Bucket=BUCKET, Key="journal/.a.ckptkit-partial/journal.json", Body=journal)
    convert_to(f"s3://{BUCKET}/journal/a")
    assert only(server, "journal/a", expected(tmp_path))


# what is there already


def test_an_existing_object_is_not_replaced(server: Server, calls: Calls) -> None:
    server.client.put_object(Bucket=BUCKET, Key="taken/a/x", Body=b"precious")
    for how in ({}, {"resume": True}, {"dry_run": True}):
        with pytest.raises(UsageError, match=r"exists \(x\)"):
            convert_to(f"s3://{BUCKET}/taken/a", **how)
    assert server.contents("taken/a") == {"x": b"precious"}
    assert not calls.made.keys() & {"PutObject", "CreateMultipartUpload"}


def test_overwrite_replaces_and_then_removes(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = {"x": b"old", "config.json": b"{}", "deep/y": b"old"}
    for name, data in old.items():
        server.client.put_object(Bucket=BUCKET, Key=f"over/a/{name}", Body=data)
    server.client.put_object(Bucket=BUCKET, Key="over/ab", Body=b"of somebody else")
    with stopped_at(monkeypatch, "complete"), pytest.raises(KeyboardInterrupt):
        convert_to(f"s3://{BUCKET}/over/a", overwrite=True)
    assert server.contents("over/a") == old
    with stopped_at(monkeypatch, "last"), pytest.raises(KeyboardInterrupt) as stop:
        convert_to(f"s3://{BUCKET}/over/a", overwrite=True, resume=True)
    assert server.contents("over/a").items() >= old.items()
    assert "beside those of the old one" in stop.value.__notes__[-1]
    convert_to(f"s3://{BUCKET}/over/a", overwrite=True, resume=True)
    assert server.contents("over/a") == expected(tmp_path)
    assert server.keys("over")[-1] == "ab"


def test_somebody_fills_the_destination_meanwhile(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = module.StoreDestination._check_complete

    def filled(self: module.StoreDestination, held: Any) -> None:
        usual(self, held)
        server.client.put_object(Bucket=BUCKET, Key="meanwhile/a/config.json", Body=b"{}")

    monkeypatch.setattr(module.StoreDestination, "_check_complete", filled)
    with pytest.raises(UsageError, match=r"exists \(config.json\)"):
        convert_to(f"s3://{BUCKET}/meanwhile/a")
    assert server.contents("meanwhile/a") == {"config.json": b"{}"}
    server.client.delete_object(Bucket=BUCKET, Key="meanwhile/a/config.json")
    monkeypatch.setattr(module.StoreDestination, "_check_complete", usual)
    convert_to(f"s3://{BUCKET}/meanwhile/a", resume=True)
    assert not server.uploads("meanwhile/")


# the lock


def test_one_run_at_a_time(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = module.StoreDestination._commit

    def meanwhile(self: module.StoreDestination, held: Any) -> None:
        with pytest.raises(UsageError, match=f"another conversion is writing.*process {os.getpid()} on"):
            convert_to(f"s3://{BUCKET}/locked/a")
        usual(self, held)

    monkeypatch.setattr(module.StoreDestination, "_commit", meanwhile)
    convert_to(f"s3://{BUCKET}/locked/a")
    assert not [key for key in server.keys("locked") if key.startswith(".")]


@pytest.mark.parametrize(
    ("change", "dead"),
    [({}, True), ({"born": "1"}, True), ({"machine": "another"}, False), ({"pid": os.getpid()}, False)],
)
def test_a_lock_of_a_dead_process(
    server: Server, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], dead: bool
) -> None:
    """A process of this machine that is gone, or whose number was given again; of another one nothing is known."""
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    owner = {"run": "x", "beat": 1, **lock._owner(), "pid": pid, **change}
    server.client.put_object(Bucket=BUCKET, Key="dead/.a.ckptkit-lock", Body=json.dumps(owner).encode())
    if not dead:
        with pytest.raises(UsageError, match="another conversion is writing"):
            convert_to(f"s3://{BUCKET}/dead/a", overwrite=True)
        monkeypatch.setattr(lock, "_DEAD", -1.0)  # it was not renewed for too long
    convert_to(f"s3://{BUCKET}/dead/a", overwrite=True)
    assert not [key for key in server.keys("dead") if key.startswith(".")]


def test_a_lock_that_was_taken_away_ends_the_run(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = module.StoreDestination._check_complete

    def taken(self: module.StoreDestination, held: Any) -> None:
        usual(self, held)
        server.client.put_object(Bucket=BUCKET, Key="away/.a.ckptkit-lock", Body=b"{}")

    monkeypatch.setattr(module.StoreDestination, "_check_complete", taken)
    with pytest.raises(UsageError, match="took the lock"):
        convert_to(f"s3://{BUCKET}/away/a")
    assert server.keys("away/a") == []


@pytest.mark.parametrize("stood_still", [False, True])
def test_a_run_that_stood_still_leaves_the_lock_of_the_next(server: Server, stood_still: bool) -> None:
    """Between the last check and the end; without a pause nobody asks once more, for nobody can have taken it."""
    key = f"still/{stood_still}"
    own = lock.Lock(client.Bucket(parse(f"s3://{BUCKET}/still")), key, "here")
    own.take()
    server.client.put_object(Bucket=BUCKET, Key=key, Body=b"{}")
    if stood_still:
        own._seen -= lock._DEAD
    own.release()
    assert (str(stood_still) in server.keys("still")) == stood_still


@pytest.mark.parametrize("heeds", ["says no", "ignores"])
def test_a_store_without_conditions_is_said(server: Server, calls: Calls, heeds: str) -> None:
    def answer(name: str, count: int, request: Any) -> Any:
        if name == "PutObject" and "If-None-Match" in request.headers:
            if heeds == "says no":
                return refusal(501, "NotImplemented")
            del request.headers["If-None-Match"]
        return None

    calls.answer = answer
    result = convert_to(f"s3://{BUCKET}/conditions/{heeds.replace(' ', '')}")
    assert any("no conditional writes" in note for note in result.notes)


# what goes wrong


def test_faults_that_pass_are_tried_again(server: Server, calls: Calls, tmp_path: Path) -> None:
    def answer(name: str, count: int, request: Any) -> Any:
        if name == "UploadPart" and count == 2:
            return refusal(503, "SlowDown")
        if name == "UploadPart" and count == 4:
            from botocore.exceptions import ConnectionClosedError

            raise ConnectionClosedError(endpoint_url="http://store")
        if name == "CompleteMultipartUpload" and count == 1:
            return refusal(500, "InternalError")
        return None

    calls.answer = answer
    convert_to(f"s3://{BUCKET}/passing/a")
    assert calls.made["UploadPart"] == 10 and calls.made["CompleteMultipartUpload"] == 4
    assert only(server, "passing/a", expected(tmp_path))


@pytest.mark.parametrize(
    ("operation", "status", "code", "says"),
    [
        ("UploadPart", 400, "ExpiredToken", "does not accept the credentials.*renew"),
        ("UploadPart", 400, "BadDigest", "did not reach the store whole"),
        ("UploadPart", 404, "NoSuchUpload", "does not know the upload"),
        ("UploadPart", 418, "Teapot", "answers Teapot: said the store"),
        ("CompleteMultipartUpload", 403, "AccessDenied", "denies access"),
        ("CompleteMultipartUpload", 400, "EntityTooSmall", "parts of this size"),
        ("CreateMultipartUpload", 403, "AccessDenied", "denies access"),
    ],
)
def test_faults_that_stay_are_one_line(
    server: Server, calls: Calls, tmp_path: Path, operation: str, status: int, code: str, says: str
) -> None:
    prefix = f"staying/{operation}-{code}"
    calls.answer = lambda name, count, request: refusal(status, code) if name == operation else None
    with pytest.raises(StorageError, match=says) as error:
        convert_to(f"s3://{BUCKET}/{prefix}")
    assert "\n" not in str(error.value) and "hidden-secret" not in str(error.value)
    assert "config.json" not in server.keys(prefix)
    assert "--resume" in str(error.value)
    calls.answer = lambda name, count, request: None
    convert_to(f"s3://{BUCKET}/{prefix}", resume=True)
    assert server.contents(prefix) == expected(tmp_path)


def test_bytes_that_change_on_their_way_are_noticed(server: Server, calls: Calls, tmp_path: Path) -> None:
    """The store refuses bytes of another MD5; and if it did not, its ETag would tell."""

    def damage(name: str, count: int, request: Any) -> None:
        if name == "UploadPart" and count == 3:
            request.body = bytes(request.body[:-1]) + bytes([request.body[-1] ^ 1])

    calls.answer = damage
    with pytest.raises(StorageError, match=r"holds other bytes|did not reach the store whole"):
        convert_to(f"s3://{BUCKET}/damaged/a")
    assert server.keys("damaged/a") == []


def test_no_bucket_and_no_store(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="bucket does not exist"):
        convert_to("s3://nowhere/a")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="does not answer"):
        convert_to(f"s3://{BUCKET}/a")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "no address")
    with pytest.raises(UsageError, match="names no store"):
        convert_to(f"s3://{BUCKET}/a")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    with pytest.raises(StorageError, match="no credentials"):
        convert_to(f"s3://{BUCKET}/a")


def test_a_damaged_source_leaves_nothing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def truncated(*_: object, **__: object) -> None:
        raise InputError("the file ends before byte 3", where="x")

    monkeypatch.setattr("ckptkit.io.gather.Gatherer.fill", truncated)
    with pytest.raises(InputError, match="ends before"):
        convert_to(f"s3://{BUCKET}/source/a")
    assert server.keys("source") == [] and not server.uploads("source/")


def test_a_store_without_lists_begins_again(
    server: Server, calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as s3rver: it cannot say which uploads and which parts it has, nor forget them."""
    missing = {"ListParts", "ListMultipartUploads", "AbortMultipartUpload"}
    calls.answer = lambda name, count, request: refusal(405, "MethodNotAllowed") if name in missing else None
    with stopped_at(monkeypatch, "part-4"), pytest.raises(KeyboardInterrupt):
        convert_to(f"s3://{BUCKET}/lists/a")
    calls.made.clear()
    convert_to(f"s3://{BUCKET}/lists/a", resume=True)
    assert calls.made["UploadPart"] == 8
    assert server.contents("lists/a") == expected(tmp_path)


def test_no_range_is_read_twice(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that take columns of the same rows are filled side by side, as on a disk: each row is read once for all."""
    read: list[tuple[str, int, int]] = []
    usual = Sources.read

    def noted(self: Sources, path: str, view: memoryview, offset: int) -> None:
        read.append((path, offset, len(view)))
        usual(self, path, view, offset)

    monkeypatch.setattr(Sources, "read", noted)
    convert_to(f"s3://{BUCKET}/once/hf")
    assert read
    for (path, start, size), (following, after, _) in pairwise(sorted(read)):
        assert path != following or start + size <= after
    for to in ("torch", "torch_dist"):
        sums = []
        for out in (tmp_path / to, f"s3://{BUCKET}/once/{to}"):
            read.clear()
            convert_to(out, to, grid=Parallelism(tp=2))
            sums.append(sum(size for *_, size in read))
        assert sums[0] == sums[1]


def test_an_adapter(server: Server, tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    convert_to(f"s3://{BUCKET}/adapter/a", "peft", adapter, hf_reference=str(base))
    assert only(server, "adapter/a", expected(tmp_path, "peft", adapter, hf_reference=str(base)))


@pytest.mark.parametrize("manner", ["says nothing", "breaks off"])
def test_a_store_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, manner: str) -> None:
    """The bounds hold: a store that takes everything and says nothing, or closes each connection, is one line."""
    monkeypatch.setattr(session, "_ANSWER", 0.3)
    for name, value in {**CREDENTIALS, "AWS_MAX_ATTEMPTS": "2", "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)
    open_connections: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                open_connections.append(connection)
                if manner == "breaks off":
                    connection.recv(1)
                    connection.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        with pytest.raises(StorageError, match="does not answer") as error:
            convert_to(f"s3://{BUCKET}/silent/a")
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)
    for connection in open_connections:
        connection.close()
    assert len(open_connections) == 2 and "hidden-secret" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (f"s3://{BUCKET}/x/a", "holds the source"),
        (f"s3://{BUCKET}/x/a/deep", "holds the source"),
        (f"s3://{BUCKET}/x", "lies inside the source"),
        (f"s3://{BUCKET}/x/ab", None),
        ("s3://another/x/a", None),
        ("https://models/x/a", None),
    ],
)
def test_a_destination_apart_from_its_source(server: Server, source: str, says: str | None) -> None:
    def make() -> None:
        module.StoreDestination(parse(f"s3://{BUCKET}/x/a"), Plan(()), sources=[source])

    if says is None:
        make()
        return
    with pytest.raises(UsageError, match=says):
        make()
