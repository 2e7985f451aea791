"""What a file consists of: segments, and the form that files with alike tensors share.

A sharded checkpoint of a model with experts has hundreds of thousands of shards, in hundreds of files. Its tensors have
a few shapes, and the ranks of a grid hold equal numbers of each. So the offsets, literal bytes and checksums of a file
are laid out once for each form, and a shard is no object: it is cut while it is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, overload

from ckptkit.tensors import Tensor


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


Cut = Callable[[Tensor], Tensor]
"""Makes one tensor from another: a rank's shard, or a chunk. Where the bytes lie makes no difference to the result."""


class Place(NamedTuple):
    """Room for a tensor of `size` bytes at byte `offset` of a file."""

    offset: int
    size: int
    name: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """A file without its tensors.

    Attributes:
        size: Bytes of the file.
        parts: The literal bytes, and the places of tensors, in order of offset.
        checksums: As of `OutputFile`.
        tensors: Number of tensors, those without bytes included.
    """

    size: int
    parts: tuple[Segment | Place, ...]
    checksums: tuple[Checksum, ...] = ()
    tensors: int = 0

    @classmethod
    def of(
        cls,
        size: int,
        segments: Iterable[Segment],
        checksums: tuple[Checksum, ...],
        blanks: Collection[Tensor],
    ) -> Form:
        """The form of a file in which `blanks` stand for the tensors."""
        blank = {id(tensor) for tensor in blanks}
        parts = [
            Place(segment.offset, segment.tensor.nbytes, segment.name) if id(segment.tensor) in blank else segment
            for segment in segments
        ]
        return cls(size, tuple(parts), checksums, len(blanks))

    def filled(self, tensors: Iterable[tuple[Tensor, Cut]]) -> Filled:
        """The segments of a file of this form.

        Args:
            tensors: For each place, the tensor that its content is cut from, and how.
        """
        places = sum(isinstance(part, Place) for part in self.parts)
        wholes: list[Tensor] = []
        cuts: list[Cut] = []
        for whole, cut in tensors:
            wholes.append(whole)
            cuts.append(cut)
        if len(wholes) != places:
            raise ValueError(f"{len(wholes)} tensors for {places} places")
        return Filled(self, tuple(wholes), tuple(cuts))


@dataclass(frozen=True, slots=True, eq=False)
class Filled(Sequence[Segment]):
    """The segments of a form whose places are filled.

    Attributes:
        form: The form.
        wholes: For each place, the tensor that its content is cut from.
        cuts: For each place, how.
    """

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


def form_of(segments: Sequence[Segment]) -> int:
    """Equal numbers for files of one form."""
    return id(segments.form) if isinstance(segments, Filled) else id(segments)


def spans(segments: Sequence[Segment]) -> list[tuple[int, int]]:
    """First byte and end of every segment."""
    parts = segments.form.parts if isinstance(segments, Filled) else segments
    sizes = (part.size if isinstance(part, Place) else part.tensor.nbytes for part in parts)
    return [(part.offset, part.offset + size) for part, size in zip(parts, sizes, strict=True)]


def origins(files: Iterable[Sequence[Segment]]) -> Iterable[Tensor]:
    """Tensors that name every place from which the bytes of files come."""
    found: dict[int, Tensor] = {}
    for segments in files:
        tensors = segments.wholes if isinstance(segments, Filled) else [segment.tensor for segment in segments]
        found.update(zip(map(id, tensors), tensors, strict=True))
    return found.values()


def kinds(files: Iterable[Sequence[Segment]]) -> Iterator[tuple[Tensor, int]]:
    """Tensors for which all tensors in files stand but for their bytes, and how many each stands for."""
    structures: dict[object, Tensor] = {}
    alike: dict[int, Tensor] = {}
    counts: Counter[tuple[int, Cut]] = Counter()
    literals: Counter[Form] = Counter()
    for segments in files:
        if not isinstance(segments, Filled):
            yield from ((segment.tensor, 1) for segment in segments)
            continue
        literals[segments.form] += 1
        ids = list(map(id, segments.wholes))
        for number, whole in zip(ids, segments.wholes, strict=True):
            if number not in alike:
                alike[number] = structures.setdefault(_structure(whole), whole)
        counts.update(zip([id(alike[number]) for number in ids], segments.cuts, strict=True))
    for form, count in literals.items():
        yield from ((part.tensor, count) for part in form.parts if isinstance(part, Segment))
    for (number, cut), count in counts.items():
        yield cut(alike[number]), count


def _structure(tensor: Tensor) -> object:
    """Everything about a tensor but where its bytes lie."""
    bands = tuple(
        [(band.rows, *[(type(piece), piece.width, piece.contiguous) for piece in band.pieces]) for band in tensor.bands]
    )
    return tensor.dtype.name, tensor.out_dtype.name, tensor.shape, bands
