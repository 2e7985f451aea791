"""The container of torch.distributed.checkpoint: `.metadata`, and the `.distcp` files that it points into.

`.metadata` is a pickle. For each key it has a dtype, a shape and chunks (offsets and sizes), or a mark that it is an
object. For each chunk and object it names the bytes of a `.distcp` file that hold it. The bytes of a chunk are an
archive of torch.save with one tensor. The bytes of an object depend on its writer: Megatron-Core uses such an archive,
too. This module gives keys no meaning.

Source: torch/distributed/checkpoint/metadata.py and filesystem.py of torch 2.13, and the files of torch 2.4 and later.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

from ckptkit.dtypes import DType
from ckptkit.errors import InputError, UnsupportedError
from ckptkit.formats.dcp.chunks import Box, ChunkError, check_inside, split_chunks
from ckptkit.formats.format import Archive
from ckptkit.formats.links import check_link
from ckptkit.formats.torch_file.pickles import Record, TorchDType, UnreadableTensor, loads, read_torch_file
from ckptkit.formats.torch_file.zipfiles import MAX_SMALL, is_archive, read_start
from ckptkit.io.regular import read_bounded
from ckptkit.io.stores.mirror import mirror_around, prepare
from ckptkit.tensors import MAX_AXES, Region, Tensor

METADATA = ".metadata"
MAX_STACKED = 500_000
"""The most layers and experts that one tensor may hold."""

_AGAIN = "fetch or copy it again"
_AROUND = 2 << 10
"""Bytes before and after the data of a chunk, in which the records of its archive are: usually half of that."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of a file beside `.metadata`. `encodings` names the transformations applied to them (compression)."""

    file: str
    offset: int
    length: int
    encodings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor, sizes in elements, and the place of its bytes."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    span: Span


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """The entry of a tensor in `.metadata`."""

    dtype: TorchDType
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class DcpFiles:
    """An opened checkpoint. A key is checked on first use, so a damaged optimizer state does no harm.

    Attributes:
        path: The folder with `.metadata`.
        tensors: Key -> entry of a tensor.
        objects: Key -> the bytes of an object.
    """

    def __init__(self, path: Path, tensors: dict[str, StoredTensor], objects: dict[str, Span]) -> None:
        self.path = path
        self.tensors = tensors
        self.objects = objects
        self._folder = _Folder(path)
        self._archives = _Archives()

    def expect(self, keys: Iterable[str]) -> None:
        """Says which tensors are read next: from a store the headers of their archives then come together.

        Raises:
            InputError: A file is missing or outside the folder.
            UnsupportedError: Its bytes are compressed.
        """
        if mirror_around(self.path) is None:
            return
        pieces: dict[Path, list[tuple[int, int]]] = defaultdict(list)
        for key in keys:
            for chunk in self.tensors[key].chunks:
                start, stop = chunk.span.offset, chunk.span.offset + chunk.span.length
                around = [(start, min(start + _AROUND, stop)), (max(start, stop - _AROUND), stop)]
                pieces[self._folder.file(key, chunk.span)] += around
        prepare(pieces)

    def tensor(self, key: str) -> Tensor:
        """A whole tensor, joined from its chunks; reads the headers of their archives.

        Raises:
            InputError: Chunks overlap, leave holes or the tensor, or their files are missing, damaged, cut short,
                outside the folder, or hold something else.
            UnsupportedError: Its element type has no equal here, or its bytes are compressed.
        """
        ((_, tensor),) = self.parts(key, 0)
        return tensor

    def parts(self, key: str, axes: int) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """The tensors that are stacked in one, for every index on its first `axes` axes.

        Raises:
            InputError: As `tensor`, or it has not so many axes.
            UnsupportedError: As `tensor`.
        """
        stored, where = self.tensors[key], self.path / METADATA
        dtype = stored.dtype.dtype
        if dtype is None:
            raise UnsupportedError(f"tensor {key} has elements of type {stored.dtype}", where=where)
        stack = stored.shape[:axes]
        if len(stack) < axes or 0 in stack:
            raise InputError(f"{key} is {list(stored.shape)}, not a stack of layers or experts", where=where)
        if prod(stack) > MAX_STACKED:
            raise InputError(f"{key} stacks {prod(stack):,} tensors, at most {MAX_STACKED:,} are read", where=where)
        if stack and not stored.chunks:
            raise InputError(f"tensor {key}: an empty stack", where=where)
        try:
            for chunk in stored.chunks:
                check_inside(stored.shape, chunk.offsets, chunk.sizes)
            boxes = [self._box(key, chunk, dtype) for chunk in stored.chunks]
            yield from split_chunks(dtype, stored.shape, boxes, axes)
        except ChunkError as error:
            raise InputError(f"tensor {key}: {error}", where=where) from None

    def object(self, key: str) -> object:
        """The content of an object, in the form of `read_torch_file`.

        Raises:
            InputError: Its file is missing, cut short, outside the folder, or no archive of torch.save.
            UnsupportedError: Its bytes are compressed.
        """
        span = self.objects[key]
        return read_torch_file(self._folder.file(key, span), span.offset, span.length)

    def object_bytes(self, key: str) -> bytes:
        """The bytes of an object as they are stored.

        Raises:
            InputError: Its file is missing, cut short, or outside the folder.
            UnsupportedError: Its bytes are compressed.
        """
        span = self.objects[key]
        return read_start(self._folder.file(key, span), span.offset, span.length, span.length)

    def spans(self) -> Iterator[tuple[Path, Span]]:
        """The bytes of every chunk and object, with the file that holds them.

        Raises:
            InputError: A file is missing or outside the folder.
            UnsupportedError: Its bytes are compressed.
        """
        for key, stored in self.tensors.items():
            for chunk in stored.chunks:
                yield self._folder.file(key, chunk.span), chunk.span
        for key, span in self.objects.items():
            yield self._folder.file(key, span), span

    def _box(self, key: str, chunk: Chunk, dtype: DType) -> Box:
        file = self._folder.file(key, chunk.span)
        tensor = self._archives.tensor(file, chunk.span, dtype, chunk.sizes)
        if isinstance(tensor, UnreadableTensor):
            raise tensor.error(key, file)
        if not isinstance(tensor, Tensor):
            raise InputError(f"holds no tensor where {METADATA} says {key} is", where=file, hint=_AGAIN)
        if (tensor.dtype, tensor.shape) != (dtype, chunk.sizes):
            raise InputError(
                f"holds {tensor.dtype}{list(tensor.shape)} where {METADATA} says {key} has {dtype}{list(chunk.sizes)}",
                where=file,
                hint=_AGAIN,
            )
        return Box(chunk.offsets, tensor)


