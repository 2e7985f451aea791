"""The zip container of torch.save: members stored as they are, aligned, zip64 where it is needed.

Reading is strict and total: the directory, every local header and their agreement are checked, because offsets into
the file are all that is kept. Writing gives, byte for byte, what torch's writer (miniz) gives for the same members.
Source: APPNOTE.TXT 6.3.10 (PKWARE), sections 4.3 and 4.5.3; alignment, padding and the choice of fields were measured
on files of torch 2.13.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ckptkit.errors import InputError, StorageError, UnsupportedError
from ckptkit.io.crc import crc32
from ckptkit.io.plan import literal
from ckptkit.io.regular import open_regular
from ckptkit.io.segments import Checksum, Segment
from ckptkit.io.stores.mirror import mirrored, prepare
from ckptkit.tensors import Tensor

ALIGNMENT = 64
_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_LOCATOR64 = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_DESCRIPTOR, _UTF8 = 8, 0x800
_CODED = 1 | 0x20 | 0x40  # flags of bytes that are not the content: encrypted, a patch, strongly encrypted
_MASKED = 0x2000  # the directory itself is encrypted
MAX_SMALL = 400_000_000
"""Largest size in bytes of a part that is read as a whole: a directory, or a record that is no tensor."""
_AGAIN = "fetch or copy it again"


@dataclass(frozen=True, slots=True)
class Member:
    """One member: `size` bytes at byte `offset` of the file; `plain` unless they are compressed or encrypted."""

    name: str
    offset: int
    size: int
    crc: int
    plain: bool

    @property
    def checked(self) -> bool:
        """Whether it has a checksum: torch writes zeros after `torch.serialization.set_crc32_options(False)`."""
        return self.crc != 0


@dataclass(frozen=True)
class Archive:
    """The directory of a zip file.

    Attributes:
        path: The file that holds it.
        members: By full name, in the order of the directory.
    """

    path: Path
    members: dict[str, Member]

    def find(self, name: str) -> Member | None:
        """A member whose bytes can be used where they lie, or None if there is none of that name.

        Raises:
            UnsupportedError: It is compressed or encrypted.
        """
        member = self.members.get(name)
        if member is not None and not member.plain:
            raise UnsupportedError(
                f"record {name} is compressed or encrypted", where=self.path, hint="write it with torch.save"
            )
        return member

    def read(self, name: str) -> bytes | None:
        """The bytes of a small member, or None if there is none of that name.

        Raises:
            InputError: They do not have the checksum that the directory promises.
            UnsupportedError: They are compressed or encrypted, or more than a small member has.
        """
        member = self.find(name)
        if member is None:
            return None
        if member.size > MAX_SMALL:
            raise UnsupportedError(f"record {member.name} alone has {member.size:,} bytes", where=self.path)
        with _Window(self.path, 0, None) as window:
            data = window.read(member.offset, member.size, f"record {member.name}")
        if member.checked and crc32(data) != member.crc:
            raise InputError(f"record {member.name} is damaged: its checksum is wrong", where=self.path, hint=_AGAIN)
        return data


def open_archive(path: str | Path, start: int = 0, length: int | None = None) -> Archive:
    """Reads the directory of an archive that fills bytes `start` to `start + length` of a file, by default all of it.

    Offsets of members count from the start of the file.

    Raises:
        InputError: The file is missing or the archive is damaged, with the reason.
        StorageError: The file cannot be read.
    """
    with _Window(Path(path), start, length) as window:
        end, directory_end = _read_end(window)
        entries = _read_central(window, end, directory_end)
        window.expect((entry.header, entry.header + _LOCAL.size + len(entry.name.encode())) for entry in entries)
        members = {entry.name: _locate(window, entry) for entry in entries}
    _check_apart(window, entries, members, end.start)
    return Archive(Path(path), members)


def read_start(path: Path, start: int, length: int | None, size: int) -> bytes:
    """The first bytes, at most `size`, of a range of a file.

    Raises:
        InputError: The file is missing or ends before the range.
        StorageError: The file cannot be read.
    """
    with _Window(path, start, length) as window:
        return window.read(0, min(size, window.size), "the start")


def is_archive(path: Path, start: int, length: int | None) -> bool:
    """Whether a range of a file starts as an archive does.

    Raises:
        InputError: The file is missing or ends before the range.
        StorageError: The file cannot be read.
    """
    return read_start(path, start, length, 4) == b"PK\x03\x04"


class _Window:
    """A range of a file as if it were a file, read with bounds checked."""

    def __init__(self, path: Path, start: int, length: int | None) -> None:
        self.path = path
        self._remote = mirrored(path)
        try:
            self._fd = open_regular(path) if self._remote is None else -1
        except FileNotFoundError:
            raise InputError("no such file", where=path) from None
        except OSError as error:
            raise StorageError(f"cannot be opened ({error.strerror})", where=path) from None
        available = os.fstat(self._fd).st_size if self._remote is None else self._remote.about.size
        self.start = start
        self.size = available - start if length is None else length
        if start < 0 or self.size < 0 or start + self.size > available:
            self.close()
            raise InputError(
                f"bytes {start:,} to {start + self.size:,} are wanted, the file has {available:,}",
                where=path,
                hint=_AGAIN,
            )

    def __enter__(self) -> _Window:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        if self._remote is None:
            os.close(self._fd)

    def expect(self, spans: Iterable[tuple[int, int]]) -> None:
        """Says what is read next, (first byte, end) of each piece: a store is then asked for all at once."""
        if self._remote is not None:
            prepare({self.path: [(self.start + first, self.start + end) for first, end in spans]})

    def read(self, offset: int, size: int, what: str) -> bytes:
        """Exactly `size` bytes at `offset` of the window."""
        if offset < 0 or offset + size > self.size:
            raise self.damage(f"{what} ends beyond the end of the archive")
        if self._remote is not None:
            return self._remote.header(self.start + offset, size)
        try:
            data = os.pread(self._fd, size, self.start + offset)
            while len(data) < size and (more := os.pread(self._fd, size - len(data), self.start + offset + len(data))):
                data += more
        except OSError as error:
            raise StorageError(f"cannot be read ({error.strerror})", where=self.path) from None
        if len(data) < size:
            raise self.damage(f"{what} is cut off")
        return data

    def damage(self, reason: str) -> InputError:
        """The archive contradicts itself."""
        return InputError(f"damaged zip archive: {reason}", where=self.path, hint=_AGAIN)


@dataclass(frozen=True, slots=True)
class _End:
    """Where the central directory lies, and how many entries it has."""

    start: int
    size: int
    entries: int


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    header: int
    size: int
    crc: int
    plain: bool


def _read_end(window: _Window) -> tuple[_End, int]:
    """The end record, and the byte before which the central directory must end."""
    at, fields = _find_end(window)
    _, disk, first_disk, here, total, size, start, _ = fields
    end = _End(start, size, total)
    limit = at
    if here != total or disk or first_disk:
        raise window.damage("it is one of several parts")
    if at >= _LOCATOR64.size:
        locator = _LOCATOR64.unpack(window.read(at - _LOCATOR64.size, _LOCATOR64.size, "the zip64 locator"))
        if locator[0] == b"PK\x06\x07":
            limit = locator[2]
            end64 = _read_end64(window, limit)
            if not all(
                small in (full, large)
                for small, full, large in (
                    (total, _FULL16, end64.entries),
                    (size, _FULL32, end64.size),
                    (start, _FULL32, end64.start),
                )
            ):
                raise window.damage("its two end records disagree")
            end = end64
    if end.size > MAX_SMALL or end.start + end.size > limit:
        raise window.damage("its directory does not end before its end record")
    return end, limit


def _find_end(window: _Window) -> tuple[int, tuple[bytes, int, int, int, int, int, int, int]]:
    """Offset and fields of the end record: the last bytes, or followed by a comment."""
    for reach in (_END.size, _END.size + _FULL16):
        tail_at = max(window.size - reach, 0)
        tail = window.read(tail_at, window.size - tail_at, "the end")
        found = tail.rfind(b"PK\x05\x06")
        while found >= 0:
            if len(tail) - found >= _END.size:
                fields = _END.unpack_from(tail, found)
                if fields[-1] == len(tail) - found - _END.size:
                    return tail_at + found, fields
            found = tail.rfind(b"PK\x05\x06", 0, found)
    raise InputError(
        "truncated or not a zip archive: the directory at its end is missing", where=window.path, hint=_AGAIN
    )


def _read_end64(window: _Window, at: int) -> _End:
    fields = _END64.unpack(window.read(at, _END64.size, "the zip64 end record"))
    magic, _, _, _, disk, first_disk, here, total, size, start = fields
    if magic != b"PK\x06\x06" or here != total or disk or first_disk:
        raise window.damage("its zip64 end record is not one")
    return _End(start, size, total)


def _read_central(window: _Window, end: _End, limit: int) -> list[_Entry]:
    data = window.read(end.start, end.size, "the directory")
    entries: list[_Entry] = []
    seen: set[str] = set()
    at = 0
    while at < len(data):
        entry, at = _parse_entry(window, data, at)
        if entry.name in seen:
            raise window.damage(f"record {entry.name} appears twice")
        seen.add(entry.name)
        entries.append(entry)
    if not entries:
        raise window.damage("it has no records")
    if len(entries) != end.entries:
        raise window.damage(f"its directory lists {len(entries)} records instead of {end.entries}")
    return entries


def _parse_entry(window: _Window, data: bytes, at: int) -> tuple[_Entry, int]:
    if len(data) - at < _CENTRAL.size:
        raise window.damage("its directory is cut off")
    fields = _CENTRAL.unpack_from(data, at)
    magic, _, _, flags, method, _, _, crc, stored, size, *lengths, disk, _, _, header = fields
    at += _CENTRAL.size
    stop = at + sum(lengths)
    if magic != b"PK\x01\x02" or stop > len(data) or disk not in (0, _FULL16):
        raise window.damage("its directory holds something else")
    name = _decode_name(window, data[at : at + lengths[0]])
    extra = data[at + lengths[0] : at + lengths[0] + lengths[1]]
    size, stored, header = _widen(window, name, extra, size, stored, header)
    if flags & _MASKED:
        raise window.damage(f"record {name} has a masked header")
    plain = method == 0 and not flags & _CODED
    if plain and stored != size:
        raise window.damage(f"record {name} has two sizes")
    return _Entry(name, header, stored, crc, plain), stop


def _decode_name(window: _Window, raw: bytes) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise window.damage("a record has an unreadable name") from None
    if not name.isprintable():
        raise window.damage("a record has an unreadable name")
    return name


def _widen(window: _Window, name: str, extra: bytes, *fields: int) -> list[int]:
    """Replaces saturated 32-bit fields by the 64-bit ones of the zip64 extra field, in its fixed order."""
    wide = b""
    while len(extra) >= 4:
        tag, length = struct.unpack_from("<2H", extra)
        if tag == 1:
            wide = extra[4 : 4 + length]
        extra = extra[4 + length :]
    result: list[int] = []
    for value in fields:
        if value == _FULL32:
            if len(wide) < 8:
                raise window.damage(f"record {name} lacks its 64-bit size or offset")
            value, wide = int.from_bytes(wide[:8], "little"), wide[8:]
        result.append(value)
    return result


def _locate(window: _Window, entry: _Entry) -> Member:
    """Where the bytes are: only the local header knows how long it is."""
    raw_name = entry.name.encode()
    header = window.read(entry.header, _LOCAL.size + len(raw_name), f"the header of record {entry.name}")
    magic, *_, name_length, extra_length = _LOCAL.unpack_from(header)
    if magic != b"PK\x03\x04" or name_length != len(raw_name) or header[_LOCAL.size :] != raw_name:
        raise window.damage(f"record {entry.name} does not start where the directory says")
    offset = entry.header + len(header) + extra_length
    return Member(entry.name, window.start + offset, entry.size, entry.crc, entry.plain)


def _check_apart(window: _Window, entries: list[_Entry], members: dict[str, Member], directory: int) -> None:
    """Records must not overlap each other or the directory: a wrong size would otherwise pass for data."""
    ordered = sorted(entries, key=lambda entry: entry.header)
    following = [entry.header for entry in ordered[1:]] + [directory]
    for entry, limit in zip(ordered, following, strict=True):
        if members[entry.name].offset - window.start + entry.size > limit:
            raise window.damage(f"record {entry.name} runs into the next one")


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of an archive, for an `OutputFile`. Offsets count from the start of the archive."""

    size: int
    segments: tuple[Segment, ...]
    checksums: tuple[Checksum, ...]


