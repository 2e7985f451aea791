"""Reads a delta. Everything in it is input: names, sizes, tables and compressed bytes are checked before use."""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptkit.dtypes import DTYPES
from ckptkit.errors import InputError
from ckptkit.formats import safetensors
from ckptkit.formats.delta.manifest import CHANGED, MANIFEST, Change, Manifest, file_names, read_manifest
from ckptkit.formats.delta.tiles import TILE, Tiling
from ckptkit.formats.links import check_links
from ckptkit.io.cache import Cache
from ckptkit.io.crc import crc32
from ckptkit.io.plan import source_files
from ckptkit.io.stores.opening import must_be_on_disk
from ckptkit.tensors import Region, Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

ENTRY = struct.Struct("<BII")
"""An entry of a tensor's table: the coding of a tile, the number of its bytes, and their CRC-32."""
_ENTRY = [("coding", "u1"), ("size", "<u4"), ("crc", "<u4")]

_TILE_CODINGS = ("same", "changes", "differences", "whole")
"""Names of the codings of `codec`, in the order of their numbers."""

_AGAIN = "fetch or make the delta again"
_KEPT = 16
"""Finished tiles that stay in memory."""


@dataclass(frozen=True)
class Delta:
    """An opened delta.

    Attributes:
        path: Its directory.
        manifest: What it is about.
        stored: Name -> the bytes of a tensor: the tensor itself, or (`changed`) its tiles and their table.
    """

    path: Path
    manifest: Manifest
    stored: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(tensor.nbytes for tensor in self.stored.values())

    def tiles(self, change: Change) -> ChangedTiles:
        """The tiles of a changed tensor."""
        return ChangedTiles.of(change, self.stored[change.name])

    def applied(self, change: Change, old: Tensor | None) -> Tensor:
        """A tensor of NEW.

        Args:
            change: What the delta says of it.
            old: The tensor in OLD, of the type and shape that the delta says; None if it is added.
        """
        assert change.new is not None
        if not change.stored:
            assert old is not None
            return old
        if change.coding != CHANGED:
            return self.stored[change.name]
        assert old is not None
        made = _Applied(old, self.tiles(change), change.new.sha256)
        return Tensor.from_bytes(made, DTYPES[change.new.dtype], change.new.shape)


def is_delta(folder: Path) -> bool:
    """Whether a folder holds a delta, by the names of its files."""
    return (folder / MANIFEST).is_file()


def open_delta(folder: Path) -> Delta:
    """Opens a delta; only headers are read.

    Raises:
        InputError: It is damaged, incomplete, or contradicts itself.
        UnsupportedError: A newer ckptkit wrote it.
    """
    if not is_delta(folder):
        must_be_on_disk(folder)
        what = f"not a delta: it has no {MANIFEST}" if folder.is_dir() else "no such directory"
        raise InputError(what, where=folder, hint="`ckptkit delta make` makes one")
    check_links(folder, folder)
    manifest = read_manifest(folder)
    if list(manifest.files) != file_names(len(manifest.files)):
        raise InputError("its files have other names than those of a delta", where=folder / MANIFEST, hint=_AGAIN)
    stored: dict[str, Tensor] = {}
    for name in manifest.files:
        path = folder / name
        found = safetensors.tensors_of(path, safetensors.read_header(path))
        if twice := sorted(found.keys() & stored.keys()):
            raise InputError(f"tensor {twice[0]} is in two files", where=path, hint=_AGAIN)
        stored.update(found)
    _check_stored(folder, manifest, stored)
    return Delta(folder, manifest, stored)


def _check_stored(folder: Path, manifest: Manifest, stored: Mapping[str, Tensor]) -> None:
    """Checks that the files hold what the manifest says, and no more."""
    expected = {change.name: change for change in manifest.changes if change.stored}
    if odd := sorted(expected.keys() ^ stored.keys()):
        what = f"{odd[0]} is {'missing' if odd[0] in expected else 'not named in ' + MANIFEST}"
        raise InputError(what, where=folder, hint=_AGAIN)
    for name, change in expected.items():
        tensor, side = stored[name], change.new
        if change.coding == CHANGED:
            right = tensor.dtype.name == "U8" and len(tensor.shape) == 1
        else:
            right = side is not None and (tensor.dtype.name, tensor.shape) == (side.dtype, side.shape)
        if not right:
            what = f"{name} is {tensor.dtype}{list(tensor.shape)}, which is not what {MANIFEST} says"
            raise InputError(what, where=folder, hint=_AGAIN)


