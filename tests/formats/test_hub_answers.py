"""A hub's answers are input: each that makes no sense ends with one line, and nothing is written outside the cache."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fixtures.make_damaged import SOUND
from tests.bounded_command import Ended, run_bounded
from tests.formats.test_hub import COMMIT, REPOSITORY, Hub, variables_of
from tests.models import files_of


class OddHub(Hub):
    """A hub that does one thing otherwise."""

    odd: Callable[[OddHub, str], bool]

    def answer(self) -> None:
        if not type(self).odd(self, self.path.split("?")[0]):
            super().answer()

    def endless(self, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """An answer that never ends."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        try:
            while self.command == "GET":
                self.wfile.write(bytes(1 << 20))
        except OSError:
            pass  # whoever asked had enough


Odd = Callable[[OddHub, str], bool]


def info(**changes: Any) -> Odd:
    """Changes what the hub says of the model."""

    def odd(hub: OddHub, path: str) -> bool:
        if not path.startswith("/api/"):
            return False
        hub.send(200, json.dumps({**hub.info(), **changes}).encode())
        return True

    return odd


def file_named(name: str, size: object = 3) -> Odd:
    """Adds a file to the hub's list."""

    def odd(hub: OddHub, path: str) -> bool:
        if not path.startswith("/api/"):
            return False
        about = hub.info()
        about["siblings"].append({"rfilename": name, "size": size})
        hub.send(200, json.dumps(about).encode())
        return True

    return odd


def api(body: bytes, status: int = 200) -> Odd:
    """Answers with other bytes."""
    return lambda hub, path: path.startswith("/api/") and (hub.send(status, body), True)[1]


def endless_api(hub: OddHub, path: str) -> bool:
    return path.startswith("/api/") and (hub.endless(), True)[1]


def headers(**changes: str) -> Odd:
    """Answers for files with other headers."""

    def odd(hub: OddHub, path: str) -> bool:
        if path.startswith("/api/"):
            return False
        file = hub.folder / path.split("/resolve/", 1)[1].split("/", 1)[1]
        named = {name.replace("_", "-"): value for name, value in changes.items()}
        hub.send(200, file.read_bytes(), {"ETag": '"0123"', "X-Repo-Commit": COMMIT, **named})
        return True

    return odd


def missing_with_commit(hub: OddHub, path: str) -> bool:
    """The library notes files that are not there, in a folder that is called as the answer says."""
    if path.startswith("/api/") or hub.command == "GET":
        return False
    hub.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "../../../../outside"})
    return True


def endless_file(hub: OddHub, path: str) -> bool:
    if path.startswith("/api/") or hub.command == "HEAD" or not path.endswith(".safetensors"):
        return False
    hub.endless()
    return True


def short_file(hub: OddHub, path: str) -> bool:
    if path.startswith("/api/") or hub.command == "HEAD" or not path.endswith(".safetensors"):
        return False
    hub.send(200, b"short", {"ETag": '"0123"', "X-Repo-Commit": COMMIT})
    return True


NO_SENSE = "no such local path, and the hub's answer is no good: it "
HTML = b"<!DOCTYPE html><html><body>Sign in to the network</body></html>"