def lay_out_archive(records: Iterable[tuple[str, bytes | Tensor, str]]) -> Layout:
    """An archive of records (full name, content, label), in the given order.

    Bytes at hand are checksummed here; the checksum of a tensor goes to a `Checksum` and is zero in the literals. The
    label names the segment of a tensor. Dates are zero, so the same records give the same bytes.
    """
    writer = _Writer()
    for name, content, label in records:
        writer.add(name.encode(), content, label)
    return writer.finish()


class _Writer:
    """Lays out members one after the other; bytes between tensors collect in one literal."""

    def __init__(self) -> None:
        self._segments: list[Segment] = []
        self._spans: list[tuple[int, int, int, int]] = []
        self._central: list[bytes] = []
        self._central_size = 0
        self._pending = bytearray()
        self._cursor = 0

    def add(self, name: bytes, content: bytes | Tensor, label: str) -> None:
        header = self._cursor
        size = len(content) if isinstance(content, bytes) else content.nbytes
        crc = crc32(content) if isinstance(content, bytes) else 0
        self._emit(_local_header(name, header, size))
        start = self._cursor
        if isinstance(content, bytes):
            self._emit(content)
        elif size:
            self._flush()
            self._segments.append(Segment(start, content, label))
            self._cursor += size
        descriptor = self._cursor
        if size:
            wide = header >= _FULL32 or size >= _FULL32
            self._emit(struct.pack("<4sL2Q" if wide else "<4s3L", b"PK\x07\x08", crc, size, size))
        if size and not isinstance(content, bytes):
            self._spans.append((start, start + size, descriptor + 4, self._central_size + 16))
        self._central.append(_central_entry(name, header, size, crc))
        self._central_size += len(self._central[-1])

    def finish(self) -> Layout:
        directory = self._cursor
        self._emit(b"".join(self._central))
        self._emit(_end_records(directory, self._central_size, len(self._central)))
        self._flush()
        checksums = tuple(Checksum(start, stop, (at, directory + entry)) for start, stop, at, entry in self._spans)
        return Layout(self._cursor, tuple(self._segments), checksums)

    def _emit(self, data: bytes) -> None:
        self._pending += data
        self._cursor += len(data)

    def _flush(self) -> None:
        if self._pending:
            data = bytes(self._pending)
            self._segments.append(Segment(self._cursor - len(data), literal(data)))
            self._pending.clear()