class _Folder:
    """Finds files by the names in `.metadata`, which may lie."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Path] = {}

    def file(self, key: str, span: Span) -> Path:
        """The file of a span, which must be in the folder, links followed, or a blob of the hub's cache."""
        if span.encodings:
            raise UnsupportedError(
                f"{key} is stored through {', '.join(span.encodings)}",
                where=self._path / METADATA,
                hint="load it with torch.distributed.checkpoint and save it again without extensions",
            )
        if span.file not in self._known:
            self._known[span.file] = self._find(key, span.file)
        return self._known[span.file]

    def _find(self, key: str, name: str) -> Path:
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or not parts.parts or "\0" in name:
            raise InputError(f"{key} is to be read from outside the folder ({name!r})", where=self._path / METADATA)
        file = self._path / parts
        if not os.path.lexists(file):
            raise InputError(f"{key} is in {name}, which is missing", where=self._path, hint="fetch the missing file")
        check_link(file, self._path)
        return file


class _Archives:
    """Reads the archives of chunks, of which a checkpoint has tens of thousands.

    Archives of one writer with equal dtype, shape and length differ only in data and checksums. So one archive is read
    in full, and of the others only the bytes before the data (the pickle among them) and the last records are compared.
    """

    _END = 98  # the zip64 end record, its locator and the end record

    def __init__(self) -> None:
        self._known: dict[tuple[DType, tuple[int, ...], int], tuple[bytes, bytes]] = {}

    def tensor(self, file: Path, span: Span, dtype: DType, shape: tuple[int, ...]) -> object:
        """The content of the archive in a span; `dtype` and `shape` are the expected ones."""
        kind = (dtype, shape, span.length)
        if kind in self._known:
            head, end = self._known[kind]
            if self._read(file, span, len(head)) == (head, end):
                return Tensor.from_file(str(file), span.offset + len(head), dtype, shape)
        found = read_torch_file(file, span.offset, span.length)
        if kind not in self._known and isinstance(found, Tensor) and (found.dtype, found.shape) == (dtype, shape):
            start = _start_of(found)
            if start is not None:
                self._known[kind] = self._read(file, span, start - span.offset)
        return found

    def _read(self, file: Path, span: Span, size: int) -> tuple[bytes, bytes]:
        """The first `size` bytes and the last records."""
        end = span.offset + span.length - self._END
        return read_start(file, span.offset, span.length, size), read_start(file, end, self._END, self._END)


def _start_of(tensor: Tensor) -> int | None:
    """Where a tensor starts in its file, if its bytes follow one another."""
    runs = list(islice(tensor.runs(), 2)) if all(band.pieces[0].contiguous for band in tensor.bands) else []
    return runs[0].offset if len(runs) == 1 and isinstance(runs[0], Region) else None


def is_dcp(path: Path) -> bool:
    """Whether a folder holds the container."""
    return (path / METADATA).is_file()


def checks_of_dcp(folder: Path) -> Iterator[Callable[[], object]]:
    """A check for each tensor and each object; none without `.metadata`, which is missed when the rest is opened."""
    if not is_dcp(folder):
        return
    files = open_dcp(folder)
    for key in files.tensors:
        yield partial(files.tensor, key)
    for key in files.objects:
        yield partial(files.object_bytes, key)


