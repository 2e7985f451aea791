"""A plan: for every output file, which source bytes go to which offset. It is complete before anything is written."""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, pairwise
from pathlib import PurePosixPath
from typing import NamedTuple, overload

from ckptkit.dtypes import DTYPES
from ckptkit.errors import InputError
from ckptkit.io.castable import check_cast
from ckptkit.io.source import Fingerprint
from ckptkit.tensors import Const, Literal, Piece, Region, Tensor

_RECIPE = 1  # raise it when the same recipe starts to give other bytes


class Segment(NamedTuple):
    """The row-major bytes of `tensor`, written at byte `offset` of a file."""

    offset: int
    tensor: Tensor
    name: str = ""


class Checksum(NamedTuple):
    """The CRC-32 of bytes `start:stop` of a file. It is written little-endian at each offset in `at`."""

    start: int
    stop: int
    at: tuple[int, ...]


@dataclass(frozen=True)
class OutputFile:
    """One file of the output.

    Attributes:
        path: Relative to the destination, with forward slashes.
        size: Bytes; every byte belongs to a segment or is zero.
        segments: In order of offset, without overlaps.
        checksums: Checksums to fill in once the bytes they cover are written.
        tensors: Number of model tensors in it, for display.
    """

    path: str
    size: int
    segments: Sequence[Segment]
    checksums: tuple[Checksum, ...] = ()
    tensors: int = 0

    def read_from(self) -> Iterable[Tensor]:
        """Tensors that name every file from which its bytes come."""
        return self.segments.wholes if isinstance(self.segments, Filled) else self.each()

    def each(self) -> Iterator[Tensor]:
        """The tensors of its segments."""
        return (segment.tensor for segment in self.segments)

    def kinds(self) -> Iterable[tuple[Tensor, int]]:
        """Tensors of its segments of which all others are copies with other bytes, and how many each stands for."""
        return self.segments.kinds() if isinstance(self.segments, Filled) else ((tensor, 1) for tensor in self.each())

    def spans(self) -> list[tuple[int, int]]:
        """First byte and end of every segment."""
        if isinstance(self.segments, Filled):
            return [(part.offset, part.offset + _size(part)) for part in self.segments.form.parts]
        return [(segment.offset, segment.offset + segment.tensor.nbytes) for segment in self.segments]

    @classmethod
    def small(cls, path: str, data: bytes) -> OutputFile:
        """A file whose bytes are in memory."""
        segments = (Segment(0, literal(data)),) if data else ()
        return cls(path, len(data), segments)

    @classmethod
    def copy(cls, path: str, source: str, size: int) -> OutputFile:
        """A byte-for-byte copy of `source`."""
        tensor = Tensor.from_file(source, 0, DTYPES["U8"], (1, size))
        return cls(path, size, (Segment(0, tensor),) if size else ())


Cut = Callable[[Tensor], Tensor]
"""Makes one tensor from another: a rank's shard, or a chunk. Equal shapes give equal shapes."""


class Place(NamedTuple):
    """Room for a tensor of `size` bytes at byte `offset` of a file."""

    offset: int
    size: int
    name: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """A file without its tensors. The ranks of a grid hold equal shapes, so hundreds of files share a few forms.

    Attributes:
        size: Bytes of the file.
        parts: The literal bytes, and the places of tensors, in order of offset.
        checksums: As of `OutputFile`.
    """

    size: int
    parts: tuple[Segment | Place, ...]
    checksums: tuple[Checksum, ...] = ()

    @property
    def places(self) -> int:
        """Number of places."""
        return sum(isinstance(part, Place) for part in self.parts)

    @classmethod
    def of(cls, file: OutputFile, blanks: Iterable[object]) -> Form:
        """The form of a file in which `blanks` stand for the tensors."""
        blank = {id(tensor) for tensor in blanks}
        parts = tuple(
            Place(segment.offset, segment.tensor.nbytes, segment.name) if id(segment.tensor) in blank else segment
            for segment in file.segments
        )
        return cls(file.size, parts, file.checksums)

    def filled(self, path: str, tensors: Sequence[tuple[Tensor, Cut]]) -> OutputFile:
        """A file of this form.

        Args:
            path: As of `OutputFile`.
            tensors: For each place, the tensor that its content is cut from, and how.
        """
        if len(tensors) != self.places:
            raise ValueError(f"{path}: {len(tensors)} tensors for {self.places} places")
        segments = Filled(self, tuple([whole for whole, _ in tensors]), tuple([cut for _, cut in tensors]))
        return OutputFile(path, self.size, segments, self.checksums, tensors=self.places)


