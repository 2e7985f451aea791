"""A web server on loopback with TLS that serves a folder, by ranges or not."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote

from tests.loopback import answering


@dataclass
class Web:
    """A running server.

    Attributes:
        url: Its address.
        certificate: File with the certificate to trust.
        ranges: Whether it gives ranges.
        tags: Whether it gives ETags.
        missing: What it says of what is not there.
        asked: (method, path) of the requests so far.
    """

    url: str
    certificate: Path
    ranges: bool = True
    tags: bool = True
    missing: int = 404
    asked: list[tuple[str, str]] = field(default_factory=list)


def certificate_in(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    certificate, secret = folder / "cert.pem", folder / "key.pem"
    certificate.write_bytes(built.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    secret.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, plain)
    )
    return certificate, secret


@contextmanager
def serving(folder: Path, place: Path) -> Iterator[Web]:
    """Serves `folder`; the certificate is made in `place`."""
    certificate, secret = certificate_in(place)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            web.asked.append((self.command, self.path))
            file = folder / unquote(self.path).lstrip("/")
            data = file.read_bytes() if file.is_file() else b""
            tag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
            if not file.is_file():
                self.give(web.missing, {}, b"")
                return
            headers = {"ETag": tag} if web.tags else {}
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if self.headers.get("If-Match", tag) != tag:
                self.give(412, headers, b"")
            elif match and web.ranges:
                start, end = int(match[1]), int(match[2])
                headers["Content-Range"] = f"bytes {start}-{min(end, len(data) - 1)}/{len(data)}"
                self.give(206, headers, data[start : end + 1])
            else:
                self.give(200, headers, data)

        do_HEAD = do_GET

        def give(self, status: int, headers: dict[str, str], data: bytes) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, secret)
    with answering(Handler, context) as port:
        web = Web(f"https://127.0.0.1:{port}", certificate)
        yield web
