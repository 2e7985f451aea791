"""How a tile of new values is written down, given the old ones: bytes in, bytes out, every bit the same.

The difference of two elements is that of their bits as unsigned numbers, modulo 2 to their width, folded so that small
steps in either direction are small numbers: 0, -1, 1, -2, 2 become 0, 1, 2, 3, 4. A step of a float to its neighbour is
such a small step, whatever its sign and exponent. No value is special: NaNs and negative zeros are bits like others.

Four codings, of which the shortest counts:

- `SAME`: nothing.
- `CHANGES`: the elements that differ: for each the distance from the one before, and the difference.
- `DIFFERENCES`: the differences of all elements.
- `WHOLE`: the new bytes.

Bytes of equal weight are put side by side (first all lowest bytes, then the next), and compressed with DEFLATE. Its
run-length strategy is both faster and smaller here than searching for repeated strings.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Bits = NDArray[Any]

SAME, CHANGES, DIFFERENCES, WHOLE = range(4)

_UNSIGNED: dict[int, np.dtype[Any]] = {1: np.dtype("<u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}
_HEAD = struct.Struct("<IB")  # number of changes, bytes of a distance
_DISTANCES = (1, 2, 4)
_LEVEL, _RAW, _MEMORY = 1, -15, 9
# `CHANGES` is the shorter of the two until half of the elements differ, and far from there only one of them is tried.
_FEW, _MANY = 0.25, 0.75


class Coded(NamedTuple):
    """A tile as it is written down.

    Attributes:
        coding: Its coding.
        data: The bytes that it takes; none for `SAME`, and for `WHOLE` none either: it stands for the new bytes.
        changed: Number of elements that differ.
    """

    coding: int
    data: bytes
    changed: int


class DamagedTileError(ValueError):
    """The bytes of a tile are not what a writer puts there; the message says why."""


def encode(old: Bytes, new: Bytes, itemsize: int) -> Coded:
    """The shortest coding of a tile.

    Args:
        old: The old bytes, whole elements.
        new: The new bytes, as many.
        itemsize: Bytes of an element: 1, 2, 4 or 8.
    """
    if np.array_equal(old, new):
        return Coded(SAME, b"", 0)
    difference = _fold(_bits(new, itemsize) - _bits(old, itemsize))
    changed = int(np.count_nonzero(difference))
    found: list[tuple[int, bytes]] = []
    share = changed / len(difference)
    if share <= _MANY:
        found.append((CHANGES, _changes(difference)))
    if share >= _FEW:
        found.append((DIFFERENCES, _deflate(_planes(difference))))
    coding, data = min(found, key=lambda item: len(item[1]))
    return Coded(coding, data, changed) if len(data) < len(new) else Coded(WHOLE, b"", changed)


def decode(coding: int, data: bytes, old: Bytes, itemsize: int) -> Bytes:
    """The new bytes of a tile.

    Args:
        coding: Its coding.
        data: The bytes that it takes.
        old: The old bytes.
        itemsize: Bytes of an element.

    Raises:
        DamagedTileError: The bytes are not what `encode` gives. No more memory is taken than for a sound tile.
    """
    if coding == SAME and not data:
        return old
    if coding == WHOLE and len(data) == len(old):
        return np.frombuffer(data, np.uint8)
    before = _bits(old, itemsize)
    if coding == DIFFERENCES:
        return _bytes(before + _unfold(_unplanes(_inflate(data, len(old)), len(before), itemsize)))
    if coding != CHANGES:
        raise DamagedTileError("its coding does not exist, or its size does not fit")
    places, difference = _read_changes(data, len(before), itemsize)
    after = before.copy()
    after[places] += _unfold(difference)
    return _bytes(after)


def _changes(difference: Bits) -> bytes:
    changed = np.flatnonzero(difference != 0)
    distances = (np.diff(changed, prepend=-1) - 1).astype("<u4")
    size = next(size for size in _DISTANCES if int(distances.max()) >> 8 * size == 0)
    planes = _planes(distances)[: size * len(changed)]
    return _HEAD.pack(len(changed), size) + _deflate(np.concatenate([planes, _planes(difference[changed])]))


def _read_changes(data: bytes, elements: int, itemsize: int) -> tuple[NDArray[np.int64], Bits]:
    """Places of changed elements, increasing, and their differences."""
    if len(data) < _HEAD.size:
        raise DamagedTileError("it is too short")
    count, size = _HEAD.unpack_from(data)
    if not 0 < count <= elements or size not in _DISTANCES:
        raise DamagedTileError(f"{count} changes of {elements} elements, or distances of {size} bytes")
    planes = _inflate(data[_HEAD.size :], count * (size + itemsize))
    places = _unplanes(planes[: count * size], count, size).astype(np.int64)
    places += 1
    np.cumsum(places, out=places)
    places -= 1
    if places[-1] >= elements:
        raise DamagedTileError(f"it changes element {places[-1]} of {elements}")
    difference = _unplanes(planes[count * size :], count, itemsize)
    if not difference.all():
        raise DamagedTileError("one of its changes changes nothing")
    return places, difference


def _bits(data: Bytes, itemsize: int) -> Bits:
    return data.view(_UNSIGNED[itemsize])


def _bytes(bits: Bits) -> Bytes:
    return bits.view(np.uint8)


def _fold(difference: Bits) -> Bits:
    """Numbers modulo 2^n, so that those near 0 from either side become small."""
    one = difference.dtype.type(1)
    negative = difference >> difference.dtype.type(8 * difference.itemsize - 1)
    folded: Bits = (difference << one) ^ (~negative + one)
    return folded


def _unfold(folded: Bits) -> Bits:
    one = folded.dtype.type(1)
    difference: Bits = (folded >> one) ^ (~(folded & one) + one)
    return difference


def _planes(values: Bits) -> Bytes:
    """All lowest bytes, then all of the next weight, and so on."""
    size = values.itemsize
    return np.ascontiguousarray(_bytes(np.ascontiguousarray(values)).reshape(-1, size).T).reshape(-1)


def _unplanes(planes: Bytes, count: int, size: int) -> Bits:
    return np.ascontiguousarray(planes.reshape(size, count).T).reshape(-1).view(_UNSIGNED[size])


def _deflate(data: Bytes) -> bytes:
    made = zlib.compressobj(_LEVEL, zlib.DEFLATED, _RAW, _MEMORY, zlib.Z_RLE)
    return made.compress(data.data) + made.flush()


def _inflate(data: bytes, size: int) -> Bytes:
    """The content of compressed bytes, which has a known size: no more than that is ever unpacked."""
    reader = zlib.decompressobj(_RAW)
    try:
        found = reader.decompress(data, size + 1)
    except zlib.error as error:
        raise DamagedTileError(f"it cannot be decompressed ({error})") from None
    if len(found) != size or not reader.eof or reader.unconsumed_tail or reader.unused_data:
        raise DamagedTileError(f"it does not decompress to {size} bytes")
    return np.frombuffer(found, np.uint8)