@dataclass(frozen=True, eq=False)
class ChangedTiles:
    """The tiles of a changed tensor: their bytes follow one another in a file, and a table of them comes last.

    Attributes:
        name: Of the tensor.
        tiling: Its tiles.
        stored: Where the tiles and the table are.
    """

    name: str
    tiling: Tiling
    stored: Region

    @classmethod
    def of(cls, change: Change, stored: Tensor) -> ChangedTiles:
        """The tiles of a tensor.

        Raises:
            InputError: There is no room for their table.
        """
        assert change.new is not None
        tiling = Tiling.of(change.new.shape, DTYPES[change.new.dtype].itemsize)
        pieces = [piece for band in stored.bands for piece in band.pieces]
        if not tiling.count or stored.nbytes < tiling.count * ENTRY.size or not isinstance(pieces[0], Region):
            raise InputError(f"{change.name} has no table of its tiles", where=stored_in(stored), hint=_AGAIN)
        return cls(change.name, tiling, pieces[0])

    @cached_property
    def table(self) -> NDArray[Any]:
        """The tiles in order: `coding`, `start` among the stored bytes, `size` and `crc`.

        Raises:
            InputError: The table is damaged.
            StorageError: It cannot be read.
        """
        import numpy as np

        from ckptkit.formats.delta.codec import SAME, WHOLE

        count, span = self.tiling.count, self.tiling.span
        end = self.stored.rows * self.stored.width - count * ENTRY.size
        entries = np.frombuffer(self._read(end, count * ENTRY.size), np.dtype(_ENTRY))
        whole = np.fromiter((stop - start for start, stop in map(span, range(count))), np.int64, count)
        coding, size = entries["coding"], entries["size"].astype(np.int64)
        shorter = (coding > SAME) & (coding < WHOLE) & (size > 0) & (size < whole)
        sound = shorter | ((coding == SAME) & (size == 0)) | ((coding == WHOLE) & (size == whole))
        if not sound.all():
            raise self.damaged(int(np.argmin(sound)), "its entry in the table is impossible")
        if (total := int(size.sum())) != end:
            what = f"the tiles of {self.name} are {total:,} bytes, and {end:,} are there"
            raise InputError(what, where=self.stored.file, hint=_AGAIN)
        table = np.empty(count, [("coding", "u1"), ("start", "i8"), ("size", "i8"), ("crc", "i8")])
        table["coding"], table["size"], table["crc"] = coding, size, entries["crc"]
        table["start"] = np.cumsum(size) - size
        return table

    def counts(self) -> Counter[str]:
        """Coding -> number of tiles; errors as `table`."""
        found = Counter(self.table["coding"].tolist())
        return Counter({name: found[coding] for coding, name in enumerate(_TILE_CODINGS) if coding in found})

    def data(self, number: int) -> bytes:
        """The bytes of a tile as they are stored.

        Raises:
            InputError: They are damaged.
            StorageError: They cannot be read.
        """
        tile = self.table[number]
        data = self._read(int(tile["start"]), int(tile["size"])) if tile["size"] else b""
        if crc32(data) != tile["crc"]:
            raise self.damaged(number, "its checksum is another")
        return data

    def damaged(self, number: int, why: str) -> InputError:
        """That a tile is damaged."""
        return InputError(f"tile {number} of {self.name} is damaged: {why}", where=self.stored.file, hint=_AGAIN)

    def _read(self, start: int, size: int) -> bytes:
        # With NumPy, which commands that look at headers do not wait for.
        from ckptkit.io.reading import read_tensor

        where = self.stored.offset + start
        return read_tensor(Tensor.from_file(self.stored.file, where, DTYPES["U8"], (1, size))).tobytes()


def stored_in(tensor: Tensor) -> str | None:
    """The file that a stored tensor lies in, for messages."""
    return min(source_files([tensor]), default=None)


_kept: Cache[bytes] = Cache(_KEPT * TILE, len)
"""The tiles that were made last, for all threads: units of work end in the middle of tiles, and threads take turns."""


@dataclass(frozen=True, eq=False)
class _Applied:
    """The bytes of a changed tensor, as `ckptkit.tensors.Made` asks for them.

    Attributes:
        old: The tensor in OLD.
        changes: Its tiles in the delta.
        sha256: The hash of the bytes.
    """

    old: Tensor
    changes: ChangedTiles
    sha256: str

    @property
    def digest(self) -> str:
        """A digest that identifies the bytes."""
        return hashlib.sha256(f"applied {self.sha256}".encode()).hexdigest()

    @property
    def files(self) -> tuple[str, ...]:
        """The files that they are made from."""
        return tuple(sorted({*source_files([self.old]), self.changes.stored.file}))

    def __len__(self) -> int:
        return self.old.nbytes

    def read(self, start: int, stop: int) -> bytes:
        """Bytes `start:stop`, cut out of whole tiles.

        Raises:
            InputError: A tile is damaged, or a source is gone or ends early.
            StorageError: A source cannot be read.
        """
        tiling, pieces = self.changes.tiling, []
        for number in range(tiling.at(start), tiling.at(stop - 1) + 1) if start < stop else ():
            first, last = tiling.span(number)
            pieces.append(self._tile(number)[max(start - first, 0) : min(stop, last) - first])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _tile(self, number: int) -> bytes:
        return _kept.get((self, number), lambda: self._made(number))

    def _made(self, number: int) -> bytes:
        from ckptkit.formats.delta.codec import DamagedTileError, decode
        from ckptkit.io.reading import read_tensor

        data, coding = self.changes.data(number), int(self.changes.table[number]["coding"])
        old = read_tensor(self.changes.tiling.cut(self.old, number))
        try:
            return decode(coding, data, old, self.changes.tiling.itemsize).tobytes()
        except DamagedTileError as error:
            raise self.changes.damaged(number, str(error)) from None