@dataclass(frozen=True, slots=True, eq=False)
class Filled(Sequence[Segment]):
    """The segments of a form that is filled with tensors. They are cut while they are read, and not kept."""

    form: Form
    wholes: tuple[Tensor, ...]
    cuts: tuple[Cut, ...]

    def __len__(self) -> int:
        return len(self.form.parts)

    def __iter__(self) -> Iterator[Segment]:
        tensors = (cut(whole) for cut, whole in zip(self.cuts, self.wholes, strict=True))
        for part in self.form.parts:
            if isinstance(part, Segment):
                yield part
                continue
            tensor = next(tensors)
            if tensor.nbytes != part.size:
                raise ValueError(f"{part.name}: {tensor.nbytes} bytes for a place of {part.size}")
            yield Segment(part.offset, tensor, part.name)

    @overload
    def __getitem__(self, index: int) -> Segment: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Segment]: ...
    def __getitem__(self, index: int | slice) -> Segment | Sequence[Segment]:
        if isinstance(index, slice):
            return tuple(self)[index]
        return next(islice(self, range(len(self))[index], None))

    def kinds(self) -> Iterator[tuple[Tensor, int]]:
        """See `OutputFile.kinds`: tensors of one structure that are cut the same way are alike."""
        structures: dict[object, int] = {}
        known: dict[int, int] = {}
        kinds: dict[tuple[int, Cut], Tensor] = {}
        counts: Counter[tuple[int, Cut]] = Counter()
        for whole, cut in zip(self.wholes, self.cuts, strict=True):
            if id(whole) not in known:
                known[id(whole)] = structures.setdefault(_structure(whole), len(structures))
            kind = known[id(whole)], cut
            counts[kind] += 1
            kinds.setdefault(kind, whole)
        literals = ((part.tensor, 1) for part in self.form.parts if isinstance(part, Segment))
        return chain(literals, ((cut(whole), counts[kind, cut]) for (kind, cut), whole in kinds.items()))


def _size(part: Segment | Place) -> int:
    return part.size if isinstance(part, Place) else part.tensor.nbytes


def _structure(tensor: Tensor) -> object:
    """Everything about a tensor but where its bytes lie."""
    pieces = [
        (band.rows, [(type(piece), piece.width, piece.contiguous) for piece in band.pieces]) for band in tensor.bands
    ]
    return tensor.dtype.name, tensor.out_dtype.name, tensor.shape, repr(pieces)


