"""What is written down before its size is known: a file without a name, beside the output.

A plan says where every byte of its output goes. The coded tiles of a tensor have no size until they are made, so they
wait here. The file has no name: whatever ends the run, nothing of it stays.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from ckptkit.dtypes import DTYPES
from ckptkit.errors import StorageError
from ckptkit.io import faults
from ckptkit.io.system import nothing_written, storage_error
from ckptkit.tensors import Tensor


class Spool:
    """A nameless file to which any thread appends."""

    def __init__(self, folder: Path) -> None:
        """Creates it.

        Args:
            folder: A folder in the file system where the output will be.

        Raises:
            StorageError: It cannot be created there.
        """
        self._folder = folder
        self._lock = threading.Lock()
        self._end = 0
        self._pwrite, _ = faults.writer()
        try:
            self._file = tempfile.TemporaryFile(dir=folder, prefix=".ckptkit-", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise storage_error(error, folder) from error

    def append(self, data: bytes) -> Tensor:
        """Keeps some bytes, and gives them as a tensor.

        Raises:
            StorageError: The disk is full or answers with an error.
        """
        with self._lock:
            start, self._end = self._end, self._end + len(data)
        view, at = memoryview(data), start
        while view:
            try:
                count = self._pwrite(self._file.fileno(), view, at)
            except OSError as error:
                raise storage_error(error, self._folder) from error
            if not count:
                raise nothing_written(self._folder)
            view, at = view[count:], at + count
        kept = _Spooled(self, start, len(data), hashlib.sha256(data).hexdigest())
        return Tensor.from_bytes(kept, DTYPES["U8"], (1, len(data)))

    def read(self, start: int, size: int) -> bytes:
        """Some of its bytes.

        Raises:
            StorageError: They cannot be read.
        """
        found = bytearray()
        while len(found) < size:
            try:
                piece = os.pread(self._file.fileno(), size - len(found), start + len(found))
            except OSError as error:
                raise storage_error(error, self._folder) from error
            if not piece:
                raise StorageError("a temporary file ends early", where=self._folder)
            found += piece
        return bytes(found)

    def close(self) -> None:
        """Closes it, which removes it."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, eq=False)
class _Spooled:
    """Bytes of a spool, as `ckptkit.tensors.Made` asks for them."""

    spool: Spool = field(repr=False)
    start: int
    size: int
    digest: str

    @property
    def files(self) -> tuple[str, ...]:
        """They are made from no file with a name."""
        return ()

    def __len__(self) -> int:
        return self.size

    def read(self, start: int, stop: int) -> bytes:
        """Bytes `start:stop`."""
        return self.spool.read(self.start + start, stop - start)
