"""Writes the container of torch.distributed.checkpoint (`ckptkit.formats.dcp.reading` reads it)."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from math import prod
from typing import NamedTuple

from ckptkit.dtypes import TORCH_DTYPE_NAMES, DType
from ckptkit.errors import InputError
from ckptkit.formats.dcp.chunks import ChunkError, check_cover
from ckptkit.formats.dcp.reading import METADATA
from ckptkit.formats.torch_file.pickles import Record, TorchDType, lay_out_torch_file
from ckptkit.formats.torch_file.pickling import Pattern, Writer, Written, encoded, integer, reference
from ckptkit.formats.torch_file.zipfiles import ALIGNMENT
from ckptkit.io.deflated import Deflated
from ckptkit.io.plan import OutputFile, literal
from ckptkit.io.segments import Checksum, Cut, Form, Place, Segment
from ckptkit.tensors import Literal, Tensor

_MODULE = "torch.distributed.checkpoint.metadata"


@dataclass(frozen=True, slots=True)
class NewChunk:
    """A chunk to write, or equal chunks side by side: a box of tensor `key`.

    Attributes:
        key: The tensor.
        offsets: First index of the box on every axis of the tensor.
        tensor: The box. Axes that it lacks are the tensor's first ones, on which its size is 1.
        files: The `.distcp` file of each chunk.
        axis: The axis of `tensor` that is divided into as many chunks as there are files.
    """

    key: str
    offsets: tuple[int, ...]
    tensor: Tensor
    files: tuple[str, ...]
    axis: int = 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Size of the box on every axis of the tensor."""
        return (*(1,) * (len(self.offsets) - len(self.tensor.shape)), *self.tensor.shape)


@dataclass(frozen=True, slots=True)
class NewObject:
    """An object to write, as the bytes that its reader expects."""

    key: str
    data: bytes
    file: str


