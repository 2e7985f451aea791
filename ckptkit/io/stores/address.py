"""Where a model is in a store: `s3://bucket/prefix`, or for reading `https://host/folder`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ckptkit.errors import UnsupportedError, UsageError
from ckptkit.printable import printable

S3, HTTPS = "s3", "https"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/{1,2}")
_LONGEST = 1024
"""Bytes of the longest key of S3."""
_ELSEWHERE = {"gs", "gcs", "az", "azure", "abfs", "abfss", "hf", "hub", "r2", "oss", "cos", "file", "hdfs", "http"}


@dataclass(frozen=True)
class Address:
    """A folder in a store.

    Attributes:
        scheme: `s3` or `https`.
        place: The bucket, or the host with its port.
        prefix: The folder in it, without slashes at either end; may be empty for `https`.
    """

    scheme: str
    place: str
    prefix: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.place}/{self.prefix}".rstrip("/")

    def key(self, name: str) -> str:
        """The key, or the path on the host, of a file of the folder.

        Args:
            name: Its name inside the folder, with `/` between the parts.
        """
        return f"{self.prefix}/{name}" if self.prefix else name

    def beside(self, kind: str) -> str:
        """The key of something hidden beside the folder that belongs to it."""
        folder, slash, name = self.prefix.rpartition("/")
        return f"{folder}{slash}.{name}.{kind}"

    def below(self, name: str) -> Address:
        """A folder inside this one."""
        return Address(self.scheme, self.place, self.key(name.strip("/")))


def is_address(text: str | Path) -> bool:
    """Whether `text` names a place in a store, well or badly; a `Path` has lost one of the two slashes."""
    match = _SCHEME.match(str(text))
    return match is not None and (match[1].lower() in {S3, HTTPS, *_ELSEWHERE} or "://" in str(text))


def parse(text: str | Path) -> Address:
    """The address that `text` is.

    Raises:
        UsageError: It names no bucket or no folder, or holds what no name may hold.
        UnsupportedError: A store of another kind.
    """
    words = str(text)
    match = _SCHEME.match(words)
    scheme = match[1].lower() if match else ""
    if match is None or scheme not in (S3, HTTPS):
        hint = "s3://BUCKET/PREFIX is read and written, https://HOST/FOLDER is read; copy other stores to a disk first"
        raise UnsupportedError("no store that ckptkit knows", where=_shown(words), hint=hint)
    place, _, rest = words[match.end() :].partition("/")
    if "@" in place:
        hint = "put credentials where the store's own tools look for them, not into the address"
        raise UsageError("an address must not hold credentials", where=f"{scheme}://…@…", hint=hint)
    if any(mark in words for mark in "?#") or not words.isprintable():
        hint = "leave out queries, fragments and control characters"
        raise UsageError("no plain address", where=_shown(words), hint=hint)
    prefix = rest.strip("/")
    parts = prefix.split("/") if prefix else []
    if any(part in ("", ".", "..") for part in parts) or len(prefix.encode()) > _LONGEST or "\\" in prefix:
        raise UsageError("no name of a folder in a store", where=_shown(words), hint="remove '.', '..' and '//'")
    if scheme == S3:
        if not _BUCKET.fullmatch(place):
            raise UsageError("names no bucket", where=_shown(words), hint="write s3://BUCKET/PREFIX")
        if not prefix:
            hint = "name a folder in the bucket: s3://BUCKET/PREFIX"
            raise UsageError("a whole bucket is no checkpoint", where=_shown(words), hint=hint)
    elif not _is_host(place):
        raise UsageError("names no host", where=_shown(words), hint="write https://HOST/FOLDER")
    return Address(scheme, place, prefix)


def refuse_address(out: str | Path, why: str) -> None:
    """Refuses a destination in a store, for what needs a directory.

    Args:
        out: The destination.
        why: What a store cannot do.

    Raises:
        UsageError: `out` is an address.
    """
    if is_address(out):
        hint = "write to a directory, and copy it to the store with the store's own tool"
        raise UsageError(f"this command writes to a disk only: {why}", where=_shown(str(out)), hint=hint)


def _is_host(place: str) -> bool:
    try:
        parts = urlsplit(f"//{place}")
        return bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False


def _shown(words: str) -> str:
    """An address for a message: without what may be a password or a signature."""
    return printable(re.sub(r"//[^/]*@", "//…@", words.partition("?")[0]))
