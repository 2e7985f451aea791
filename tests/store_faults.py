"""A proxy on loopback in front of a store, which can answer badly."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

from tests.loopback import answering


@dataclass(frozen=True)
class Asked:
    """A request, and how many of its kind came before.

    Attributes:
        method: `GET`, `HEAD`, `PUT`, ...
        path: Path and query.
        ranged: Whether it asks for a range.
        number: From 0 on, among requests that ask for a range, or among the others.
    """

    method: str
    path: str
    ranged: bool
    number: int


Fault = Callable[[Asked], str | None]
"""What is wrong with the answer: `status CODE NAME`, `short`, `reset`, `whole`, `slow SECONDS`; None for nothing."""


def nothing(asked: Asked) -> str | None:
    return None


@dataclass
class Proxy:
    """A running proxy.

    Attributes:
        url: Its address.
        fault: What it does wrong.
        asked: The requests so far.
    """

    url: str
    fault: Fault = nothing
    asked: list[Asked] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def ranged(self) -> int:
        """Requests for ranges so far."""
        return sum(asked.ranged for asked in self.asked)

    def note(self, method: str, path: str, ranged: bool) -> Asked:
        with self.lock:
            number = sum(asked.ranged == ranged for asked in self.asked)
            self.asked.append(Asked(method, path, ranged, number))
            return self.asked[-1]


@contextmanager
def before(url: str) -> Iterator[Proxy]:
    """A proxy in front of the store at `url`."""
    place = urlsplit(url).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            asked = proxy.note(self.command, self.path, "Range" in self.headers)
            what, _, rest = (proxy.fault(asked) or "").partition(" ")
            if what == "status":
                code, _, name = rest.partition(" ")
                self.give(int(code), {}, f"<Error><Code>{name}</Code><Message>no</Message></Error>".encode())
                return
            if what == "slow":
                time.sleep(float(rest))
            headers = {key: value for key, value in self.headers.items() if key.lower() != "connection"}
            if what == "whole":
                headers.pop("range", headers.pop("Range", None))
            there = http.client.HTTPConnection(place, timeout=20)
            there.request(self.command, self.path, body, headers)
            got = there.getresponse()
            data = got.read()
            there.close()
            kept = {key: value for key, value in got.getheaders() if key.lower() not in _OF_CONNECTION}
            self.give(got.status, kept, data, what, got.getheader("Content-Length"))

        def give(
            self, status: int, headers: dict[str, str], data: bytes, what: str = "", length: str | None = None
        ) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            head = self.command == "HEAD"
            self.send_header("Content-Length", length or "0" if head else str(len(data)))
            self.end_headers()
            if head:
                return
            if what in ("short", "reset"):
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                if what == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()
                return
            self.wfile.write(data)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    with answering(Handler) as port:
        proxy = Proxy(f"http://127.0.0.1:{port}")
        yield proxy


_OF_CONNECTION = {"connection", "content-length", "transfer-encoding", "keep-alive", "date", "server"}
