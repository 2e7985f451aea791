"""Large descriptions that repeat themselves: kept compressed, and read like any bytes that are made when wanted."""

from __future__ import annotations

import hashlib
import zlib

_BLOCK = 1 << 20


class Deflated:
    """Bytes that are appended, and then read (see `ckptkit.tensors.Made`). Blocks are compressed each by itself.

    Attributes:
        files: The files that they are made from: none.
    """

    files: tuple[str, ...] = ()

    def __init__(self) -> None:
        """Starts empty."""
        self._blocks: list[bytes] = []
        self._tail = bytearray()
        self._hash = hashlib.sha256()

    def append(self, data: bytes) -> None:
        """Adds bytes at the end."""
        self._hash.update(data)
        self._tail += data
        while len(self._tail) >= _BLOCK:
            self._blocks.append(zlib.compress(self._tail[:_BLOCK], 1))
            del self._tail[:_BLOCK]

    @property
    def digest(self) -> str:
        """SHA-256 in hexadecimal."""
        return self._hash.hexdigest()

    def __len__(self) -> int:
        return len(self._blocks) * _BLOCK + len(self._tail)

    def content(self) -> bytes | Deflated:
        """The bytes: as they are, if they are few."""
        return self if self._blocks else bytes(self._tail)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes `start:stop`."""
        first, last = start // _BLOCK, -(-stop // _BLOCK)
        blocks = [zlib.decompress(block) for block in self._blocks[first:last]]
        if last > len(self._blocks):
            blocks.append(bytes(self._tail))
        begin = start - min(first, len(self._blocks)) * _BLOCK
        return b"".join(blocks)[begin : begin + stop - start]
