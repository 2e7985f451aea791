"""Reads and writes tensors byte by byte, as slowly and plainly as possible: what the fast code is compared with."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ckptkit.dtypes import TORCH_DTYPE_NAMES
from ckptkit.io.plan import OutputFile
from ckptkit.tensors import Const, Literal, Region, Tensor


def contents(tensor: Tensor) -> bytes:
    """The row-major bytes of a tensor as stored, without its cast."""
    return b"".join(_row(piece, row) for band in tensor.bands for row in range(band.rows) for piece in band.pieces)


def _row(piece: Region | Literal | Const, row: int) -> bytes:
    if isinstance(piece, Const):
        return piece.pattern * (piece.width // len(piece.pattern))
    start = piece.offset + row * piece.pitch
    if isinstance(piece, Literal):
        return piece.data[start : start + piece.width]
    with open(piece.file, "rb") as file:
        file.seek(start)
        data = file.read(piece.width)
    assert len(data) == piece.width
    return data


def as_torch(tensor: Tensor) -> Any:
    """The tensor as torch's, cast as marked."""
    import torch

    dtype = getattr(torch, TORCH_DTYPE_NAMES[tensor.dtype])
    data = bytearray(contents(tensor))
    made = torch.frombuffer(data, dtype=torch.uint8).view(dtype) if data else torch.empty(0, dtype=dtype)
    return made.reshape(tensor.shape).to(getattr(torch, TORCH_DTYPE_NAMES[tensor.out_dtype]))


def torch_bytes(tensor: Any) -> bytes:
    """The row-major bytes of a torch tensor."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


def write_out(file: OutputFile, folder: Path) -> Path:
    """Writes a layout: segments at their offsets, then the checksums."""
    path = folder / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w+b") as out:
        out.truncate(file.size)
        end = 0
        for segment in file.segments:
            assert segment.offset >= end, "segments overlap or are out of order"
            data = torch_bytes(as_torch(segment.tensor)) if segment.tensor.cast else contents(segment.tensor)
            assert len(data) == segment.tensor.nbytes
            end = segment.offset + len(data)
            out.seek(segment.offset)
            out.write(data)
        assert end <= file.size
        for checksum in file.checksums:
            out.seek(checksum.start)
            value = zlib.crc32(out.read(checksum.stop - checksum.start))
            for at in checksum.at:
                out.seek(at)
                out.write(value.to_bytes(4, "little"))
    return path


def leaves(value: object) -> Iterator[object]:
    """Everything in containers that is no container."""
    if isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield value
