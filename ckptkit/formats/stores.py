"""Checkpoints in stores: their files, and a folder of this disk that stands for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ckptkit.formats.web_files import find_files
from ckptkit.io.stores.address import parse
from ckptkit.io.stores.mirror import mirror_of
from ckptkit.io.stores.opening import store_at
from ckptkit.io.stores.web import Web


@contextmanager
def mirrored_folder(text: str | Path) -> Iterator[Path]:
    """A folder that stands for a folder of a store, as long as the context lives; bytes are fetched as they are read.

    Args:
        text: `s3://bucket/prefix` or `https://host/folder`.

    Raises:
        UsageError: It is no address.
        InputError: There is no such folder, or its names cannot be those of files.
        StorageError: The store does not answer, or does not allow it.
        UnsupportedError: Another store, or the packages for stores are missing.
    """
    store = store_at(parse(text))
    files = find_files(store) if isinstance(store, Web) else store.list()
    with mirror_of(store, files) as mirror:
        yield mirror.folder
