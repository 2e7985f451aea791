"""The safetensors header, strict and total: every damage has its own message.

A file is 8 bytes (little-endian header length), a JSON header, and the tensors' bytes without holes or overlaps.
Source: the format description in the safetensors repository. Our writer pads the header with spaces so that the
data starts on a page (4096 bytes), which the format allows.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from math import prod
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ckptkit.dtypes import DTYPES, DType
from ckptkit.errors import InputError, UnsupportedError
from ckptkit.formats.garbage import collection_paused
from ckptkit.formats.json_files import DuplicateKeyError, JsonError, decode
from ckptkit.io.plan import OutputFile, literal
from ckptkit.io.regular import open_header
from ckptkit.io.segments import Segment
from ckptkit.io.system import storage_error
from ckptkit.tensors import MAX_AXES, Tensor

MAX_HEADER = 100_000_000
MAX_NAMES = 1_000_000
_OUT_OF_RANGE = 1 << 63
_COLUMNS = itemgetter("dtype", "shape", "data_offsets")
ALIGNMENT = 4096
_RARE_DTYPES = {"F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}


class Entry(NamedTuple):
    """One tensor of a header: its type, shape and place from the start of the data."""

    dtype: DType
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """A parsed header.

    Attributes:
        raw: The first bytes of the file, length field included: `len(raw)` is where the data starts.
        entries: Name -> tensor, in the order of the JSON.
        metadata: The `__metadata__` strings.
    """

    raw: bytes
    entries: dict[str, Entry]
    metadata: dict[str, str]

    @property
    def data_size(self) -> int:
        """Bytes of tensor data."""
        return max([entry.stop for entry in self.entries.values()], default=0)

    def matches(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether these tensors have exactly the names, types and shapes of this header."""
        return {name: (e.dtype, e.shape) for name, e in self.entries.items()} == {
            name: (t.out_dtype, t.shape) for name, t in tensors.items()
        }