def lay_out_dcp(
    folder: str, shapes: Mapping[str, tuple[int, ...]], chunks: Sequence[NewChunk], objects: Sequence[NewObject] = ()
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
    dtypes = _check_chunks(shapes, chunks)
    alike: dict[object, _Alike] = {}
    kinds = [_alike(chunk, alike) for chunk in chunks]
    files: dict[str, _Distcp] = defaultdict(_Distcp)
    for new in objects:
        files[new.file].objects.append(new.data)
    for chunk, kind in zip(chunks, kinds, strict=True):
        for name, cut in zip(chunk.files, kind.cuts, strict=True):
            file = files[name]
            file.kinds.append(kind)
            file.boxes.append(chunk.tensor)
            file.cuts.append(cut)
    forms: dict[object, _Form] = {}
    placed = {name: file.form(forms) for name, file in files.items()}
    prefix = f"{folder}/" if folder else ""
    metadata = _Metadata(shapes, objects, zip(chunks, kinds, strict=True))
    described = metadata.pickle(dtypes, {name: iter(form.spans) for name, form in placed.items()})
    return [
        *(OutputFile.filled(prefix + name, placed[name].form, file.written()) for name, file in sorted(files.items())),
        OutputFile.small(prefix + METADATA, described.content()),
    ]


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
            check_cover(shapes[key], [(chunk.offsets, chunk.sizes) for chunk in part])
        except ChunkError as error:
            raise ChunkError(f"{key}: {error}") from None
    return dtypes


@dataclass(frozen=True, slots=True, eq=False)
class _Slice:
    """One of the chunks that a box is divided into: indices `start:stop` of an axis, as a tensor of `shape`."""

    axis: int
    start: int
    stop: int
    shape: tuple[int, ...]

    def __call__(self, tensor: Tensor) -> Tensor:
        if tensor.shape and (self.start, self.stop) != (0, tensor.shape[self.axis]):
            last = self.axis == len(tensor.shape) - 1
            tensor = tensor.cols(self.start, self.stop) if last else tensor.rows(self.start, self.stop)
        return tensor.reshape(self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class _Alike:
    """What boxes have in common that differ in their place and their bytes.

    Attributes:
        key: The stored tensor.
        archive: The archive of each of their chunks.
        sizes: The size of a chunk on every axis of the stored tensor.
        cuts: How each chunk is cut from the box.
        axis: The axis of the stored tensor along which the chunks lie side by side.
        starts: Where each chunk starts in the box.
    """

    key: str
    archive: OutputFile
    sizes: tuple[int, ...]
    cuts: tuple[_Slice, ...]
    axis: int
    starts: tuple[int, ...]


def _alike(chunk: NewChunk, known: dict[object, _Alike]) -> _Alike:
    """What a box has in common with others.

    Raises:
        ChunkError: It does not divide into equal chunks.
    """
    tensor, count = chunk.tensor, len(chunk.files)
    kind = (chunk.key, tensor.out_dtype.name, chunk.sizes, len(tensor.shape), chunk.axis, count)
    if kind in known:
        return known[kind]
    axis = chunk.axis % len(tensor.shape) if tensor.shape else 0
    length = tensor.shape[axis] if tensor.shape else 1
    share, rest = divmod(length, count)
    if rest or (count > 1 and axis not in (0, len(tensor.shape) - 1)):
        raise ChunkError(f"{chunk.key}: axis {axis} of {list(tensor.shape)} does not divide into {count} chunks")
    lead = len(chunk.sizes) - len(tensor.shape)
    starts = tuple(number * share for number in range(count))
    sizes = tuple(share if tensor.shape and at == lead + axis else size for at, size in enumerate(chunk.sizes))
    known[kind] = _Alike(
        chunk.key,
        _archive(tensor.out_dtype, sizes),
        sizes,
        tuple(_Slice(axis, start, start + share, sizes) for start in starts),
        lead + axis,
        starts,
    )
    return known[kind]


@dataclass(frozen=True, slots=True)
class _Form:
    """A `.distcp` file without its tensors, and (offset, length) of its objects and archives."""

    form: Form
    spans: list[tuple[int, int]]


@dataclass(slots=True)
class _Distcp:
    """The content of one `.distcp` file: objects, then archives.

    There may be a million chunks, so what describes them stands in lists side by side, and not in an object for each.
    """

    objects: list[bytes] = field(default_factory=list)
    kinds: list[_Alike] = field(default_factory=list)
    boxes: list[Tensor] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)

    def form(self, known: dict[object, _Form]) -> _Form:
        """Its form. Ranks that hold alike chunks share one."""
        kind = (*self.objects, *self.kinds)
        if kind not in known:
            layout = _Layout()
            spans = [*map(layout.add_object, self.objects), *map(layout.add_tensor, self.kinds)]
            known[kind] = _Form(layout.form(), spans)
        return known[kind]

    def written(self) -> Iterator[tuple[Tensor, Cut]]:
        """The box and the cut of each chunk that has bytes."""
        everything = zip(self.boxes, self.cuts, self.kinds, strict=True)
        return ((box, cut) for box, cut, kind in everything if prod(kind.sizes))


class _Layout:
    """Lays out a `.distcp` file: objects and archives one after the other."""

    def __init__(self) -> None:
        self._size = 0
        self._parts: list[Segment | Place] = []
        self._checksums: list[Checksum] = []
        self._tensors = 0
        self._pending = bytearray()
        self._literals: dict[bytes, Tensor] = {}

    def add_object(self, data: bytes) -> tuple[int, int]:
        """Appends bytes as they are. Returns where they start, and their length."""
        start = self._size
        self._pending += data
        self._size += len(data)
        return start, len(data)

    def add_tensor(self, kind: _Alike) -> tuple[int, int]:
        """Appends an archive of torch.save; it starts aligned, so that its data does. Returns its start and length."""
        self._pad()
        start, archive = self._size, kind.archive
        for segment in archive.segments:
            if segment.name == _HERE:
                self._flush(start + segment.offset)
                self._parts.append(Place(start + segment.offset, segment.tensor.nbytes, kind.key))
            else:
                self._pending += _bytes_of(segment)
        self._size += archive.size
        self._checksums.extend(
            Checksum(start + check.start, start + check.stop, tuple(start + at for at in check.at))
            for check in archive.checksums
        )
        self._tensors += 1
        return start, archive.size

    def form(self) -> Form:
        """The finished file."""
        self._flush(self._size)
        return Form(self._size, tuple(self._parts), tuple(self._checksums), self._tensors)

    def _pad(self) -> None:
        missing = -self._size % ALIGNMENT
        self._pending += bytes(missing)
        self._size += missing

    def _flush(self, stop: int) -> None:
        """Writes pending bytes, which end at byte `stop`, as one segment; between alike archives they are the same."""
        if self._pending:
            data = bytes(self._pending)
            tensor = self._literals.setdefault(data, literal(data))
            self._parts.append(Segment(stop - len(data), tensor))
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


class _Sizes:
    """The `torch.Size`s in a pickle. One that occurred among the last 4096 is the same object.

    Attributes:
        places: Number of a size -> its number in the pickle, or 0 as long as it is not written.
        number: Values -> number of the size.
    """

    def __init__(self) -> None:
        self.places = array("I")
        self.number = lru_cache(maxsize=4096)(self._add)

    def _add(self, values: tuple[int, ...]) -> int:
        self.places.append(0)
        return len(self.places) - 1

    def written(self, number: int, values: tuple[int, ...]) -> Written:
        """The size as a part of what is to be written."""
        return Written(partial(self._save, number, values))

    def _save(self, number: int, values: tuple[int, ...], writer: Writer) -> None:
        if self.places[number]:
            writer.out += reference(self.places[number])
            return
        size = _size(values)
        writer.kept.append(size)
        writer.save(size)
        self.places[number] = writer.puts - 1


class _Box(NamedTuple):
    """A box in `.metadata`; the numbers of its sizes stand from `first` among those of all."""

    chunk: NewChunk
    kind: _Alike
    first: int

    def offsets(self) -> list[tuple[int, ...]]:
        """First index of each chunk on every axis."""
        axis, first = self.kind.axis, self.chunk.offsets
        before, after = first[:axis], first[axis + 1 :]
        return [(*before, first[axis] + start, *after) for start in self.kind.starts] if first else [()]


class _Metadata:
    """The content of `.metadata`, as records that torch's loader turns into its classes.

    There are hundreds of thousands of chunks with two records each, so these are written by patterns.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        objects: Sequence[NewObject],
        chunks: Iterable[tuple[NewChunk, _Alike]],
    ) -> None:
        """Gives every size its number, in the order of the chunks."""
        self._sizes = _Sizes()
        self._shapes = {key: self._sizes.written(self._sizes.number(shape), shape) for key, shape in shapes.items()}
        self._objects = objects
        self._boxes: list[_Box] = []
        self._numbers = array("I")
        for chunk, kind in chunks:
            self._boxes.append(box := _Box(chunk, kind, len(self._numbers)))
            for offsets in box.offsets():
                self._numbers.append(self._sizes.number(offsets))
                self._numbers.append(self._sizes.number(kind.sizes))

    def pickle(self, dtypes: Mapping[str, DType], spans: Mapping[str, Iterator[tuple[int, int]]]) -> Deflated:
        """The file.

        Args:
            dtypes: Key -> element type of every tensor.
            spans: File -> start and length of its objects, then of its archives.
        """
        content = Deflated()
        writer = Writer(content.append)
        properties = {dtype: _properties(dtype) for dtype in dict.fromkeys(dtypes.values())}
        boxes: dict[str, list[_Box]] = {key: [] for key in self._shapes}
        for box in self._boxes:
            boxes[box.chunk.key].append(box)
        described: dict[str, object] = {
            key: _record(
                "TensorStorageMetadata",
                properties=properties[dtypes[key]],
                size=size,
                chunks=Written(partial(self._save_chunks, boxes[key])),
            )
            for key, size in self._shapes.items()
        }
        described.update((new.key, _BYTES) for new in self._objects)
        metadata = _record(
            "Metadata",
            state_dict_metadata=described,
            planner_data=None,
            storage_data=Written(partial(self._save_places, spans)),
            storage_meta=None,
        )
        writer.save(metadata)
        writer.finish()
        return content

    def _save_chunks(self, boxes: Sequence[_Box], writer: Writer) -> None:
        writer.out += b"]"
        writer.put()
        writer.elements(self._chunks(boxes, writer), sum(len(box.kind.cuts) for box in boxes))

    def _chunks(self, boxes: Sequence[_Box], writer: Writer) -> Iterator[None]:
        """Writes where each chunk lies in its tensor."""
        places, axes = self._sizes.places, len(boxes[0].chunk.offsets)
        at_known = Pattern(writer, lambda offsets, sizes: (_chunk(offsets, sizes),))
        at_new = Pattern(writer, lambda offsets, sizes: (_chunk(_size((offsets, *[_NOTHING] * (axes - 1))), sizes),))
        for box in boxes:
            numbers = iter(self._numbers[box.first : box.first + 2 * len(box.kind.cuts)])
            for offsets, at, size in zip(box.offsets(), numbers, numbers, strict=False):
                if places[at] and places[size]:
                    at_known.save(reference(places[at]), reference(places[size]))
                elif places[size] and axes and "sizes" in writer.memo:
                    at_new.save(b"".join(map(_integer, offsets)), reference(places[size]))
                    places[at] = writer.puts - 1  # nothing after the offsets was new
                else:
                    sizes = self._sizes
                    at_known.save_new(sizes.written(at, offsets), sizes.written(size, box.kind.sizes))
                yield

    def _save_places(self, spans: Mapping[str, Iterator[tuple[int, int]]], writer: Writer) -> None:
        writer.out += b"}"
        writer.put()
        size = len(self._objects) + sum(len(box.kind.cuts) for box in self._boxes)
        writer.items(self._places(spans, writer), size)

    def _places(self, spans: Mapping[str, Iterator[tuple[int, int]]], writer: Writer) -> Iterator[None]:
        """Writes which bytes of which file hold each object and each chunk."""
        of_object = Pattern(writer, lambda key, *info: (_index(key), _storage_info(*info)))
        of_chunk = Pattern(writer, lambda key, offset, *info: (_index(key, offset=offset), _storage_info(*info)))

        def save(pattern: Pattern, file: str, *place: bytes) -> None:
            start, length = next(spans[file])
            if file in writer.memo:
                pattern.save(*place, reference(writer.memo[file]), integer(start), _integer(length))
            else:
                pattern.save_new(*map(encoded, place), file, start, length)

        for new in self._objects:
            save(of_object, new.file, reference(writer.memo[new.key]))
            yield
        for box in self._boxes:
            key = reference(writer.memo[box.chunk.key])
            numbers = self._numbers[box.first : box.first + 2 * len(box.kind.cuts) : 2]
            for file, at in zip(box.chunk.files, numbers, strict=True):
                save(of_chunk, file, key, reference(self._sizes.places[at]))
                yield


_integer = lru_cache(maxsize=4096)(integer)
_NOTHING = encoded(b"")


def _record(name: str, **state: object) -> Record:
    return Record(_MODULE, name, state=state)


def _size(values: tuple[object, ...]) -> Record:
    return Record("torch", "Size", (values,))


def _chunk(offsets: object, sizes: object) -> Record:
    return _record("ChunkStorageMetadata", offsets=offsets, sizes=sizes)


def _index(key: object, **offset: object) -> Record:
    return _record("MetadataIndex", fqn=key, index=None, **offset)


def _storage_info(file: object, start: object, length: object) -> Record:
    state = {"relative_path": file, "offset": start, "length": length}
    return Record("torch.distributed.checkpoint.filesystem", "_StorageInfo", state=state)


_BYTES = Record(_MODULE, "BytesStorageMetadata")


def _properties(dtype: DType) -> Record:
    """`TensorProperties` as its `__getstate__` gives it: dtype, layout, requires_grad, memory format, pin_memory."""
    layout = Record("torch.serialization", "_get_layout", ("torch.strided",))
    memory_format = Record(_MODULE, "_MEM_FORMAT_ENCODING", (0,))
    state = (TorchDType(TORCH_DTYPE_NAMES[dtype]), layout, False, memory_format, False)
    return Record(_MODULE, "TensorProperties", state=state)
