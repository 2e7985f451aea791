"""Writes the container of torch.distributed.checkpoint (`ckptkit.formats.dcp.reading` reads it)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from ckptkit.dtypes import TORCH_DTYPE_NAMES, DType
from ckptkit.errors import InputError
from ckptkit.formats.dcp.chunks import Box, ChunkError, join_chunks
from ckptkit.formats.dcp.reading import METADATA, Span
from ckptkit.formats.torch_file.pickles import Record, TorchDType, dumps, lay_out_torch_file
from ckptkit.formats.torch_file.zipfiles import ALIGNMENT
from ckptkit.io.plan import Checksum, OutputFile, Segment, literal
from ckptkit.tensors import Literal, Tensor

_MODULE = "torch.distributed.checkpoint.metadata"


@dataclass(frozen=True, slots=True)
class NewChunk:
    """A chunk to write: its first index on every axis of tensor `key`, its bytes, and the `.distcp` file it goes to."""

    key: str
    offsets: tuple[int, ...]
    tensor: Tensor
    file: str


@dataclass(frozen=True, slots=True)
class NewObject:
    """An object to write, as the bytes that its reader expects."""

    key: str
    data: bytes
    file: str


def lay_out_dcp(
    folder: str, shapes: Mapping[str, tuple[int, ...]], chunks: Sequence[NewChunk], objects: Iterable[NewObject] = ()
) -> list[OutputFile]:
    """The files of a checkpoint that torch.distributed.checkpoint and Megatron-Core load.

    Equal input gives equal bytes.

    Args:
        folder: Folder for the files, relative to the destination; empty for the destination itself.
        shapes: Key -> shape of every tensor.
        chunks: The chunks of all tensors; casts are applied. Chunks of one file follow each other in this order.
        objects: Byte objects.

    Raises:
        InputError: Chunks of one tensor have different dtypes.
        ChunkError: Chunks do not make up their tensor.
    """
    metadata = _Metadata(shapes, _check_chunks(shapes, chunks))
    files: dict[str, _Distcp] = {}
    for new in objects:
        metadata.add_object(new.key, files.setdefault(new.file, _Distcp(new.file)).add_object(new.data))
    for chunk in chunks:
        span = files.setdefault(chunk.file, _Distcp(chunk.file)).add_tensor(chunk.tensor, chunk.key)
        metadata.add_chunk(chunk, span)
    prefix = f"{folder}/" if folder else ""
    described = OutputFile.small(prefix + METADATA, metadata.pickle())
    return [*(file.output(prefix) for _, file in sorted(files.items())), described]


def _check_chunks(shapes: Mapping[str, tuple[int, ...]], chunks: Iterable[NewChunk]) -> dict[str, DType]:
    """Checks that the chunks of every tensor cover it without holes. Returns the dtypes."""
    parts: dict[str, list[NewChunk]] = {key: [] for key in shapes}
    for chunk in chunks:
        parts[chunk.key].append(chunk)
    dtypes: dict[str, DType] = {}
    for key, part in parts.items():
        kinds = {chunk.tensor.out_dtype for chunk in part}
        if not kinds:
            raise ChunkError(f"{key} has no chunks")
        if len(kinds) > 1:
            raise InputError(
                f"{key} would be of several types: {', '.join(sorted(map(str, kinds)))}",
                hint="--dtype casts everything to one; the torch format keeps each layer and expert by itself",
            )
        (dtypes[key],) = kinds
        try:
            join_chunks(
                dtypes[key],
                shapes[key],
                [Box(chunk.offsets, Tensor.full(dtypes[key], chunk.tensor.shape)) for chunk in part],
            )
        except ChunkError as error:
            raise ChunkError(f"{key}: {error}") from None
    return dtypes


class _Distcp:
    """One `.distcp` file: archives and objects one after the other, objects first."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._size = 0
        self._segments: list[Segment] = []
        self._checksums: list[Checksum] = []
        self._tensors = 0
        self._pending = bytearray()

    def add_object(self, data: bytes) -> Span:
        """Appends bytes as they are."""
        start = self._size
        self._pending += data
        self._size += len(data)
        return Span(self._name, start, len(data))

    def add_tensor(self, tensor: Tensor, label: str) -> Span:
        """Appends an archive of torch.save; it starts aligned, so that its data does."""
        self._pad()
        start = self._size
        archive = _archive(tensor.out_dtype, tensor.shape)
        for segment in archive.segments:
            if segment.name == _HERE:
                self._flush(start + segment.offset)
                self._segments.append(Segment(start + segment.offset, tensor, label))
            else:
                self._pending += _bytes_of(segment)
        self._size += archive.size
        self._checksums.extend(
            Checksum(start + check.start, start + check.stop, tuple(start + at for at in check.at))
            for check in archive.checksums
        )
        self._tensors += 1
        return Span(self._name, start, archive.size)

    def output(self, prefix: str) -> OutputFile:
        """The finished file."""
        self._flush(self._size)
        return OutputFile(
            prefix + self._name, self._size, tuple(self._segments), tuple(self._checksums), tensors=self._tensors
        )

    def _pad(self) -> None:
        missing = -self._size % ALIGNMENT
        self._pending += bytes(missing)
        self._size += missing

    def _flush(self, stop: int) -> None:
        """Writes pending bytes, which end at byte `stop`, as one segment."""
        if self._pending:
            self._segments.append(Segment(stop - len(self._pending), literal(bytes(self._pending))))
            self._pending.clear()


