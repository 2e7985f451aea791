"""A plan: for every output file, which source bytes go to which offset. It is complete before anything is written."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, pairwise
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from ckptkit.dtypes import DTYPES
from ckptkit.errors import InputError
from ckptkit.io.castable import check_cast
from ckptkit.io.segments import Checksum, Cut, Form, Segment, form_of, kinds, origins, spans
from ckptkit.io.source import Fingerprint
from ckptkit.io.stores.mirror import name_of
from ckptkit.tensors import Const, Literal, Made, Piece, Region, Tensor

if TYPE_CHECKING:
    from ckptkit.io.quantised import Likeness

MEMORY = "\0"
"""Start of the `file` of a region that is memory of a running program, and no file: no path has this character."""

_RECIPE = 1  # raise it when the same recipe starts to give other bytes


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

    @classmethod
    def filled(cls, path: str, form: Form, tensors: Iterable[tuple[Tensor, Cut]]) -> OutputFile:
        """A file of a form; `tensors` as for `Form.filled`."""
        return cls(path, form.size, form.filled(tensors), form.checksums, form.tensors)

    @classmethod
    def small(cls, path: str, data: bytes | Made) -> OutputFile:
        """A file whose bytes are in memory, or made when they are wanted."""
        segments = (Segment(0, literal(data)),) if data else ()
        return cls(path, len(data), segments)

    @classmethod
    def copy(cls, path: str, source: str, size: int) -> OutputFile:
        """A byte-for-byte copy of `source`."""
        tensor = Tensor.from_file(source, 0, DTYPES["U8"], (1, size))
        return cls(path, size, (Segment(0, tensor),) if size else ())


def literal(data: bytes | Made) -> Tensor:
    """Bytes in memory, or made when they are wanted, as a tensor of one row."""
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
        facts: Further facts about the output, for the result.
        likenesses: Tensors that keep codes of a reference, if they are still what it holds.
    """

    files: tuple[OutputFile, ...]
    comparisons: tuple[Comparison, ...] = ()
    lossy: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    coverage: dict[str, int] = field(default_factory=dict)
    dropped: tuple[Dropped, ...] = ()
    facts: Mapping[str, object] = field(default_factory=dict)
    likenesses: tuple[Likeness, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes on disk when finished."""
        return sum(file.size for file in self.files)

    def sources(self) -> set[str]:
        """The files that it reads."""
        return source_files(chain(origins(file.segments for file in self.files), self._compared()))

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
        for file in {form_of(file.segments): file for file in self.files}.values():
            _check_spans(file)
        for dtype, out_dtype in dict.fromkeys((tensor.dtype, tensor.out_dtype) for tensor, _ in self._kinds):
            check_cast(dtype, out_dtype)

    def digest(self, sources: Iterable[Fingerprint]) -> str:
        """A SHA-256 that identifies the output: equal digests mean equal output bytes."""
        recipe = hashlib.sha256(f"ckptkit plan {_RECIPE}".encode())
        for source in sources:
            recipe.update(json.dumps(source.identity).encode())
        known: dict[int | str, str] = {}
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
        for tensor, count in self._kinds:
            direct = tensor.cast is None and all(
                len(band.pieces) == 1 and band.pieces[0].contiguous and isinstance(band.pieces[0], Region)
                for band in tensor.bands
            )
            through += count * tensor.nbytes if direct else 0
            rearranged += 0 if direct else count * tensor.nbytes
        return through, rearranged

    @cached_property
    def _kinds(self) -> list[tuple[Tensor, int]]:
        return list(kinds(file.segments for file in self.files))

    def _compared(self) -> Iterator[Tensor]:
        for comparison in self.comparisons:
            yield comparison.left
            yield comparison.right


def source_files(tensors: Iterable[Tensor]) -> set[str]:
    """The files that tensors read from."""
    return {file for file in origins_of(tensors) if not file.startswith(MEMORY)}


def origins_of(tensors: Iterable[Tensor]) -> set[str]:
    """The files, and the memory, that tensors read from."""
    return {file for tensor in tensors for band in tensor.bands for piece in band.pieces for file in files_of(piece)}


def files_of(piece: Piece) -> tuple[str, ...]:
    """The files, or the memory, that a piece reads from."""
    if isinstance(piece, Region):
        return (piece.file,)
    return piece.data.files if isinstance(piece, Literal) and not isinstance(piece.data, bytes) else ()


def _inside(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return bool(parts) and "/".join(parts) == path and parts[0] != "/" and ".." not in parts and "\0" not in path


def _check_spans(file: OutputFile) -> None:
    for (_, end), (start, _) in pairwise([(0, 0), *spans(file.segments), (file.size, file.size)]):
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


def _recipe(piece: Piece, known: dict[int | str, str]) -> tuple[object, ...]:
    """A description of a piece for the digest of the plan.

    Many pieces share the same file, or the same bytes in memory, so `known` keeps the absolute paths or addresses of
    files, and the digests of bytes by identity.
    """
    match piece:
        case Region(path, offset, rows, pitch, width):
            if path not in known:
                known[path] = path if path.startswith(MEMORY) else name_of(path)
            return (known[path], offset, rows, pitch, width)
        case Literal(data, offset, rows, pitch, width):
            if id(data) not in known:
                known[id(data)] = hashlib.sha256(data).hexdigest() if isinstance(data, bytes) else data.digest
            return (known[id(data)], offset, rows, pitch, width)
        case Const(pattern, rows, width):
            return (pattern, rows, width)