def _flags(size: int) -> int:
    """Names are UTF-8; checksum and sizes follow the data, where there is any."""
    return _UTF8 | (_DESCRIPTOR if size else 0)


def _wide_fields(header: int, size: int) -> bytes:
    """The zip64 extra field, if size or offset need one."""
    values = ([size, size] if size >= _FULL32 else []) + ([header] if header >= _FULL32 else [])
    return struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values) if values else b""


def _local_header(name: bytes, at: int, size: int) -> bytes:
    """A local header at byte `at`, padded by an `FB` field so that the data starts on a multiple of `ALIGNMENT`."""
    wide = bytearray(_wide_fields(at, size))
    if size >= _FULL32:
        wide[12:20] = bytes(8)  # the stored size; it follows the data, and miniz leaves it zero here
    padding = -(at + _LOCAL.size + len(name) + len(wide) + 4) % ALIGNMENT
    extra = wide + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    return _LOCAL.pack(b"PK\x03\x04", 0, _flags(size), 0, 0, 0, 0, 0, 0, len(name), len(extra)) + name + extra


def _central_entry(name: bytes, header: int, size: int, crc: int) -> bytes:
    wide = _wide_fields(header, size)
    small = min(size, _FULL32)
    entry = _CENTRAL.pack(
        *(b"PK\x01\x02", 0, 0, _flags(size), 0, 0, 0, crc, small, small),
        *(len(name), len(wide), 0, 0, 0, 0, min(header, _FULL32)),
    )
    return entry + name + wide


def _end_records(directory: int, size: int, entries: int) -> bytes:
    """The zip64 end record and its locator (torch always writes them), then the classic one."""
    end64 = _END64.pack(b"PK\x06\x06", _END64.size - 12, 0x031E, 45, 0, 0, entries, entries, size, directory)
    locator = _LOCATOR64.pack(b"PK\x06\x07", 0, directory + size, 1)
    few = min(entries, _FULL16)
    end = _END.pack(b"PK\x05\x06", 0, 0, few, few, min(size, _FULL32), min(directory, _FULL32), 0)
    return end64 + locator + end
