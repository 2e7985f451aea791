"""A server that speaks S3 on loopback, for tests: moto's, in a thread of this process."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BUCKET = "models"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "hidden-secret", "AWS_DEFAULT_REGION": "us-east-1"}


class Server:
    """A running server with one bucket.

    Attributes:
        url: Its address.
        environment: The variables by which programs find it.
        client: botocore's client for it.
    """

    def __init__(self, url: str) -> None:
        import botocore.session

        self.url = url
        self.environment = {"AWS_ENDPOINT_URL": url, "AWS_EC2_METADATA_DISABLED": "true", **CREDENTIALS}
        self.client: Any = botocore.session.Session().create_client(
            "s3",
            endpoint_url=url,
            region_name=CREDENTIALS["AWS_DEFAULT_REGION"],
            aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        )
        self.client.create_bucket(Bucket=BUCKET)

    def upload(self, folder: Path, prefix: str) -> str:
        """Puts a folder into the bucket and gives its address."""
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                key = f"{prefix}/{file.relative_to(folder).as_posix()}"
                self.client.put_object(Bucket=BUCKET, Key=key, Body=file.read_bytes())
        return f"s3://{BUCKET}/{prefix}"

    def keys(self, prefix: str) -> list[str]:
        """Names below a prefix, relative to it."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/")
        return [item["Key"].removeprefix(f"{prefix}/") for page in pages for item in page.get("Contents", ())]

    def contents(self, prefix: str) -> Mapping[str, bytes]:
        """Bytes by name below a prefix."""
        get = self.client.get_object
        return {name: get(Bucket=BUCKET, Key=f"{prefix}/{name}")["Body"].read() for name in self.keys(prefix)}

    def uploads(self, prefix: str = "") -> list[str]:
        """Keys of multipart uploads that are neither complete nor aborted."""
        return [item["Key"] for item in self._uploads(prefix)]

    def parts(self, prefix: str = "") -> int:
        """Parts of the uploads that are neither complete nor aborted."""
        ask = self.client.list_parts
        lists = [ask(Bucket=BUCKET, Key=item["Key"], UploadId=item["UploadId"]) for item in self._uploads(prefix)]
        return sum(len(one.get("Parts", ())) for one in lists)

    def _uploads(self, prefix: str) -> list[Any]:
        found = self.client.list_multipart_uploads(Bucket=BUCKET, Prefix=prefix)
        return list(found.get("Uploads", ()))


@contextmanager
def running() -> Iterator[Server]:
    """A server of its own; its objects are gone with it."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield Server(f"http://{host}:{port}")
    finally:
        server.stop()


@contextmanager
def found_by_environment() -> Iterator[Server]:
    """A server of its own that this process and its children find by their environment."""
    with running() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(name="s3")
def s3_fixture() -> Iterator[Server]:
    """As `found_by_environment`."""
    with found_by_environment() as server:
        yield server