_HERE = "here"


@lru_cache(maxsize=4096)
def _archive(dtype: DType, shape: tuple[int, ...]) -> OutputFile:
    """An archive with one tensor, whose segment is named `_HERE`: all of one dtype and shape differ only in that."""
    blank = Tensor.full(dtype, shape)
    file = lay_out_torch_file("archive", blank)
    segments = tuple(segment._replace(name=_HERE) if segment.tensor is blank else segment for segment in file.segments)
    return replace(file, segments=segments)


def _bytes_of(segment: Segment) -> bytes:
    (band,) = segment.tensor.bands
    (piece,) = band.pieces
    assert isinstance(piece, Literal) and isinstance(piece.data, bytes)
    return piece.data


class _Metadata:
    """The content of `.metadata`, as records that torch's loader turns into its classes."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, DType]) -> None:
        self._stored: dict[object, object] = {}
        self._chunks: dict[str, list[object]] = {key: [] for key in shapes}
        properties = {dtype: _properties(dtype) for dtype in set(dtypes.values())}
        self._described: dict[str, object] = {
            key: Record(
                _MODULE,
                "TensorStorageMetadata",
                state={"properties": properties[dtypes[key]], "size": _size(shape), "chunks": self._chunks[key]},
            )
            for key, shape in shapes.items()
        }

    def add_object(self, key: str, span: Span) -> None:
        """Notes where an object is."""
        self._described[key] = _BYTES
        self._stored[Record(_MODULE, "MetadataIndex", state={"fqn": key, "index": None})] = _storage_info(span)

    def add_chunk(self, chunk: NewChunk, span: Span) -> None:
        """Notes where a chunk is."""
        offsets = _size(chunk.offsets)
        box = {"offsets": offsets, "sizes": _size(chunk.tensor.shape)}
        self._chunks[chunk.key].append(Record(_MODULE, "ChunkStorageMetadata", state=box))
        place = {"fqn": chunk.key, "index": None, "offset": offsets}
        self._stored[Record(_MODULE, "MetadataIndex", state=place)] = _storage_info(span)

    def pickle(self) -> bytes:
        """The file."""
        state = {
            "state_dict_metadata": self._described,
            "planner_data": None,
            "storage_data": self._stored,
            "storage_meta": None,
        }
        return dumps(Record(_MODULE, "Metadata", state=state))


@lru_cache(maxsize=4096)
def _size(values: tuple[int, ...]) -> Record:
    return Record("torch", "Size", (values,))


def _storage_info(span: Span) -> Record:
    state = {"relative_path": span.file, "offset": span.offset, "length": span.length}
    return Record("torch.distributed.checkpoint.filesystem", "_StorageInfo", state=state)


_BYTES = Record(_MODULE, "BytesStorageMetadata")


def _properties(dtype: DType) -> Record:
    """`TensorProperties` as its `__getstate__` gives it: dtype, layout, requires_grad, memory format, pin_memory."""
    layout = Record("torch.serialization", "_get_layout", ("torch.strided",))
    memory_format = Record(_MODULE, "_MEM_FORMAT_ENCODING", (0,))
    state = (TorchDType(TORCH_DTYPE_NAMES[dtype]), layout, False, memory_format, False)
    return Record(_MODULE, "TensorProperties", state=state)