def archives_of_dcp(folder: Path) -> Iterator[Archive]:
    """The small archives inside the `.distcp` files, and the files beside them."""
    if not is_dcp(folder):
        return
    for file, span in open_dcp(folder).spans():
        if is_archive(file, span.offset, span.length):
            yield Archive(file, span.offset, span.length)
    yield from map(Archive, sorted(folder.glob("*.pt")))


def open_dcp(path: Path) -> DcpFiles:
    """Opens a checkpoint; reads only `.metadata`, whose names stay names.

    Raises:
        InputError: It is missing, damaged, or names something that no checkpoint needs.
    """
    file = path / METADATA
    if not read_start(file, 0, None, 1):
        raise InputError("the file is empty", where=file, hint=_AGAIN)
    data = _read_pickle(file)
    state = _state(loads(data, file), file)
    described, stored = state.get("state_dict_metadata"), state.get("storage_data")
    if not isinstance(described, dict) or not isinstance(stored, dict):
        raise InputError("no metadata of torch.distributed.checkpoint", where=file)
    spans = _Spans(stored, file)
    files = DcpFiles(path, {}, {})
    for key, value in described.items():
        if not isinstance(key, str) or not isinstance(value, Record):
            raise _odd(file, f"an entry {key[:80]!r}" if isinstance(key, str) else "a key that is no name")
        if value.name == "TensorStorageMetadata":
            files.tensors[key] = _stored_tensor(key, value, spans, file)
        elif value.name == "BytesStorageMetadata":
            files.objects[key] = spans.find(key, None)
        else:
            raise _odd(file, f"{key} as a {value.name}")
    return files


def _read_pickle(file: Path) -> bytes:
    """The bytes of a pickle, as far as they start like one: a file may be large and hold nothing."""
    start = read_start(file, 0, None, 2)
    if start[:1] != b"\x80":
        raise InputError("not a pickle", where=file, hint=_AGAIN)
    return read_bounded(file, MAX_SMALL)


def _odd(file: Path, what: str) -> InputError:
    return InputError(f"describes {what}, which torch does not write", where=file)


def _state(value: object, file: Path) -> dict[Any, Any]:
    if not isinstance(value, Record) or not isinstance(value.state, dict):
        raise _odd(file, f"a {type(value).__name__} in place of an object")
    return value.state


def _integers(value: object, file: Path) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or len(value) > MAX_AXES or not all(map(_is_size, value)):
        raise _odd(file, f"sizes that are none (a {type(value).__name__})")
    return tuple(value)


def _is_size(item: object) -> bool:
    return type(item) is int and 0 <= item < 1 << 63


def _stored_tensor(key: str, record: Record, spans: _Spans, file: Path) -> StoredTensor:
    state = _state(record, file)
    properties = state.get("properties")
    parts = properties.state if isinstance(properties, Record) else None
    if isinstance(parts, dict):
        parts = (parts.get("dtype"),)
    if not isinstance(parts, tuple) or not parts or not isinstance(parts[0], TorchDType):
        raise _odd(file, f"{key} without an element type")
    listed = state.get("chunks")
    if not isinstance(listed, list):
        raise _odd(file, f"{key} without chunks")
    chunks = []
    for item in listed:
        chunk = _state(item, file)
        offsets = _integers(chunk.get("offsets"), file)
        sizes = _integers(chunk.get("sizes"), file)
        if prod(sizes):  # ranks that hold nothing of a tensor are described, but not always stored
            chunks.append(Chunk(offsets, sizes, spans.find(key, offsets)))
    return StoredTensor(parts[0], _integers(state.get("size"), file), tuple(chunks))


class _Spans:
    """Where things lie: (key, offsets of a chunk, or None for an object) -> span."""

    def __init__(self, stored: Mapping[object, object], file: Path) -> None:
        self._file = file
        self._spans: dict[tuple[str, tuple[int, ...] | None], Span] = {}
        for index, info in stored.items():
            where = _state(index, file)
            key, offset = where.get("fqn"), where.get("offset")
            if not isinstance(key, str):
                raise _odd(file, "bytes without a key")
            place = (key, None if offset is None else _integers(offset, file))
            if place in self._spans:
                raise _odd(file, f"{key} at {list(place[1] or ())} twice")
            self._spans[place] = self._span(key, _state(info, file))

    def _span(self, key: str, state: Mapping[object, object]) -> Span:
        path, offset, length = (state.get(name) for name in ("relative_path", "offset", "length"))
        encodings = state.get("transform_descriptors") or ()
        if not isinstance(path, str) or type(offset) is not int or type(length) is not int or min(offset, length) < 0:
            raise _odd(self._file, f"{key} at no place of a file")
        if not isinstance(encodings, list | tuple):
            raise _odd(self._file, f"{key} in an unknown encoding")
        names = (item[:40] if isinstance(item, str) else type(item).__name__ for item in encodings)
        return Span(path, offset, length, tuple(names))

    def find(self, key: str, offsets: tuple[int, ...] | None) -> Span:
        span = self._spans.get((key, offsets))
        if span is None:
            place = "" if offsets is None else f" (the chunk at {list(offsets)})"
            raise InputError(f"does not say where {key}{place} is stored", where=self._file, hint=_AGAIN)
        return span
