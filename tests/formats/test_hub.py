"""Hub references against a hub on this machine: what is asked for, what comes out, and how refusals read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.models import files_of, save_llama

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "some-org/tiny-llama"


class Hub(BaseHTTPRequestHandler):
    """Serves one model at one commit, as `main` and `v1`; `some-org/gated` is gated."""

    folder: Path
    asked: list[tuple[str, str, str | None]]
    sent: int

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.split("?")[0]
        type(self).asked.append((self.command, path, self.headers.get("Range")))
        if "/gated" in path:
            return self.send(403, b"gated", {"X-Error-Code": "GatedRepo"})
        if REPOSITORY not in path:
            return self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
        if "/nowhere" in path:
            return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if path.startswith("/api/"):
            return self.send(200, json.dumps(self.tree() if "/tree/" in path else self.info()).encode())
        name = path.split("/resolve/", 1)[1].split("/", 1)[1]
        self.send_file(self.folder / name)

    def entries(self) -> list[tuple[str, int]]:
        files = [f for f in sorted(self.folder.rglob("*")) if f.is_file()]
        return [(f.relative_to(self.folder).as_posix(), f.stat().st_size) for f in files]

    def info(self) -> dict[str, Any]:
        siblings = [{"rfilename": name, "size": size, "blobId": f"{size:040x}"} for name, size in self.entries()]
        return {"id": REPOSITORY, "sha": COMMIT, "siblings": siblings, "private": False, "gated": False, "tags": []}

    def tree(self) -> list[dict[str, Any]]:
        return [{"type": "file", "path": n, "size": s, "oid": f"{s:040x}"} for n, s in self.entries()]

    def send_file(self, file: Path) -> None:
        if not file.is_file():
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = file.read_bytes()
        headers = {"ETag": f'"{hash(file) & (2**160 - 1):040x}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if asked := self.headers.get("Range"):
            start, _, stop = asked.removeprefix("bytes=").partition("-")
            part = data[int(start) : int(stop) + 1 if stop else len(data)]
            headers["Content-Range"] = f"bytes {start}-{int(start) + len(part) - 1}/{len(data)}"
            return self.send(206, part, headers)
        self.send(200, data, headers)

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
            type(self).sent += len(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keeps the tests quiet."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_llama(tmp_path_factory.mktemp("hub") / "model", shard="400KB", intermediate_size=1440)
    (path / "original").mkdir()
    (path / "original" / "consolidated.00.pth").write_bytes(bytes(100_000))
    return path


@pytest.fixture
def hub(model: Path) -> Iterator[type[Hub]]:
    handler = type("ThisHub", (Hub,), {"folder": model, "asked": [], "sent": 0})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    yield handler
    server.shutdown()
    server.server_close()


PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")


def variables_of(hub: Any, tmp_path: Path) -> dict[str, str | None]:
    """The environment in which the command asks this hub; None removes a variable."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache")}
    return {**settings, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", **dict.fromkeys(PROXIES)}


def ckptkit(hub: Any, tmp_path: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    changes = variables_of(hub, tmp_path)
    environment = {name: value for name, value in {**os.environ, **changes}.items() if value is not None}
    command = [sys.executable, "-m", "ckptkit", *arguments]
    return subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True, timeout=120)


def test_dry_run_reads_headers_only(hub: Any, model: Path, tmp_path: Path) -> None:
    result = ckptkit(hub, tmp_path, "convert", f"{REPOSITORY}@v1", "out", "--to", "torch", "--dry-run", "--json")
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["source"]["origin"] == {"repository": REPOSITORY, "revision": COMMIT}
    local = ckptkit(hub, tmp_path, "convert", str(model), str(tmp_path / "out"), "--to", "hf", "--dry-run", "--json")
    assert local.returncode == 0
    weights = sum(f.stat().st_size for f in model.glob("*.safetensors"))
    assert hub.sent < weights / 2
    assert not any("consolidated" in path for _, path, _ in hub.asked)
    assert all(asked for method, path, asked in hub.asked if method == "GET" and path.endswith(".safetensors"))


def test_a_plan_needs_safetensors(hub: Any, model: Path, tmp_path: Path) -> None:
    import torch

    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_bytes((model / "config.json").read_bytes())
    torch.save({"lm_head.weight": torch.zeros(2)}, tmp_path / "old" / "pytorch_model.bin")
    hub.folder = tmp_path / "old"
    result = ckptkit(hub, tmp_path, "convert", REPOSITORY, "out", "--to", "torch", "--dry-run")
    assert result.returncode == 4 and "this model is in pytorch_model*.bin" in result.stderr


def test_conversion_fetches_what_it_needs(hub: Any, model: Path, tmp_path: Path) -> None:
    result = ckptkit(hub, tmp_path, "convert", REPOSITORY, str(tmp_path / "meg"), "--to", "torch", "--tp", "2")
    assert result.returncode == 0, result.stderr
    manifest = json.loads((tmp_path / "meg" / "ckptkit" / "manifest.json").read_text())
    assert manifest["origin"] == {"repository": REPOSITORY, "revision": COMMIT}
    assert not any("consolidated" in path for _, path, _ in hub.asked)
    back = ckptkit(hub, tmp_path, "convert", str(tmp_path / "meg"), str(tmp_path / "back"), "--to", "hf")
    assert back.returncode == 0, back.stderr
    expected = {name: data for name, data in files_of(model).items() if not name.endswith(".pth")}
    assert files_of(tmp_path / "back") == expected


def test_a_local_path_wins(hub: Any, model: Path, tmp_path: Path) -> None:
    (tmp_path / "some-org").mkdir()
    (tmp_path / REPOSITORY).symlink_to(model)
    command = [sys.executable, "-m", "ckptkit", "inspect", REPOSITORY]
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "PYTHONPATH": os.getcwd()}
    assert subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True).returncode == 0
    assert not hub.asked


@pytest.mark.parametrize(
    ("reference", "variables", "code", "message"),
    [
        ("some-org/gated", {}, 3, "the model is gated; accept its terms"),
        ("some-org/absent", {}, 3, "no such local path and no such model on the hub"),
        (f"{REPOSITORY}@nowhere", {}, 3, "no such revision"),
        (REPOSITORY, {"HF_HUB_OFFLINE": "1"}, 5, "the hub is switched off (HF_HUB_OFFLINE)"),
        (REPOSITORY, {"HF_ENDPOINT": "http://127.0.0.1:9"}, 5, "the hub did not answer"),
    ],
)
def test_refusals_are_one_line(
    hub: Any, tmp_path: Path, reference: str, variables: dict[str, str], code: int, message: str
) -> None:
    result = ckptkit(hub, tmp_path, "convert", reference, str(tmp_path / "out"), "--to", "hf", **variables)
    assert (result.returncode, len(result.stderr.strip().splitlines())) == (code, 1), result.stderr
    assert message in result.stderr
    assert not (tmp_path / "out").exists()
