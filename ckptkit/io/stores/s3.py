"""Reading from S3 and what speaks like it: botocore finds credentials and lists, obstore reads ranges."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from ckptkit.errors import CkptkitError, InputError
from ckptkit.io.stores.address import Address
from ckptkit.io.stores.answers import meaning, one_line_errors
from ckptkit.io.stores.objects import MOST_OBJECTS, Object, checked, nanoseconds
from ckptkit.io.stores.ranged import CLIENT, RETRIES, read_range
from ckptkit.io.stores.session import session_and_client

_ASKED_AGAIN = timedelta(minutes=5)


class S3:
    """A folder of a bucket."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._lock = threading.Lock()
        with one_line_errors(address):
            self._session, self._client = _with_credentials()
            self._provider = _Provider(self._session.get_credentials())
            self._store: Any = self._new_store()

    def list(self) -> list[Object]:
        """All files of the folder as they are now; errors as `Store` has them."""
        with one_line_errors(self.address):
            files = checked(self._listed(), self.address)
        if not files:
            raise InputError("no such folder: nothing has this prefix", where=self.address, hint="check the name")
        return files

    def read(self, file: Object, start: int, view: memoryview) -> int:
        """Fills `view`, see `Store`."""
        where = f"{self.address}/{file.name}"
        try:
            return read_range(self._current, self.address.key(file.name), file, start, view, where)
        except CkptkitError:
            if self._provider.failure is not None:  # obstore's own error does not say that it was this
                raise meaning(self._provider.failure, where) from None
            raise

    def _listed(self) -> Iterator[Object]:
        prefix = f"{self.address.prefix}/"
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.address.place, Prefix=prefix)
        count = 0
        for page in pages:
            for item in page.get("Contents", ()):
                key, size = item.get("Key"), item.get("Size")
                if not isinstance(key, str) or not key.startswith(prefix) or type(size) is not int:
                    raise InputError("the store lists what was not asked for", where=self.address)
                yield Object(key[len(prefix) :], size, item.get("ETag", ""), nanoseconds(item.get("LastModified")))
                count += 1
                if count > 2 * MOST_OBJECTS:  # names that count for nothing, and an end that never comes
                    raise InputError(f"more than {2 * MOST_OBJECTS:,} keys are below it", where=self.address)

    def _current(self, new: bool) -> Any:
        with self._lock:
            if new:
                self._session, self._client = _with_credentials()
                self._provider = _Provider(self._session.get_credentials())
                self._store = self._new_store()
            return self._store

    def _new_store(self) -> Any:
        from obstore.store import S3Store

        endpoint = self._client.meta.endpoint_url
        make: Any = S3Store  # its types cannot be named where it is not installed
        return make(
            self.address.place,
            config={
                "endpoint": endpoint,
                "region": self._client.meta.region_name,
                "virtual_hosted_style_request": False,
            },
            # A plain connection only where the user's own variable or profile names one.
            client_options={**CLIENT, "allow_http": endpoint.startswith("http://")},
            retry_config=RETRIES,
            credential_provider=self._provider,
        )


class _Provider:
    """botocore's credentials for obstore; botocore renews those that end.

    Attributes:
        failure: Why there are none now, if so.
    """

    def __init__(self, credentials: Any) -> None:
        self._credentials = credentials
        self.failure: Exception | None = None

    def __call__(self) -> dict[str, Any]:
        try:
            frozen = self._credentials.get_frozen_credentials()
        except Exception as error:
            self.failure = error
            raise
        self.failure = None
        ends = hasattr(self._credentials, "refresh_needed")
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + _ASKED_AGAIN if ends else None,
        }


def _with_credentials() -> tuple[Any, Any]:
    """A session of botocore that has credentials, and a client.

    Raises:
        BotoCoreError: There are no credentials, or they cannot be had.
    """
    from botocore.exceptions import NoCredentialsError

    session, client = session_and_client()
    credentials = session.get_credentials()
    if credentials is None:
        raise NoCredentialsError
    credentials.get_frozen_credentials()
    return session, client