def read_header(path: Path) -> Header:
    """Reads and checks the header of a file; no tensor is read.

    Raises:
        InputError: The file is damaged, with the reason.
        UnsupportedError: A tensor has a type that ckptkit does not know.
    """
    with _opened(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if len(start) < 8 or length > MAX_HEADER or length + 8 > size or length < 2:
            _explain_start(path, start + file.read(512), size, length)
        raw = start + file.read(length)
    with collection_paused():
        header = parse_header(raw, path)
    expected = len(raw) + header.data_size
    if size < expected:
        raise InputError(
            f"truncated: the header promises {expected:,} bytes, the file has {size:,} ({expected - size:,} missing)",
            where=path,
            hint="fetch or copy it again",
        )
    if size > expected:
        raise InputError(f"{size - expected:,} trailing bytes after the last tensor", where=path)
    return header


def parse_header(raw: bytes, where: object) -> Header:
    """Parses `raw` (length field and JSON).

    Raises:
        InputError: The JSON is not a valid header: offsets must cover the data without holes or overlaps.
        UnsupportedError: A tensor has a type that ckptkit does not know.
    """
    try:
        fields = decode(raw[8:])
    except DuplicateKeyError as error:
        raise InputError(f"tensor {error.key} appears twice in the header", where=where) from None
    except JsonError as error:
        reason = "it starts with zeros: preallocated but never written" if not raw[8:].strip(b"\0") else str(error)
        raise InputError(f"the header is not valid JSON ({reason})", where=where) from None
    if not isinstance(fields, dict):
        raise InputError("the header is not a JSON object", where=where)
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError("__metadata__ must map strings to strings", where=where)
    if len(fields) > MAX_NAMES:
        raise InputError(f"the header names {len(fields):,} tensors, at most {MAX_NAMES:,} are read", where=where)
    entries = _entries(fields, where)
    _check_cover(entries, where)
    return Header(raw, entries, metadata)


def tensors_of(path: Path, header: Header) -> dict[str, Tensor]:
    """The tensors of a file as recipes."""
    file, base = str(path), len(header.raw)
    kinds: dict[tuple[DType, tuple[int, ...]], Callable[[int], Tensor]] = {}
    tensors = {}
    with collection_paused():
        for name, (dtype, shape, start, _) in header.entries.items():
            if (dtype, shape) not in kinds:
                kinds[dtype, shape] = Tensor.alike(file, dtype, shape)
            tensors[name] = kinds[dtype, shape](base + start)
    return tensors


def build_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Header:
    """A header for tensors stored one after the other in the given order, padded so that data starts on a page."""
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, tensor in tensors.items():
        fields[name] = {
            "dtype": tensor.out_dtype.name,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return parse_header(struct.pack("<Q", len(text)) + text, "header")


def lay_out(path: str, tensors: Mapping[str, Tensor], header: Header | None = None) -> OutputFile:
    """A safetensors file of `tensors`.

    Args:
        path: Relative path of the output.
        tensors: The tensors to store; the order is kept.
        header: An existing header that `tensors` match; by default one is built.
    """
    header = header or build_header(tensors, {"format": "pt"})
    base = len(header.raw)
    segments = [
        Segment(base + header.entries[name].start, tensor, name) for name, tensor in tensors.items() if tensor.nbytes
    ]
    segments.sort(key=lambda segment: segment.offset)
    return OutputFile(path, base + header.data_size, (Segment(0, literal(header.raw)), *segments), tensors=len(tensors))


def _opened(path: Path) -> BinaryIO:
    try:
        return open_header(path)
    except FileNotFoundError:
        raise InputError("no such file", where=path) from None
    except OSError as error:
        raise storage_error(error, path) from error


def _entries(fields: Mapping[str, Any], where: object) -> dict[str, Entry]:
    """The entries of a header. There are up to a million, of few types and shapes, so each of these is checked once."""
    if not _well_formed(fields.values()):
        bad = next(name for name, value in fields.items() if not _well_formed([value]))
        raise InputError(f"the header entry of tensor {bad} is malformed", where=where)
    kinds: dict[tuple[str, tuple[int, ...]], tuple[DType, tuple[int, ...], int]] = {}
    entries = {}
    for name, (dtype, axes, (start, stop)) in zip(fields, map(_COLUMNS, fields.values()), strict=True):
        shape = tuple(axes)
        kind = kinds.get((dtype, shape))
        if kind is None:
            known = _dtype(dtype, name, where)
            kind = kinds[dtype, shape] = (known, shape, prod(shape) * known.itemsize)
        known, shape, needed = kind
        if stop - start != needed:
            raise InputError(
                f"tensor {name} ({dtype}{list(shape)}) needs {needed:,} bytes, its offsets span {stop - start:,}",
                where=where,
            )
        entries[name] = Entry(known, shape, start, stop)
    return entries


def _dtype(dtype: str, name: str, where: object) -> DType:
    known = DTYPES.get(dtype)
    if known is None:
        hint = "convert from the unquantised weights" if dtype in _RARE_DTYPES else "is it from a newer safetensors?"
        raise UnsupportedError(f"tensor {name} has the unknown dtype {dtype}", where=where, hint=hint)
    return known


def _well_formed(values: Collection[Any]) -> bool:
    """Whether all of these are descriptions of tensors: a type's name, a list of sizes, and a list of two offsets.

    There are millions of numbers in them: loops of Python would take most of the time of opening a model.
    """
    try:
        columns = list(map(_COLUMNS, values))
    except (TypeError, KeyError, IndexError):
        return False
    dtypes, shapes, offsets = zip(*columns, strict=True) if columns else ((), (), ())
    if not (_only(str, dtypes) and _only(list, shapes) and _only(list, offsets)):
        return False
    if max(map(len, shapes), default=0) > MAX_AXES or not set(map(len, offsets)) <= {2}:
        return False
    numbers = list(chain.from_iterable(chain(shapes, offsets)))
    return _only(int, numbers) and min(numbers, default=0) >= 0 and max(numbers, default=0) < _OUT_OF_RANGE


def _only(kind: type, values: Iterable[object]) -> bool:
    """Whether nothing has another type; True is no int here."""
    return set(map(type, values)) <= {kind}


def _check_cover(entries: Mapping[str, Entry], where: object) -> None:
    at, previous = 0, "the header"
    for start, stop, name in sorted([(entry.start, entry.stop, name) for name, entry in entries.items()]):
        if start < at:
            raise InputError(f"tensors {previous} and {name} overlap", where=where)
        if start > at:
            raise InputError(f"{start - at:,} bytes between {previous} and {name} belong to no tensor", where=where)
        at, previous = stop, name


def _explain_start(path: Path, head: bytes, size: int, length: int) -> None:
    """Names the usual ways in which a file is not safetensors at all."""
    text = head.lstrip().lower()
    if not size:
        raise InputError("empty file", where=path, hint="fetch or copy it again")
    if text.startswith(b"version https://git-lfs"):
        raise InputError("a Git-LFS pointer, not the weights", where=path, hint="run `git lfs pull`")
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise InputError("an HTML page, not the weights", where=path, hint="the download failed; fetch it again")
    if not head.strip(b"\0"):
        raise InputError("starts with zeros: preallocated but never written", where=path, hint="fetch or copy it again")
    if length > MAX_HEADER:
        raise InputError(
            f"not a safetensors file, or a damaged one (header of {length:,} bytes, at most {MAX_HEADER:,} allowed)",
            where=path,
        )
    raise InputError(
        f"truncated inside the header ({size:,} bytes, the header alone needs {length + 8:,})",
        where=path,
        hint="fetch or copy it again",
    )
