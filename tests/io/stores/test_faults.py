"""A store that answers badly: it is asked again a bounded number of times, or one line says what it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from ckptkit.errors import CkptkitError, InputError, StorageError
from ckptkit.io.stores import ranged
from ckptkit.io.stores.address import parse
from ckptkit.io.stores.objects import Object
from ckptkit.io.stores.s3 import S3
from ckptkit.io.stores.session import ATTEMPTS
from tests.store_faults import Asked, Fault, Proxy, before, nothing
from tests.stores import BUCKET, CREDENTIALS, Server, running

DATA = bytes(range(256)) * 400


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as server:
        server.client.put_object(Bucket=BUCKET, Key="model/weights", Body=DATA)
        yield server


@pytest.fixture(scope="module")
def shared_proxy(server: Server) -> Iterator[Proxy]:
    with before(server.url) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def shared_store(server: Server, shared_proxy: Proxy) -> Iterator[S3]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**server.environment, "AWS_ENDPOINT_URL": shared_proxy.url}.items():
            patch.setenv(name, value)
        yield S3(parse(f"s3://{BUCKET}/model"))


@pytest.fixture
def store(shared_store: S3, proxy: Proxy) -> S3:
    return shared_store


@pytest.fixture
def proxy(shared_proxy: Proxy, shared_store: S3) -> Proxy:
    shared_proxy.fault = nothing
    shared_proxy.asked.clear()
    return shared_proxy


def read(store: S3, file: Object, start: int = 1000, stop: int = 90_000) -> bytes:
    found = bytearray(stop - start)
    store.read(file, start, memoryview(found))
    return bytes(found)


def at_first(what: str, times: int = 2) -> Fault:
    """That many bad answers to requests for ranges, and good ones from then on."""
    return lambda asked: what if asked.ranged and asked.number < times else None


def always(what: str) -> Fault:
    return lambda asked: what if asked.ranged else None


@pytest.mark.parametrize(
    "what", ["status 500 InternalError", "status 503 SlowDown", "status 429 TooManyRequests", "short", "reset"]
)
def test_what_passes_is_asked_again(proxy: Proxy, store: S3, what: str) -> None:
    (file,) = store.list()
    proxy.fault = at_first(what)
    assert read(store, file) == DATA[1000:90_000]
    assert proxy.ranged() == 3


@pytest.mark.parametrize(
    ("what", "kind", "text"),
    [
        ("status 403 AccessDenied", StorageError, "does not allow it"),
        ("status 403 InvalidAccessKeyId", StorageError, "refuses the credentials"),
        ("status 404 NoSuchKey", InputError, "is gone"),
        ("status 301 PermanentRedirect", StorageError, "another region"),
        ("status 412 PreconditionFailed", InputError, "source changed"),
        ("whole", StorageError, "ranges"),
    ],
)
def test_what_stays_is_one_line(proxy: Proxy, store: S3, what: str, kind: type[CkptkitError], text: str) -> None:
    (file,) = store.list()
    proxy.fault = always(what)
    with pytest.raises(kind, match=text) as caught:
        read(store, file)
    line = str(caught.value)
    assert line.startswith(f"s3://{BUCKET}/model/weights: ")
    assert "\n" not in line and CREDENTIALS["AWS_SECRET_ACCESS_KEY"] not in line
    assert proxy.ranged() == 1


@pytest.mark.parametrize(
    ("what", "times", "text"),
    [("short", 6, "cut short"), ("status 503 SlowDown", 6, "busy"), ("status 400 ExpiredToken", 2, "expired")],
)
def test_it_does_not_go_on_for_ever(proxy: Proxy, store: S3, what: str, times: int, text: str) -> None:
    (file,) = store.list()
    proxy.fault = always(what)
    with pytest.raises(StorageError, match=text):
        read(store, file)
    assert proxy.ranged() == times


def test_expired_credentials_are_asked_for_again(proxy: Proxy, store: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    (file,) = store.list()
    proxy.fault = at_first("status 400 ExpiredToken", 1)
    assert read(store, file) == DATA[1000:90_000]


def test_credentials_that_cannot_be_renewed(proxy: Proxy, monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    from botocore.exceptions import TokenRetrievalError

    for name, value in {**server.environment, "AWS_ENDPOINT_URL": proxy.url}.items():
        monkeypatch.setenv(name, value)
    store = S3(parse(f"s3://{BUCKET}/model"))
    (file,) = store.list()

    def over() -> Any:
        raise TokenRetrievalError(provider="sso", error_msg="hidden-secret")

    monkeypatch.setattr(store._provider._credentials, "get_frozen_credentials", over)
    with pytest.raises(StorageError, match="session of single sign-on is over; run `aws sso login`") as caught:
        read(store, file)
    assert "hidden-secret" not in str(caught.value)


def test_an_answer_that_does_not_come(proxy: Proxy, monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    for name, value in {**server.environment, "AWS_ENDPOINT_URL": proxy.url}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(ranged.CLIENT, "timeout", timedelta(seconds=0.3))
    monkeypatch.setitem(ranged.RETRIES, "max_retries", 1)
    store = S3(parse(f"s3://{BUCKET}/model"))
    (file,) = store.list()
    proxy.fault = always("slow 5")
    with pytest.raises(StorageError, match="does not answer in time"):
        read(store, file)


def test_another_version_is_not_read(proxy: Proxy, store: S3, server: Server) -> None:
    (file,) = store.list()
    server.client.put_object(Bucket=BUCKET, Key="model/weights", Body=DATA[::-1])
    try:
        with pytest.raises(InputError, match="source changed"):
            read(store, file)
    finally:
        server.client.put_object(Bucket=BUCKET, Key="model/weights", Body=DATA)


def test_a_server_that_ignores_conditions_is_seen_through(proxy: Proxy, store: S3) -> None:
    """The ETag and the size that come with the answer count, too."""
    (file,) = store.list()
    for other in (replace(file, etag='W/"weak"'), replace(file, size=file.size + 1)):
        with pytest.raises(InputError, match="source changed"):
            read(store, other)


@pytest.mark.parametrize(
    ("variables", "address", "kind", "text"),
    [
        ({}, "s3://no-such-bucket/model", InputError, "no such bucket"),
        ({}, f"s3://{BUCKET}/other", InputError, "no such folder"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, f"s3://{BUCKET}/model", StorageError, "cannot be reached"),
        (
            {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None, "HOME": "/nowhere"},
            f"s3://{BUCKET}/model",
            StorageError,
            "no credentials",
        ),
        ({"AWS_PROFILE": "nobody"}, f"s3://{BUCKET}/model", StorageError, "names no profile"),
    ],
)
def test_what_cannot_be_opened(
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, Any],
    address: str,
    kind: type[CkptkitError],
    text: str,
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # botocore waits between its attempts
    for name, value in variables.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(kind, match=text) as caught:
        S3(parse(address)).list()
    assert str(caught.value).startswith(address)


@pytest.mark.parametrize("status", ["403 AccessDenied", "503 SlowDown"])
def test_a_list_that_is_refused(proxy: Proxy, store: S3, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    def refuse(asked: Asked) -> str | None:
        return f"status {status}"

    proxy.fault = refuse
    with pytest.raises(StorageError, match=r"does not allow it|too busy"):
        store.list()
    assert len(proxy.asked) == (1 if status.startswith("403") else ATTEMPTS)
