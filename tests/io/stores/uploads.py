"""What the tests of writing to a store share: one server for a module, small parts, and counts of calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ckptkit.conversion.convert import convert
from ckptkit.conversion.execution import ConversionResult
from ckptkit.io.stores import client
from ckptkit.io.stores.parts import Sizes
from fixtures.make_damaged import SOUND
from tests.models import files_of
from tests.stores import Server, found_by_environment

HF = SOUND / "hf"
SMALL = Sizes(part=1024, smallest=1024, memory=8 * 1024, held=2200)
"""Parts of a model of five kilobytes: each of its two shards has three, and other files are kept in memory."""


@pytest.fixture(scope="module", name="server")
def server_fixture() -> Iterator[Server]:
    """A server that this process and its children find by their environment."""
    with found_by_environment() as found, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_MAX_ATTEMPTS", "3")
        patch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 256)
        yield found


@pytest.fixture(name="small_parts")
def small_parts_fixture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has conversions of this process upload parts of 1024 bytes."""
    monkeypatch.setattr(Sizes, "of_environment", classmethod(lambda cls: SMALL))


def convert_to(out: object, to: str = "hf", source: Path = HF, **how: Any) -> ConversionResult:
    """Converts the small model, with two threads."""
    return convert(str(source), str(out), to=to, **{"threads": 2, **how})


def expected(folder: Path, to: str = "hf", source: Path = HF, **how: Any) -> dict[str, bytes]:
    """What the same conversion writes to a disk."""
    how = {key: value for key, value in how.items() if key not in ("overwrite", "resume")}
    convert_to(folder / "expected", to, source, **how)
    return files_of(folder / "expected")


class Calls:
    """The calls that reach the server, and what to answer in its place.

    Attributes:
        made: Name of the operation -> how often it was sent.
        answer: Called with (operation, how often it was sent so far, the request) before each is sent; what it returns
            is the answer, and what it raises is an error of the connection.
    """

    def __init__(self) -> None:
        self.made: Counter[str] = Counter()
        self.sent: Counter[tuple[str, str]] = Counter()
        self.answer: Callable[[str, int, Any], Any] = lambda name, count, request: None

    def before_send(self, event_name: str, request: Any, **_: object) -> Any:
        name = event_name.rpartition(".")[2]
        self.made[name] += 1
        return self.answer(name, self.made[name], request)


@pytest.fixture(name="calls")
def calls_fixture(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The calls of clients that are made during a test."""
    found, usual = Calls(), client.session_and_client

    def watched() -> Any:
        session, made = usual()
        made.meta.events.register("before-send.s3", found.before_send)
        return session, made

    monkeypatch.setattr(client, "session_and_client", watched)
    return found


def refusal(status: int, code: str, message: str = "said the store") -> Any:
    """An answer of a store."""
    from botocore.awsrequest import AWSResponse
    from botocore.compat import HTTPHeaders

    class Raw:
        def __init__(self) -> None:
            self.data = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()

        def stream(self, *_: object, **__: object) -> Iterator[bytes]:
            yield self.data

    return AWSResponse("http://store", status, HTTPHeaders(), Raw())


@contextmanager
def stopped_at(monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException | None = None) -> Iterator[None]:
    """Ends conversions of this process at a step, as a signal would."""
    from ckptkit.io import faults

    def strike(name: str) -> None:
        if name == step:
            raise error or KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(faults, "step", strike)
        yield


def only(server: Server, prefix: str, files: Mapping[str, bytes]) -> bool:
    """Whether the store holds these files below a prefix, no unfinished upload, and nothing beside them."""
    beside = [key for key in server.keys(prefix.rpartition("/")[0]) if key.startswith(".")]
    return server.contents(prefix) == files and not server.uploads(f"{prefix}/") and not beside
