"""Making a delta: both models are read once, tile by tile, and what differs is written down in the shortest way."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.source_options import SourceOptions
from ckptkit.checkpoints.sources import facts_of, open_side
from ckptkit.conversion.execution import Execution, How, carry_out, check_destination
from ckptkit.conversion.options import DEFAULT_SHARD_SIZE
from ckptkit.dtypes import DTYPES
from ckptkit.errors import InputError
from ckptkit.formats import safetensors
from ckptkit.formats.delta.manifest import (
    ADDED,
    CHANGED,
    MANIFEST,
    REMOVED,
    UNCHANGED,
    WHOLE,
    Change,
    Manifest,
    counted,
    file_names,
)
from ckptkit.formats.delta.reading import ENTRY
from ckptkit.formats.delta.tiles import Tiling
from ckptkit.inspection.structure import config_differences
from ckptkit.io.cores import moving_threads
from ckptkit.io.crc import crc32
from ckptkit.io.hashes import TensorHash
from ckptkit.io.plan import OutputFile, Plan, literal, source_files
from ckptkit.io.segments import Segment
from ckptkit.io.stores.address import refuse_address
from ckptkit.tensors import Tensor

if TYPE_CHECKING:
    from ckptkit.io.reading import Bytes, TensorReader
    from ckptkit.io.threads import Readers

SIDES = ("OLD", "NEW")

Keep = Callable[[bytes], Tensor]
"""Keeps bytes until the plan is carried out, and gives them as a tensor."""

_HELD = 1 << 20
"""Bytes of coded tiles that are held in memory before they are kept."""
SCHEMA = 1
"""Version of the JSON; it rises when a field goes away or changes its meaning."""


@dataclass(frozen=True)
class MadeDelta:
    """The outcome of making a delta, or with `dry_run` its plan. Sizes in bytes, time in seconds.

    Attributes:
        old: Facts about OLD: path, format, family, architecture, grid, and `model`, its hash.
        new: The same about NEW.
        path: The delta.
        codings: `unchanged`, `changed`, `whole`, `added`, `removed` -> number of tensors.
        tensors: A record for each tensor that is not unchanged: name, coding, elements, changed (elements that differ),
            bytes (in NEW) and stored (bytes in the delta).
        changed: Elements that differ, in all tensors.
        elements: Elements of NEW.
        bytes_new: Bytes of NEW's tensors.
        bytes_total: Bytes of the delta.
        files: Its files.
        disk_free: Free bytes where it is written.
        notes: Sentences for the user.
        dry_run: Whether nothing was written.
        seconds: Time it took.
        hashes: SHA-256 by file, if asked for.
    """

    old: dict[str, Any]
    new: dict[str, Any]
    path: str
    codings: dict[str, int]
    tensors: list[dict[str, Any]]
    changed: int
    elements: int
    bytes_new: int
    bytes_total: int
    files: list[dict[str, Any]]
    disk_free: int
    notes: list[str]
    dry_run: bool
    seconds: float
    hashes: dict[str, str]
    ranks: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {"schema": SCHEMA, **asdict(self)}


def make_delta(
    old: str | Path,
    new: str | Path,
    out: str | Path,
    *,
    hf_reference: str | Path | None = None,
    old_source: SourceOptions = SourceOptions(),  # noqa: B008  frozen
    new_source: SourceOptions = SourceOptions(),  # noqa: B008  frozen
    **how: Unpack[How],
) -> MadeDelta:
    """Makes the delta that turns the weights of one checkpoint into those of another of the same model.

    The two may have any formats and grids: tensors are compared under their Hugging Face names. The bytes of the delta
    depend on the tensors alone.

    Args:
        old: A checkpoint of any format, or `org/model@revision` on the hub.
        new: The other.
        out: The directory to create.
        hf_reference: Hugging Face directory that describes the Megatron sides.
        old_source: Facts about OLD that it does not record itself.
        new_source: Facts about NEW that it does not record itself.
        how: How the plan is carried out (`dry_run`, `overwrite`, `resume`, `threads`, `hash`, `progress`): see
            `Execution`.

    Raises:
        UsageError: The request cannot work.
        InputError: A side is damaged or incomplete, or the two are not of one model.
        UnsupportedError: No family or format of ours.
        StorageError: The destination cannot be written.
    """
    # Imported here because they import NumPy: header-only commands start faster without it.
    from ckptkit.deltas.spool import Spool
    from ckptkit.io.threads import read_all

    started = time.monotonic()
    execution = Execution(**how)
    refuse_address(out, "parts of a delta are collected beside it")
    with ExitStack() as stack:
        opened = [
            open_side(stack, path, source, name.lower(), hf_reference, headers_only=False)
            for path, source, name in zip((old, new), (old_source, new_source), SIDES, strict=True)
        ]
        _check_sides(*opened)
        check_destination(Plan(()), opened, out, execution)
        keep: Keep = _forgotten
        if not execution.dry_run:
            keep = stack.enter_context(Spool(Path(out).absolute().parent)).append
        pairs = _pairs(*(side.hf_tensors(()) for side in opened))
        coded = read_all(
            pairs,
            lambda readers, pair: _coded(readers, pair, keep),
            lambda pair: pair.nbytes,
            threads=execution.threads or moving_threads(),
            progress=execution.progress,
        )
        for index, side in enumerate(opened):
            side.seen.check(source_files(tensor for pair in pairs if (tensor := pair.sides[index]) is not None))
        manifest, files = _lay_out(opened[1].config.architecture, coded)
        comparisons = tuple(comparison for side in opened for comparison in side.comparisons)
        notes = tuple(f"{name}: {note}" for name, side in zip(SIDES, opened, strict=True) for note in side.notes)
        plan = Plan(tuple(files), comparisons, notes=(*notes, *_notes(manifest)))
        sides = [{**facts_of(side), "path": str(path)} for side, path in zip(opened, (old, new), strict=True)]
        result = carry_out(plan, opened, sides[0], {"path": str(out)}, execution, started)
    return MadeDelta(
        old={**sides[0], "model": manifest.old},
        new={**sides[1], "model": manifest.new},
        path=str(out),
        codings=counted(manifest.changes),
        tensors=[item.record() for item in coded if item.change.coding != UNCHANGED],
        changed=sum(item.changed for item in coded),
        elements=sum(pair.sides[1].numel for pair in pairs if pair.sides[1] is not None),
        bytes_new=sum(change.nbytes for change in manifest.changes if change.new is not None),
        bytes_total=result.bytes_total,
        files=result.files,
        disk_free=result.disk_free or 0,
        notes=result.notes,
        dry_run=result.dry_run,
        seconds=time.monotonic() - started,
        hashes=result.hashes,
        ranks=result.ranks,
    )


def _check_sides(old: Checkpoint, new: Checkpoint) -> None:
    """Checks that both are one model, and agree with themselves."""
    for side in (old, new):
        if side.disagreements:
            hint = "pass --hf-reference with the right config.json, which outranks the stored one"
            raise InputError(
                f"the checkpoint contradicts itself: {'; '.join(side.disagreements)}", where=side.path, hint=hint
            )
    if old.config.architecture != new.config.architecture:
        found = [f"{old.config.architecture} is in OLD, {new.config.architecture} in NEW"]
    else:
        found = config_differences(old.config, new.config, SIDES)
    if found:
        hint = "a delta is between two sets of weights of one model"
        raise InputError(f"not the same model: {'; '.join(found)}", where=new.path, hint=hint)


def _notes(manifest: Manifest) -> Iterator[str]:
    for coding, side in ((REMOVED, "OLD"), (ADDED, "NEW")):
        for change in manifest.changes:
            if change.coding == coding:
                yield f"only {side} has {change.name}"


@dataclass(frozen=True)
class _Pair:
    """A tensor in OLD and in NEW."""

    name: str
    sides: tuple[Tensor | None, Tensor | None]

    @property
    def nbytes(self) -> int:
        return sum(side.nbytes for side in self.sides if side is not None)


def _pairs(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> list[_Pair]:
    return [_Pair(name, (left.get(name), right.get(name))) for name in sorted(left.keys() | right.keys())]


@dataclass(frozen=True)
class _Coded:
    """A tensor as it is written down.

    Attributes:
        change: What the manifest says.
        pieces: What the delta holds of it, in order.
        changed: Elements that differ.
    """

    change: Change
    pieces: list[Tensor] = field(default_factory=list)
    changed: int = 0

    @property
    def stored(self) -> int:
        """Bytes in the delta."""
        return sum(piece.nbytes for piece in self.pieces)

    def record(self) -> dict[str, Any]:
        """The facts about it, for the result."""
        side = self.change.new or self.change.old
        assert side is not None
        size = self.change.nbytes
        return {
            "name": self.change.name,
            "coding": self.change.coding,
            "elements": size // DTYPES[side.dtype].itemsize,
            "changed": self.changed,
            "bytes": size if self.change.new is not None else 0,
            "stored": self.stored,
        }


def _coded(readers: Readers, pair: _Pair, keep: Keep) -> _Coded:
    """A tensor, written down in the shortest way."""
    left, right = pair.sides
    if left is not None and right is not None and (left.out_dtype, left.shape) == (right.out_dtype, right.shape):
        return _compared(readers, pair.name, left, right, keep)
    sides = [None if side is None else _hash(pair.name, side, readers.first.sha256(side)) for side in pair.sides]
    coding = REMOVED if right is None else ADDED if left is None else WHOLE
    change = Change(pair.name, coding, *sides)
    return _Coded(change) if right is None else _Coded(change, [right], right.numel)


def _hash(name: str, tensor: Tensor, sha256: str) -> TensorHash:
    return TensorHash(name, str(tensor.out_dtype), tensor.shape, sha256)


def _compared(readers: Readers, name: str, left: Tensor, right: Tensor, keep: Keep) -> _Coded:
    from ckptkit.formats.delta.codec import SAME, encode

    itemsize = left.out_dtype.itemsize
    tiling, tiles = Tiling.of(left.shape, itemsize), _Tiles(keep)
    before, changed = hashlib.sha256(), 0
    after = before  # one and the same until the first tile that differs
    for number in range(tiling.count):
        cut = tiling.cut(right, number)
        old, new = _read(readers.first, tiling.cut(left, number)), _read(readers.second, cut)
        coded = encode(old, new, itemsize)
        if coded.coding != SAME and after is before:
            after = before.copy()
        before.update(old.data)
        if after is not before:
            after.update(new.data)
        tiles.add(coded.coding, coded.data, cut, new)
        changed += coded.changed
    hashes = _hash(name, left, before.hexdigest()), _hash(name, right, after.hexdigest())
    if not changed:
        return _Coded(Change(name, UNCHANGED, hashes[0], hashes[0]))
    pieces = tiles.finished()
    if sum(piece.nbytes for piece in pieces) < right.nbytes:
        return _Coded(Change(name, CHANGED, *hashes), pieces, changed)
    return _Coded(Change(name, WHOLE, *hashes), [right], changed)


def _read(reader: TensorReader, tensor: Tensor) -> Bytes:
    """All bytes of a small tensor."""
    import numpy as np

    found, end = np.empty(tensor.nbytes, np.uint8), 0
    for chunk in reader.chunks(tensor):
        found[end : end + len(chunk)] = chunk
        end += len(chunk)
    return found


class _Tiles:
    """Collects the tiles of a tensor and their table."""

    def __init__(self, keep: Keep) -> None:
        self._keep = keep
        self._held = bytearray()
        self._table = bytearray()
        self._pieces: list[Tensor] = []

    def add(self, coding: int, data: bytes, cut: Tensor, new: Bytes) -> None:
        """Adds a tile.

        Args:
            coding: Its coding.
            data: The bytes that it takes.
            cut: Where its new bytes are.
            new: Its new bytes.
        """
        from ckptkit.formats.delta.codec import WHOLE as WHOLE_TILE

        whole = coding == WHOLE_TILE
        crc = crc32(new.data if whole else data)
        self._table += ENTRY.pack(coding, len(new) if whole else len(data), crc)
        if whole:  # it need not be kept: NEW has it
            self._flush()
            self._pieces.append(cut)
            return
        self._held += data
        if len(self._held) >= _HELD:
            self._flush()

    def finished(self) -> list[Tensor]:
        """All pieces in order, the table last."""
        self._held += self._table
        self._flush()
        return self._pieces

    def _flush(self) -> None:
        if self._held:
            self._pieces.append(self._keep(bytes(self._held)))
            self._held.clear()


def _forgotten(data: bytes) -> Tensor:
    """A tensor of the size of some bytes, for a dry run."""
    return Tensor.full(DTYPES["U8"], (1, len(data)))


def _lay_out(architecture: str, coded: Sequence[_Coded]) -> tuple[Manifest, list[OutputFile]]:
    """The manifest and the files of a delta."""
    shards: list[list[_Coded]] = []
    filled = 0
    for item in coded:
        if not item.change.stored:
            continue
        if not shards or filled + item.stored > DEFAULT_SHARD_SIZE:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += item.stored
    names = file_names(len(shards))
    manifest = Manifest(architecture, tuple(item.change for item in coded), tuple(names))
    files = [_file(name, shard) for name, shard in zip(names, shards, strict=True)]
    return manifest, [OutputFile.small(MANIFEST, manifest.to_json()), *files]


def _file(path: str, shard: Sequence[_Coded]) -> OutputFile:
    """A safetensors file: whole tensors as they are, of changed ones their coded tiles as bytes."""
    header = safetensors.build_header({item.change.name: _described(item) for item in shard}, {})
    base = len(header.raw)
    segments = [Segment(0, literal(header.raw))]
    for item in shard:
        at = base + header.entries[item.change.name].start
        for piece in item.pieces:
            if piece.nbytes:
                segments.append(Segment(at, piece, item.change.name))
            at += piece.nbytes
    return OutputFile(path, base + header.data_size, tuple(segments), tensors=len(shard))


def _described(item: _Coded) -> Tensor:
    """A tensor with the type and shape that stand in the header."""
    if item.change.coding == CHANGED:
        return Tensor.full(DTYPES["U8"], (item.stored,))
    return item.pieces[0]