ODD: dict[str, tuple[Odd, int, str]] = {
    "a web page": (api(HTML), 3, NO_SENSE + "is a web page"),
    "nothing": (api(b""), 3, NO_SENSE + "is not valid JSON"),
    "half of it": (api(b'{"sha": "'), 3, NO_SENSE + "is not valid JSON"),
    "NaN": (api(b'{"sha": NaN}'), 3, NO_SENSE),
    "nested": (api(b"[" * 100_000), 3, NO_SENSE + "is not valid JSON"),
    "a list": (api(b"[]"), 3, NO_SENSE),
    "bytes": (api(bytes(range(256))), 3, NO_SENSE + "is not valid JSON"),
    "endless": (endless_api, 3, NO_SENSE + "has more than"),
    "error 500": (api(b"", 500), 5, "no such local path, and the hub did not answer"),
    "error 418": (api(HTML, 418), 5, "no such local path, and the hub did not answer"),
    "no commit": (info(sha=None), 3, NO_SENSE + "names no commit"),
    "a short commit": (info(sha="0123abc"), 3, NO_SENSE + "names no commit"),
    "a branch for a commit": (info(sha="main"), 3, NO_SENSE + "names no commit"),
    "a path for a commit": (info(sha="../../../" + "0" * 31), 3, NO_SENSE + "names no commit"),
    "no files": (info(siblings=None), 3, NO_SENSE + "lists no files"),
    "files that are names": (info(siblings=["config.json"]), 3, NO_SENSE + "lists a file without"),
    "an empty list": (info(siblings=[]), 3, "no model.safetensors and no"),
    "a name above": (file_named("../outside"), 3, "a file outside its folder (../outside)"),
    "a name in the middle": (file_named("a/../../../outside"), 3, "a file outside its folder"),
    "an absolute name": (file_named("/tmp/outside"), 3, "a file outside its folder"),
    "a name of another system": (file_named("..\\outside"), 3, "a file outside its folder"),
    "a name with an escape": (file_named("a\x1b[2J"), 3, "a file outside its folder"),
    "a long name": (file_named("x" * 5000), 3, "a file outside its folder"),
    "no name": (file_named(""), 3, NO_SENSE + "lists a file without a name"),
    "a negative size": (file_named("a.txt", -1), 3, NO_SENSE + "lists a file without"),
    "a size in words": (file_named("a.txt", "3"), 3, NO_SENSE + "lists a file without"),
    "a size of 1e30": (file_named("a.txt", 10**30), 3, NO_SENSE + "lists a file without"),
    "a size of 1.5": (file_named("a.txt", 1.5), 3, NO_SENSE + "lists a file without"),
}
WHILE_FETCHING: dict[str, tuple[Odd, int, str]] = {
    "a tag above": (headers(ETag='"../../../../../outside"'), 3, "has a tag that cannot name a file"),
    "a linked tag above": (headers(X_Linked_Etag='"../../../../outside"'), 3, "has a tag that cannot name a file"),
    "an absolute tag": (headers(ETag="/tmp/outside"), 3, "has a tag that cannot name a file"),
    "a tag of dots": (headers(ETag='".."'), 3, "has a tag that cannot name a file"),
    "a commit above": (headers(X_Repo_Commit="../../../../outside"), 3, "is about another commit"),
    "another commit": (headers(X_Repo_Commit="f" * 40), 3, "is about another commit"),
    "a missing file's commit": (missing_with_commit, 3, "is about another commit"),
    "an endless file": (endless_file, 3, "has more than the"),
    "a short file": (short_file, 5, "the hub did not answer"),
}


@pytest.fixture
def hub() -> Iterator[type[OddHub]]:
    handler = type("ThisHub", (OddHub,), {"folder": SOUND / "hf", "asked": [], "sent": 0})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    yield handler
    server.shutdown()
    server.server_close()


def ckptkit(hub: Any, tmp_path: Path, *arguments: str) -> Ended:
    (said := tmp_path / "said").mkdir()
    return run_bounded(said, *arguments, environment=variables_of(hub, tmp_path))


def refused(hub: Any, tmp_path: Path, code: int, message: str, *options: str) -> None:
    result = ckptkit(hub, tmp_path, "convert", REPOSITORY, str(tmp_path / "out"), "--to", "torch", *options)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.code == code, result.stderr[-600:]
    assert len(lines) == 1 and message in lines[0] and "Traceback" not in result.stderr, result.stderr[-600:]
    assert len(lines[0]) < 600
    outside = [file for file in files_of(tmp_path) if not file.startswith(("cache/", "said/"))]
    assert outside == []


@pytest.mark.parametrize("name", ODD)
def test_odd_answers(hub: Any, tmp_path: Path, name: str) -> None:
    odd, code, message = ODD[name]
    hub.odd = odd
    refused(hub, tmp_path, code, message, "--dry-run")


@pytest.mark.parametrize("name", WHILE_FETCHING)
def test_odd_answers_about_files(hub: Any, tmp_path: Path, name: str) -> None:
    odd, code, message = WHILE_FETCHING[name]
    hub.odd = odd
    refused(hub, tmp_path, code, message)


def test_an_index_that_names_files_above(hub: Any, tmp_path: Path) -> None:
    def odd(hub: OddHub, path: str) -> bool:
        if path.startswith("/api/"):
            about = hub.info()
            about["siblings"] = [{"rfilename": n, "size": 100} for n in ("model.safetensors.index.json", "../x.bin")]
            return (hub.send(200, json.dumps(about).encode()), True)[1]
        return (hub.send(200, json.dumps({"weight_map": {"a": "../x.bin"}}).encode().ljust(100)), True)[1]

    hub.odd = odd
    refused(hub, tmp_path, 3, "a file outside its folder (../x.bin)", "--dry-run")


def test_a_sound_hub_is_believed(hub: Any, tmp_path: Path) -> None:
    hub.odd = lambda hub, path: False
    result = ckptkit(hub, tmp_path, "convert", REPOSITORY, str(tmp_path / "out"), "--to", "hf")
    assert result.code == 0, result.stderr
    assert files_of(tmp_path / "out") == files_of(SOUND / "hf")


@pytest.mark.parametrize("reference", ["out/model", "some--org/model", "a..b/c", REPOSITORY])
def test_a_missing_folder_is_named_before_the_hub_is_blamed(hub: Any, tmp_path: Path, reference: str) -> None:
    """A path with one slash looks like a model of the hub."""
    hub.url = "http://127.0.0.1:9"
    result = ckptkit(hub, tmp_path, "inspect", reference)
    assert result.code in (3, 5)
    assert result.stderr.startswith(f"error: {reference}: no such local path, and the hub did not answer")
