"""`save_hf`: a running model as a Hugging Face directory. Each rank writes its own bytes; nothing is gathered."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from ckptkit.conversion.options import Options, dtype_called
from ckptkit.conversion.planning import make_plan
from ckptkit.dtypes import DType
from ckptkit.errors import InputError, UnsupportedError
from ckptkit.io import faults
from ckptkit.io.casts import convert
from ckptkit.io.commit import Destination
from ckptkit.io.cores import moving_threads
from ckptkit.io.crew import Crew
from ckptkit.io.output import create, put
from ckptkit.io.plan import Plan
from ckptkit.io.reading import TensorReader
from ckptkit.io.system import storage_error, sync_file
from ckptkit.megatron.live.holding import Holding, owner
from ckptkit.megatron.live.known import reference_of
from ckptkit.megatron.live.standing import Standing, prepare
from ckptkit.megatron.live.together import together
from ckptkit.tensors import Band, Piece, Region, Tensor

_PIECE = 8 << 20
"""Bytes that travel from a device to the disk at a time, in each thread."""


@dataclass(frozen=True)
class SavedModel:
    """What `save_hf` wrote.

    Attributes:
        path: The directory.
        files: Path -> bytes.
        bytes_total: Bytes of all files.
        bytes_written: Bytes that this rank wrote.
        lossy: Sentences about losses that the caller asked for.
        notes: Sentences about the model.
        seconds: Time of the call.
    """

    path: Path
    files: dict[str, int]
    bytes_total: int
    bytes_written: int
    lossy: list[str]
    notes: list[str]
    seconds: float


class Move(NamedTuple):
    """A piece on its way to a file.

    Attributes:
        file: Index among the files of the plan.
        offset: Byte of the file at which its first row goes.
        pitch: Bytes of the file from one row to the next.
        piece: The piece.
        dtype: Its element type.
        cast: Element type as written, or None.
    """

    file: int
    offset: int
    pitch: int
    piece: Piece
    dtype: DType
    cast: DType | None

    @property
    def width(self) -> int:
        """Bytes of a row as written."""
        return _written(self.piece.width, self.dtype, self.cast)


def save_hf(
    model: Any,
    dst: str | Path,
    *,
    hf_reference: str | Path | None = None,
    dtype: str | None = None,
    shard_size: int | None = None,
    overwrite: bool = False,
) -> SavedModel:
    """Writes the weights of a running Megatron model as a Hugging Face directory; all ranks call this.

    The files are those that `ckptkit convert --to hf --hf-reference` makes of a checkpoint of the model. Each rank
    writes its own bytes of them: no rank needs memory for weights of others, or for a second copy of its own. What data
    parallel ranks hold alike is written once. Rank 0 writes the small files, and puts the directory in its place in one
    step when everything is durable.

    Args:
        model: A GPTModel of megatron-core or the list of its chunks, in whatever Megatron wraps them.
        dst: The directory to create, on a file system that all ranks share.
        hf_reference: Hugging Face directory with config.json, tokenizer and shard map; by default the one that
            `load_hf` read.
        dtype: Casts floating point tensors, as for `convert`.
        shard_size: Largest safetensors file in bytes.
        overwrite: Replace an existing directory, in one step.

    Raises:
        UsageError: There is no running model, no reference, or the destination exists.
        InputError: The model is not the reference's, or copies of one weight differ between ranks.
        UnsupportedError: No family of ours, or a layout whose weights must be computed.
        StorageError: The destination cannot be written.
    """
    started = time.monotonic()
    prepare(model)
    standing = together(lambda: Standing.of(model))
    reference = together(lambda: reference_of(standing.chunks, hf_reference))
    holding = together(lambda: Holding.of(standing, reference))
    options = Options(dtype=dtype_called(dtype), shard_size=shard_size)
    plan = together(lambda: make_plan(holding.checkpoint, "hf", options))
    moves = together(lambda: list(_own(plan, holding)))
    _compare(plan, holding)
    with ExitStack() as stack:
        first = dist.get_rank() == 0
        destination = together(lambda: stack.enter_context(_opened(dst, plan, reference, overwrite)) if first else None)
        partial: list[Any] = [None if destination is None else str(destination.directory)]
        dist.broadcast_object_list(partial, src=0)
        written = together(lambda: _write(plan, moves, holding, Path(partial[0])))
        together(lambda: None if destination is None else _commit(destination, plan))
    return SavedModel(
        path=Path(dst),
        files={file.path: file.size for file in plan.files},
        bytes_total=plan.nbytes,
        bytes_written=written,
        lossy=list(plan.lossy),
        notes=list(plan.notes),
        seconds=time.monotonic() - started,
    )


def _opened(dst: str | Path, plan: Plan, reference: Path, overwrite: bool) -> Destination:
    return _Opened(dst, plan, sources=[reference], overwrite=overwrite)


class _Opened(Destination):
    """A destination whose files have their sizes before any rank writes into them."""

    def __enter__(self) -> Destination:
        super().__enter__()
        try:
            for file in self._plan.files:
                create(self.directory / file.path, file.size)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self


def _commit(destination: Destination, plan: Plan) -> None:
    for file in plan.files:
        destination.journal.record(file.path, file.size, None)
    destination.commit()


def _own(plan: Plan, holding: Holding) -> Iterator[Move]:
    """What this rank writes: what is in its memory, shared with its replicas; and on rank 0 what is in no memory."""
    standing, first = holding.standing, dist.get_rank() == 0
    loads = [0] * standing.replicas
    for index, file in enumerate(plan.files):
        if file.checksums:
            raise UnsupportedError("a format with checksums", where=file.path)
        for segment in file.segments:
            for move in _moves(index, segment.offset, segment.tensor):
                key = owner(move.piece)
                if key is None and first:
                    yield move
                elif key == standing.key:
                    replica = loads.index(min(loads))
                    loads[replica] += move.piece.rows * move.piece.width
                    if replica == standing.replica:
                        yield move


def _moves(index: int, offset: int, tensor: Tensor) -> Iterator[Move]:
    for band in tensor.bands:
        pitch = sum(_written(piece.width, tensor.dtype, tensor.cast) for piece in band.pieces)
        left = offset
        for piece in band.pieces:
            move = Move(index, left, pitch, piece, tensor.dtype, tensor.cast)
            yield move
            left += move.width
        offset += pitch * band.rows


def _written(size: int, dtype: DType, cast: DType | None) -> int:
    return size if cast is None else size // dtype.itemsize * cast.itemsize


def _compare(plan: Plan, holding: Holding) -> None:
    """Whether copies that must be equal are, by the digests of what each rank holds of them.

    Raises:
        InputError: Two differ.
        UnsupportedError: They are cut in different ways.
    """
    standing = holding.standing

    def digests() -> dict[tuple[int, int, int], str]:
        return {
            (number, side, place): hashlib.sha256(_bytes(holding, region)).hexdigest()
            for number, comparison in enumerate(plan.comparisons)
            for side, tensor in enumerate((comparison.left, comparison.right))
            for place, region in enumerate(_regions(tensor))
            if standing.replica == 0 and owner(region) == standing.key
        }

    found = together(digests)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    known = {key: digest for part in everyone for key, digest in part.items()}
    for number, comparison in enumerate(plan.comparisons):
        left, right = (
            [(region.rows, region.width, known[number, side, place]) for place, region in enumerate(_regions(tensor))]
            for side, tensor in enumerate((comparison.left, comparison.right))
        )
        if [item[:2] for item in left] != [item[:2] for item in right]:
            raise UnsupportedError("two copies of one weight are cut in different ways", where=comparison.what)
        if left != right:
            raise InputError("these should be equal, and are not", where=comparison.what, hint=comparison.hint)


def _regions(tensor: Tensor) -> list[Region]:
    return [piece for band in tensor.bands for piece in band.pieces if isinstance(piece, Region)]


def _bytes(holding: Holding, region: Region) -> Any:
    return holding.rows(region).contiguous().cpu().numpy().data


def _write(plan: Plan, moves: Sequence[Move], holding: Holding, directory: Path) -> int:
    """Writes this rank's bytes and makes them durable; how many they are."""
    writer = _Writer(plan, holding, directory)
    try:
        crew = Crew(min(moving_threads(), len(moves)), "ckptkit-save")
        try:
            written = sum(crew.map(writer.write, moves))
        finally:
            crew.close()
    finally:
        writer.close()
    for index in sorted({move.file for move in moves}):
        path = directory / plan.files[index].path
        try:
            sync_file(path)
        except OSError as error:
            raise storage_error(error, path) from error
    return written


