"""`hash`: SHA-256 of every tensor, whatever the layout, and of every file.

A tensor's hash is that of its row-major, little-endian bytes, as safetensors stores them, under its Hugging Face name:
a Hugging Face directory and any Megatron conversion of it give the same.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ckptkit.checkpoints.locating import Place, find_place
from ckptkit.checkpoints.sources import open_source
from ckptkit.errors import UsageError
from ckptkit.formats.links import CACHES, is_linked_folder
from ckptkit.formats.sidecar import FOLDER
from ckptkit.formats.torch_legacy import TRACKER
from ckptkit.io.hashes import TensorHash, hash_of_model
from ckptkit.io.reading import hash_file
from ckptkit.io.regular import walk
from ckptkit.io.threads import Progress, Readers, read_all
from ckptkit.tensors import Region, Tensor

PARTS = ("tensors", "files")

SCHEMA = 1
"""Version of the JSON; it rises when a field goes away or changes its meaning."""


@dataclass(frozen=True)
class FileHash:
    """A file, relative to the checkpoint, and the SHA-256 of its bytes."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Hashes:
    """The hashes of a checkpoint.

    Attributes:
        path: Where it is.
        format: Its format.
        architecture: Hugging Face class name.
        grid: The stored grid.
        model: SHA-256 over the sorted lines `<name> <dtype> <shape> <sha256>` of its tensors, or None without them.
        tensors: Tensors in order of their names.
        files: Files in order of their paths.
        bytes: Bytes hashed.
        seconds: Time it took.
    """

    path: str
    format: str
    architecture: str
    grid: str
    model: str | None
    tensors: list[TensorHash]
    files: list[FileHash]
    bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The hashes as JSON values."""
        return {"schema": SCHEMA, **asdict(self)}


def hash_checkpoint(
    path: str | Path,
    *,
    only: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    hf_reference: str | Path | None = None,
    **source: Any,
) -> Hashes:
    """Hashes the tensors and the files of a checkpoint.

    Args:
        path: A checkpoint of any format, or `org/model@revision` on the hub.
        only: `tensors` or `files`, or None for both.
        threads: How many read; by default one for each core.
        progress: Called with (bytes done, bytes in all).
        hf_reference: Hugging Face directory that describes a Megatron checkpoint.
        source: Further options of `open_checkpoint`.

    Raises:
        UsageError: `only` is something else.
        InputError: The checkpoint is damaged or incomplete.
        UnsupportedError: No family or format of ours.
        StorageError: A file cannot be read.
    """
    if only not in (None, *PARTS):
        raise UsageError(f"--only {only}", hint=f"one of {', '.join(PARTS)}")
    started = time.monotonic()
    with ExitStack() as stack:
        checkpoint = open_source(stack, path, hf_reference, headers_only=False, **source)
        tensors = {} if only == "files" else checkpoint.hf_tensors(())
        files = {} if only == "tensors" else files_in(find_place(checkpoint.path, referenced=True))
        tasks = _in_order(tensors, files)
        sums = read_all(tasks, _sha256, lambda task: task.nbytes, threads=threads, progress=progress)
    found = {(type(task.target), task.name): sha256 for task, sha256 in zip(tasks, sums, strict=True)}
    hashed = [
        TensorHash(name, str(tensor.out_dtype), tensor.shape, found[Tensor, name])
        for name, tensor in sorted(tensors.items())
    ]
    return Hashes(
        path=str(path),
        format=checkpoint.format,
        architecture=checkpoint.config.architecture,
        grid=str(checkpoint.grid),
        model=hash_of_model(hashed) if hashed else None,
        tensors=hashed,
        files=[FileHash(task.name, task.nbytes, found[str, task.name]) for task in tasks if task.name in files],
        bytes=sum(task.nbytes for task in tasks),
        seconds=time.monotonic() - started,
    )


def files_in(place: Place) -> dict[str, Path]:
    """The files of a checkpoint, its tracker file and sidecar included: path relative to its root -> file."""
    found = list(_walk(place.folder))
    if place.root != place.folder:
        found += [*_walk(place.root / FOLDER), *(file for file in (place.root / TRACKER,) if file.is_file())]
    return {file.relative_to(place.root).as_posix(): file for file in sorted(found)}


def _walk(folder: Path) -> Iterator[Path]:
    """The files below a folder. What a linked folder holds counts once: at its own place, if that is in the folder."""
    top, pending, known = folder.resolve(), [folder], set[Path]()
    while pending:
        for item in walk(pending.pop(), CACHES):
            if item.is_file():
                yield item
            elif is_linked_folder(item) and not (real := item.resolve()).is_relative_to(top) and real not in known:
                known.add(real)
                pending.append(item)


@dataclass(frozen=True)
class _Task:
    """Something to hash: a tensor, or the path of a file."""

    name: str
    target: Tensor | str
    nbytes: int
    order: tuple[str, int]


def _in_order(tensors: Mapping[str, Tensor], files: Mapping[str, Path]) -> list[_Task]:
    """Tensors as they lie in their files, and each file after those that end in it: it is in the cache by then."""
    tasks = [_Task(name, tensor, tensor.nbytes, _end(tensor)) for name, tensor in tensors.items()]
    tasks += [_Task(name, str(path), path.stat().st_size, (str(path), sys.maxsize)) for name, path in files.items()]
    return sorted(tasks, key=lambda task: (task.order, task.name))


def _end(tensor: Tensor) -> tuple[str, int]:
    """The last of the files that a tensor lies in, and where in it."""
    regions = (piece for band in tensor.bands for piece in band.pieces if isinstance(piece, Region))
    return max(((region.file, region.offset) for region in regions), default=("", 0))


def _sha256(readers: Readers, task: _Task) -> str:
    return readers.first.sha256(task.target) if isinstance(task.target, Tensor) else hash_file(Path(task.target))