def literal(data: bytes) -> Tensor:
    """Bytes in memory, as a tensor of one row."""
    return Tensor.from_bytes(data, DTYPES["U8"], (1, len(data)))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two tensors that must hold equal bytes for the conversion to lose nothing.

    Attributes:
        left: One.
        right: The other.
        what: Description of the two, for messages.
        hint: What to do if they differ, or None if only a better checkpoint helps.
    """

    left: Tensor
    right: Tensor
    what: str
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Dropped:
    """A part of a stored tensor that a conversion drops, because the model does not use it.

    Attributes:
        what: Description; parts with the same description are counted together.
        where: Name of the stored tensor.
        found: The stored content.
        expected: The content that a conversion in the other direction would store.
        usual: Whether the part needs no report where it is as expected.
    """

    what: str
    where: str
    found: Tensor
    expected: Tensor
    usual: bool = False


@dataclass(frozen=True)
class Plan:
    """Everything that a conversion does.

    Attributes:
        files: The files to write.
        comparisons: Tensors that must be equal before the output is committed.
        lossy: Sentences about losses that the user asked for (casts, tensors left out).
        notes: Sentences for the user (config features without a Megatron argument, ...).
        coverage: Number of stored tensors that are used, are replicas, go into the sidecar, ...
        dropped: Parts of stored tensors that the model does not use and the output does not hold.
    """

    files: tuple[OutputFile, ...]
    comparisons: tuple[Comparison, ...] = ()
    lossy: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    coverage: dict[str, int] = field(default_factory=dict)
    dropped: tuple[Dropped, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes on disk when finished."""
        return sum(file.size for file in self.files)

    def sources(self) -> set[str]:
        """The files that it reads."""
        seen = {
            id(tensor): tensor for file in self.files for tensor in file.read_from()
        }  # most of them serve many files
        return source_files(chain(seen.values(), self._compared()))

    def check(self) -> None:
        """Checks that the plan is consistent. Reads no file.

        Raises:
            InputError: An output path leaves the destination, or two files have the same path.
            UnsupportedError: A cast that does not exist.
            ValueError: Segments overlap or leave their file. This is a bug in the code that made the plan.
        """
        taken: set[str] = set()
        for file in self.files:
            if not _inside(file.path) or file.path in taken:
                raise InputError("an output file cannot have this name", where=repr(file.path))
            taken.add(file.path)
        for file in self._forms():
            _check_spans(file)
        for dtype, out_dtype in dict.fromkeys((tensor.dtype, tensor.out_dtype) for tensor in self._kinds()):
            check_cast(dtype, out_dtype)

    def digest(self, sources: Iterable[Fingerprint]) -> str:
        """A SHA-256 that identifies the output: equal digests mean equal output bytes."""
        recipe = hashlib.sha256(f"ckptkit plan {_RECIPE}".encode())
        for source in sources:
            recipe.update(json.dumps(source.identity).encode())
        known: dict[int, str] = {}
        for file in self.files:
            sums = [(checksum.start, checksum.stop, checksum.at) for checksum in file.checksums]
            recipe.update(json.dumps([file.path, file.size, sums]).encode())
            for segment in file.segments:
                tensor = segment.tensor
                recipe.update(f"{segment.offset} {tensor.dtype} {tensor.out_dtype}\n".encode())
                for band in tensor.bands:
                    recipe.update(repr([_recipe(piece, known) for piece in band.pieces]).encode())
        return recipe.hexdigest()

    def traffic(self) -> tuple[int, int]:
        """(bytes that are copied as whole runs, bytes that are rearranged, filled in or cast)."""
        through = rearranged = 0
        for tensor, count in chain.from_iterable(file.kinds() for file in self.files):
            direct = tensor.cast is None and all(
                len(band.pieces) == 1 and band.pieces[0].contiguous and isinstance(band.pieces[0], Region)
                for band in tensor.bands
            )
            through += count * tensor.nbytes if direct else 0
            rearranged += 0 if direct else count * tensor.nbytes
        return through, rearranged

    def _forms(self) -> Iterable[OutputFile]:
        """One file of each form."""
        forms = {id(file.segments.form if isinstance(file.segments, Filled) else file): file for file in self.files}
        return forms.values()

    def _kinds(self) -> Iterator[Tensor]:
        for file in self.files:
            for tensor, _ in file.kinds():
                yield tensor
        yield from self._compared()

    def _compared(self) -> Iterator[Tensor]:
        for comparison in self.comparisons:
            yield comparison.left
            yield comparison.right


def source_files(tensors: Iterable[Tensor]) -> set[str]:
    """The files that tensors read from."""
    return {file for tensor in tensors for band in tensor.bands for piece in band.pieces for file in _files_of(piece)}


def _files_of(piece: Piece) -> tuple[str, ...]:
    if isinstance(piece, Region):
        return (piece.file,)
    return piece.data.files if isinstance(piece, Literal) and not isinstance(piece.data, bytes) else ()


def _inside(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return bool(parts) and "/".join(parts) == path and parts[0] != "/" and ".." not in parts and "\0" not in path


def _check_spans(file: OutputFile) -> None:
    for (_, end), (start, _) in pairwise([(0, 0), *file.spans(), (file.size, file.size)]):
        if start < end:
            raise ValueError(f"{file.path}: a segment at byte {start} overlaps the one that ends at {end}")
    sums = file.checksums
    if any(before.stop > after.start for before, after in pairwise(sums)) or (sums and sums[-1].stop > file.size):
        raise ValueError(f"{file.path}: checksums overlap or cover bytes after the end")
    stops = [checksum.stop for checksum in sums]
    for at in (at for checksum in sums for at in checksum.at):
        following = bisect_right(stops, at)
        if at + 4 > file.size or (following < len(sums) and sums[following].start < at + 4):
            raise ValueError(
                f"{file.path}: bytes {at}:{at + 4} are to hold a checksum, and another checksum covers them"
            )


def _recipe(piece: Piece, known: dict[int, str]) -> tuple[object, ...]:
    """A description of a piece for the digest of the plan.

    Many pieces share the same bytes in memory, so `known` keeps the digests of these by identity.
    """
    match piece:
        case Region(path, offset, rows, pitch, width):
            return (os.path.abspath(path), offset, rows, pitch, width)
        case Literal(data, offset, rows, pitch, width):
            if id(data) not in known:
                known[id(data)] = hashlib.sha256(data).hexdigest() if isinstance(data, bytes) else data.digest
            return (known[id(data)], offset, rows, pitch, width)
        case Const(pattern, rows, width):
            return (pattern, rows, width)
