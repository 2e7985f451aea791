"""Reading tensors as streams: whole, hashed, or compared; memory does not grow with the tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ckptkit.dtypes import DTYPES
from ckptkit.errors import InputError
from ckptkit.io.casts import convert
from ckptkit.io.crc import crc32
from ckptkit.io.gather import Gatherer
from ckptkit.io.plan import Comparison
from ckptkit.io.regular import open_regular
from ckptkit.io.schedule import Limits, tensor_units
from ckptkit.io.source import Sources
from ckptkit.io.stores.mirror import PIECE, MirroredFile, mirrored
from ckptkit.io.system import storage_error
from ckptkit.tensors import Region, Tensor

Bytes = NDArray[np.uint8]

_DEFAULT = Limits()


class TensorReader:
    """Reads tensors in one thread. Open files and buffers are reused from one tensor to the next.

    A reader gives one stream at a time; two tensors side by side take two readers.
    """

    def __init__(self, limits: Limits = _DEFAULT) -> None:
        self._limits = limits
        self._sources = Sources()
        self._gatherer = Gatherer(self._sources, limits.scratch)
        self._staging = np.empty(limits.staging, np.uint8)

    def chunks(self, tensor: Tensor) -> Iterator[Bytes]:
        """The row-major bytes of a tensor as written, in whole elements; a chunk is valid until the next is asked for.

        Raises:
            InputError: A source is gone or ends early.
            UnsupportedError: A cast that does not exist.
            StorageError: A source cannot be read.
        """
        for unit in tensor_units(tensor, self._limits):
            data = self._staging[: unit.size]
            self._gatherer.fill(unit.placements, data)
            yield data if unit.cast is None else convert(data, *unit.cast)

    def sha256(self, tensor: Tensor) -> str:
        """SHA-256 of the row-major bytes of a tensor as written, in hexadecimal; errors as `chunks`."""
        digest = hashlib.sha256()
        for chunk in self.chunks(tensor):
            digest.update(chunk.data)
        return digest.hexdigest()

    def crc32(self, file: Path, offset: int, size: int) -> int:
        """CRC-32 of `size` bytes of a file; errors as `chunks`."""
        value = 0
        for chunk in self.chunks(Tensor.from_file(str(file), offset, DTYPES["U8"], (1, size))):
            value = crc32(chunk.data, value)
        return value

    def close(self) -> None:
        """Closes every file."""
        self._sources.close()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_tensor(tensor: Tensor, *, limits: Limits = _DEFAULT, sources: Sources | None = None) -> Bytes:
    """The row-major bytes of a tensor as written: a new, writable, one-dimensional array.

    Args:
        tensor: The tensor.
        limits: Sizes of buffers.
        sources: Open files of this thread, to use and to leave open.

    Raises:
        InputError: A source is gone or ends early.
        UnsupportedError: A cast that does not exist.
        StorageError: A source cannot be read.
    """
    if sources is None:
        with Sources() as sources:
            return read_tensor(tensor, limits=limits, sources=sources)
    out = np.empty(tensor.nbytes, np.uint8)
    if (run := _one_run(tensor)) is not None:
        sources.read(run.file, out.data, run.offset)
    elif tensor.nbytes:
        gatherer = Gatherer(sources, limits.scratch)
        for unit in tensor_units(tensor, limits):
            start = unit.writes[0].offset
            if unit.cast is None:
                gatherer.fill(unit.placements, out[start : start + unit.size])
                continue
            staging = np.empty(unit.size, np.uint8)
            gatherer.fill(unit.placements, staging)
            data = convert(staging, *unit.cast)
            out[start : start + len(data)] = data
    return out


def _one_run(tensor: Tensor) -> Region | None:
    """The run of bytes of a file that a tensor is, if it is one: a plan for it would take longer than to read it."""
    if tensor.cast is not None or len(tensor.bands) != 1 or len(tensor.bands[0].pieces) != 1:
        return None
    piece = tensor.bands[0].pieces[0]
    return piece if isinstance(piece, Region) and piece.contiguous else None


def hash_tensor(tensor: Tensor) -> str:
    """SHA-256 of the row-major bytes of a tensor as written, streamed.

    Raises:
        InputError: A source is gone or ends early.
        UnsupportedError: A cast that does not exist.
        StorageError: A source cannot be read.
    """
    with TensorReader() as reader:
        return reader.sha256(tensor)


def hash_file(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        InputError: It is no regular file.
        StorageError: It cannot be read.
    """
    if (remote := mirrored(path)) is not None:
        return _hash_in_store(remote)
    try:
        with open(open_regular(path), "rb", buffering=0) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise storage_error(error, path) from error


def _hash_in_store(file: MirroredFile) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(PIECE, file.about.size)))
    for start in range(0, file.about.size, PIECE):
        view = buffer[: min(PIECE, file.about.size - start)]
        file.read_into(view, start)
        digest.update(view)
    return digest.hexdigest()


def compare(comparison: Comparison, *, limits: Limits = _DEFAULT) -> None:
    """Compares the bytes of two tensors, streamed.

    Raises:
        InputError: They differ (where, is said as the index of the first element in row-major order), or a
            source is gone or ends early.
        UnsupportedError: A cast that does not exist.
        StorageError: A source cannot be read.
    """
    if (how := difference(comparison.left, comparison.right, limits=limits)) is not None:
        hint = comparison.hint or "the checkpoint is inconsistent: repair or replace it"
        raise InputError(f"these should be equal, but {how}", where=comparison.what, hint=hint)


Pair = tuple[TensorReader, TensorReader]
"""What reads two tensors side by side."""


def difference(left: Tensor, right: Tensor, *, limits: Limits = _DEFAULT, readers: Pair | None = None) -> str | None:
    """How two tensors that should be equal are not, in words after "they"; None if they are.

    Args:
        left: One.
        right: The other.
        limits: Sizes of the buffers of new readers.
        readers: Readers to use instead.

    Raises:
        InputError: A source is gone or ends early.
        UnsupportedError: A cast that does not exist.
        StorageError: A source cannot be read.
    """
    if (left.shape, left.out_dtype) != (right.shape, right.out_dtype):
        return f"are {left.out_dtype}{list(left.shape)} and {right.out_dtype}{list(right.shape)}"
    byte = first_difference(left, right, limits=limits, readers=readers)
    if byte is None:
        return None
    return f"differ first at element {byte // left.out_dtype.itemsize} of {left.numel}"


def in_step(left: Iterator[Bytes], right: Iterator[Bytes]) -> Iterator[tuple[Bytes, Bytes]]:
    """Two streams in pairs of equal length, as long as both last; a pair is valid until the next is asked for."""
    a = b = np.empty(0, np.uint8)
    while True:
        if not len(a):
            a = next(left, a)
        if not len(b):
            b = next(right, b)
        size = min(len(a), len(b))
        if not size:
            return
        yield a[:size], b[:size]
        a, b = a[size:], b[size:]


def first_difference(
    left: Tensor, right: Tensor, *, limits: Limits = _DEFAULT, readers: Pair | None = None
) -> int | None:
    """The first of the row-major bytes, as written, at which two tensors of equal size differ; None if none does.

    Arguments and errors as `difference`.
    """
    if left.same_bytes_as(right):
        return None
    with ExitStack() as stack:
        first, second = readers or (stack.enter_context(TensorReader(limits)) for _ in range(2))
        position = 0
        for a, b in in_step(first.chunks(left), second.chunks(right)):
            if not np.array_equal(a, b):
                return position + int(np.argmax(a != b))
            position += len(a)
    return None
