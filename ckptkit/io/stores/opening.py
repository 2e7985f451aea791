"""From an address to a store."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from ckptkit.errors import UnsupportedError, UsageError
from ckptkit.io.stores.address import S3 as S3_SCHEME
from ckptkit.io.stores.address import Address, is_address, parse
from ckptkit.io.stores.objects import Store


def store_at(address: Address) -> Store:
    """The store that an address is in.

    Raises:
        UnsupportedError: The packages for stores are not installed.
        InputError: There is no such bucket or folder.
        StorageError: No credentials, or the store cannot be reached.
    """
    if not all(find_spec(module) for module in ("botocore", "obstore")):
        what = "reading from a store takes packages that are not installed"
        raise UnsupportedError(what, where=address, hint="pip install 'ckptkit-megatron[stores]'")
    if address.scheme == S3_SCHEME:
        from ckptkit.io.stores.s3 import S3

        return S3(address)
    from ckptkit.io.stores.web import Web

    return Web(address)


def must_be_on_disk(path: str | Path) -> None:
    """Refuses an address where only a file or folder of this disk is read.

    Raises:
        UsageError: It is one.
    """
    if is_address(path):
        hint = "copy it to a disk first"
        raise UsageError("only checkpoints are read from a store", where=parse(path), hint=hint)