class _Writer:
    """Writes pieces into the files of a plan, from any thread."""

    def __init__(self, plan: Plan, holding: Holding, directory: Path) -> None:
        self._paths = [directory / file.path for file in plan.files]
        self._holding = holding
        self._open: dict[int, int] = {}
        self._pwrite, _ = faults.writer()

    def write(self, move: Move) -> int:
        """Writes one piece; its bytes."""
        if owner(move.piece) is not None:
            self._from_memory(move)
        else:
            self._from_elsewhere(move)
        return move.width * move.piece.rows

    def _from_memory(self, move: Move) -> None:
        rows = self._holding.rows(move.piece)
        if move.pitch == move.width and rows.is_contiguous():
            rows = rows.reshape(1, -1)
        height, width = rows.shape
        step = max(1, _PIECE // width)
        for top in range(0, height, step):
            span = _PIECE if width > _PIECE else width
            for left in range(0, width, span):
                part = rows[top : top + step, left : left + span].contiguous().cpu().numpy()
                at = move.offset + top * move.pitch + _written(left, move.dtype, move.cast)
                self._put_rows(move, part, at)

    def _from_elsewhere(self, move: Move) -> None:
        piece = move.piece
        item = move.dtype.itemsize
        tensor = Tensor(move.dtype, (piece.rows, piece.width // item), (Band(piece.rows, (piece,)),))
        with TensorReader() as reader:
            done = 0  # bytes of the piece, row after row
            for chunk in reader.chunks(tensor):
                start = 0
                while start < len(chunk):
                    row, column = divmod(done, piece.width)
                    size = len(chunk) - start
                    if move.pitch != move.width:
                        size = min(size, piece.width - column)
                    at = move.offset + row * move.pitch + _written(column, move.dtype, move.cast)
                    self._put_rows(move, chunk[start : start + size].reshape(1, -1), at)
                    start, done = start + size, done + size

    def _put_rows(self, move: Move, rows: Any, offset: int) -> None:
        fd, path = self._fd(move.file), self._paths[move.file]
        for number, row in enumerate(rows):
            data = row if move.cast is None else convert(row, move.dtype, move.cast)
            put(fd, data.data, offset + number * move.pitch, path, self._pwrite)

    def _fd(self, index: int) -> int:
        fd = self._open.get(index)
        if fd is None:
            path = self._paths[index]
            try:
                fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError as error:
                raise storage_error(error, path) from error
            if (other := self._open.setdefault(index, fd)) != fd:
                os.close(fd)  # another thread was faster
            fd = other
        return fd

    def close(self) -> None:
        """Closes the files."""
        while self._open:
            os.close(self._open.popitem()[1])
