"""Reading ranges of files through obstore: tried again a bounded number of times, and every answer checked."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from ckptkit.errors import CkptkitError, StorageError
from ckptkit.io.stores.answers import EXPIRED, changed, code_of, meaning
from ckptkit.io.stores.objects import Object

_PART = 1 << 20

RETRIES: dict[str, Any] = {
    "max_retries": 5,
    "retry_timeout": timedelta(seconds=60),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2},
}
"""How often obstore asks again after a 429, a 5xx or a lost connection; of a body that is cut off, for the rest."""

CLIENT: dict[str, Any] = {
    "timeout": timedelta(seconds=60),
    "connect_timeout": timedelta(seconds=10),
    "user_agent": "ckptkit",
}


class ShortBodyError(Exception):
    """An answer has fewer or more bytes than were asked for."""


def read_range(
    store: Callable[[bool], Any], key: str, file: Object, start: int, view: memoryview, where: object
) -> int:
    """Fills `view` with bytes of one version of a file, and gives the number of requests.

    Args:
        store: Gives obstore's store; with True a new one, whose credentials are asked for again.
        key: The file's name in that store.
        file: What is known of the file.
        start: The first byte.
        view: Where the bytes go.
        where: The file, for messages.

    Raises:
        InputError: The file is gone, or has changed.
        StorageError: The store does not answer, or not with this.
    """
    try:
        _read(store(False), key, file, start, view, where)
        return 1
    except CkptkitError:
        raise
    except Exception as error:
        if not isinstance(error, ShortBodyError) and code_of(error) not in EXPIRED:
            raise meaning(error, where) from None
        expired = not isinstance(error, ShortBodyError)
    try:
        _read(store(expired), key, file, start, view, where)
        return 2
    except CkptkitError:
        raise
    except ShortBodyError:
        hint = "try again, or check what is between here and the store"
        raise StorageError("the store's answers are cut short", where=where, hint=hint) from None
    except Exception as error:
        raise meaning(error, where) from None


def _read(store: Any, key: str, file: Object, start: int, view: memoryview, where: object) -> None:
    import obstore

    options: dict[str, Any] = {"range": (start, start + len(view))}
    if file.etag and not file.etag.startswith("W/"):  # a weak one never matches; what comes is compared below
        options["if_match"] = file.etag
    get: Any = obstore.get
    answer = get(store, key, options=options)
    meta = answer.meta
    if (file.etag and meta["e_tag"] != file.etag) or meta["size"] != file.size:
        raise changed(where)
    if not file.etag and file.modified and int(meta["last_modified"].timestamp()) * 10**9 != file.modified:
        raise changed(where)
    if tuple(answer.range) != (start, start + len(view)):
        raise ShortBodyError
    at = 0
    for part in answer.stream(min_chunk_size=_PART):
        size = len(part)
        if at + size > len(view):
            raise ShortBodyError
        view[at : at + size] = memoryview(part)
        at += size
    if at != len(view):
        raise ShortBodyError
