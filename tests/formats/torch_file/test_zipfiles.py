"""The zip container: zip64 against torch and zipfile, and every damage by its own message."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ckptkit.dtypes import DTYPES
from ckptkit.errors import InputError, UnsupportedError
from ckptkit.formats.torch_file.pickles import lay_out_torch_file, read_torch_file
from ckptkit.formats.torch_file.zipfiles import lay_out_archive, open_archive
from ckptkit.io.plan import OutputFile
from ckptkit.tensors import Tensor
from tests.formats.torch_file.torch_files import contents, write_out

GIB = 1 << 30


def write_sparse(file: OutputFile, path: Path) -> Path:
    """Writes the literals only; storages stay holes."""
    with path.open("wb") as out:
        out.truncate(file.size)
        for segment in file.segments:
            if not segment.name:
                out.seek(segment.offset)
                out.write(contents(segment.tensor))
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[OutputFile, Path]:
    """Five GiB in one storage, and small ones behind it."""
    tensors = {"t": Tensor.full(DTYPES["U8"], (5 * GIB,)), "u": Tensor.full(DTYPES["F32"], (3,))}
    tensors["v"] = Tensor.full(DTYPES["F32"], (0,))
    file = lay_out_torch_file("big.pt", tensors)
    return file, write_sparse(file, tmp_path_factory.mktemp("zip64") / "big.pt")


def test_zip64_headers_are_those_of_torch(large: tuple[OutputFile, Path], tmp_path: Path) -> None:
    file, path = large
    with (hole := tmp_path / "hole").open("wb") as out:
        out.truncate(5 * GIB)
    five = torch.from_file(str(hole), shared=True, size=5 * GIB, dtype=torch.uint8)
    (tmp_path / "torch").mkdir()
    with torch.serialization.skip_data():
        torch.save({"t": five, "u": torch.empty(3), "v": torch.empty(0)}, tmp_path / "torch" / "big.pt")
    with path.open("rb") as mine, (tmp_path / "torch" / "big.pt").open("rb") as theirs:
        assert mine.seek(0, 2) == theirs.seek(0, 2) == file.size
        for segment in file.segments:
            if segment.name:
                continue
            mine.seek(segment.offset)
            theirs.seek(segment.offset)
            ours, expected = (without_identity(f.read(segment.tensor.nbytes)) for f in (mine, theirs))
            assert ours == expected


def without_identity(data: bytes) -> bytes:
    """Blanks the record that depends on the contents, and its checksum."""
    digits = [at for at in range(len(data) - 40) if data[at : at + 40].isdigit()]
    crcs = {data[at + 44 : at + 48] for at in digits if data[at + 40 : at + 44] == b"PK\x07\x08"}
    for at in digits:
        data = data[:at] + b"0" * 40 + data[at + 40 :]
    for crc in crcs:
        data = data.replace(crc, b"\0\0\0\0")
    return data


def test_zip64_is_read_by_zipfile_torch_and_us(large: tuple[OutputFile, Path]) -> None:
    file, path = large
    with zipfile.ZipFile(path) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        assert archive.read("big/version") == b"3\n"
    assert sizes["big/data/0"] == 5 * GIB
    assert sizes["big/data/1"] == 12
    found = read_torch_file(path)
    assert isinstance(found, dict)
    starts = {segment.name: segment.offset for segment in file.segments if segment.name}
    for name, start in starts.items():
        assert start % 64 == 0
        assert found[name].bands[0].pieces[0].offset == start
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert loaded["t"].shape == (5 * GIB,)
    assert loaded["u"].tolist() == [0, 0, 0]
    first = next(checksum for checksum in file.checksums)
    assert (first.start, first.stop - first.start) == (starts["t"], 5 * GIB)
    assert first.at[0] == first.stop + 4


def test_more_records_than_16_bits_count(tmp_path: Path) -> None:
    count = 65_537
    layout = lay_out_archive((f"a/{i}", b"", "") for i in range(count))
    path = write_out(OutputFile("many.zip", layout.size, layout.segments, layout.checksums), tmp_path)
    assert len(zipfile.ZipFile(path).namelist()) == count
    assert len(open_archive(path).members) == count


# Damage


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    layout = lay_out_archive([("a/one", b"first", ""), ("a/two", b"second", "")])
    return write_out(OutputFile("a.zip", layout.size, layout.segments, layout.checksums), tmp_path)


def test_members(archive: Path) -> None:
    found = open_archive(archive)
    assert {name: found.read(name) for name in found.members} == {"a/one": b"first", "a/two": b"second"}


def test_a_comment_and_a_file_of_zipfile(tmp_path: Path) -> None:
    path = tmp_path / "b.zip"
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("x", b"abc")
        out.comment = b"made by PK\x05\x06 somebody" * 20
    found = open_archive(path)
    assert found.read("x") == b"abc"
    assert found.read("y") is None


def at_end(offset: int, value: bytes) -> Callable[[bytearray], None]:
    """Overwrites bytes of the classic end record."""

    def edit(data: bytearray) -> None:
        start = len(data) - 22 + offset
        data[start : start + len(value)] = value

    return edit


def at_end64(offset: int, value: bytes) -> Callable[[bytearray], None]:
    def edit(data: bytearray) -> None:
        start = data.rfind(b"PK\x06\x06") + offset
        data[start : start + len(value)] = value

    return edit


def at_entry(index: int, offset: int, value: bytes) -> Callable[[bytearray], None]:
    """Overwrites bytes of a central directory entry."""

    def edit(data: bytearray) -> None:
        start = -1
        for _ in range(index + 1):
            start = data.index(b"PK\x01\x02", start + 1)
        data[start + offset : start + offset + len(value)] = value

    return edit


def both_counts(count: int) -> Callable[[bytearray], None]:
    def edit(data: bytearray) -> None:
        at_end(8, struct.pack("<2H", count, count))(data)
        at_end64(24, struct.pack("<2Q", count, count))(data)

    return edit


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (at_end(4, b"\x01\x00"), "several parts"),
        (at_end(8, b"\x01\x00"), "several parts"),
        (at_end(12, b"\x01"), "two end records disagree"),
        (at_end64(0, b"PK\x06\x08"), "zip64 end record"),
        (at_end64(24, struct.pack("<2Q", 3, 3)), "two end records disagree"),
        (both_counts(3), "lists 2 records instead of 3"),
        (at_entry(0, 0, b"PK\x01\x03"), "holds something else"),
        (at_entry(0, 28, b"\xff\xff"), "holds something else"),
        (at_entry(1, 46, b"a/one"), "appears twice"),
        (at_entry(0, 46, b"a/\xff"), "unreadable name"),
        (at_entry(0, 46, b"a/\n"), "unreadable name"),
        (at_entry(0, 46, b"b"), "does not start where the directory says"),
        (at_entry(0, 42, b"\x01"), "does not start where the directory says"),
        (at_entry(0, 42, b"\xff\xff\xff\x7f"), "ends beyond the end of the archive"),
        (at_entry(0, 42, b"\xff\xff\xff\xff"), "lacks its 64-bit size or offset"),
        (at_entry(0, 20, struct.pack("<2L", 200, 200)), "runs into the next one"),
        (at_entry(1, 20, struct.pack("<2L", 90, 90)), "runs into the next one"),
        (at_entry(0, 20, b"\x04"), "two sizes"),
    ],
)
def test_damage(archive: Path, edit: Callable[[bytearray], None], reason: str) -> None:
    data = bytearray(archive.read_bytes())
    edit(data)
    archive.write_bytes(data)
    with pytest.raises(InputError, match=reason):
        open_archive(archive)


@pytest.mark.parametrize("edit", [at_entry(0, 8, b"\x01"), at_entry(0, 10, b"\x08")])
def test_members_must_be_stored(archive: Path, edit: Callable[[bytearray], None]) -> None:
    data = bytearray(archive.read_bytes())
    edit(data)
    archive.write_bytes(data)
    found = open_archive(archive)
    assert found.read("a/two") == b"second"
    for use in (found.find, found.read):
        with pytest.raises(UnsupportedError, match="record a/one is compressed or encrypted"):
            use("a/one")


def test_a_changed_byte_of_a_member(archive: Path) -> None:
    archive.write_bytes(archive.read_bytes().replace(b"first", b"firsT"))
    found = open_archive(archive)
    with pytest.raises(InputError, match="record a/one is damaged: its checksum is wrong"):
        found.read("a/one")
    assert found.read("a/two") == b"second"


def test_a_directory_that_ends_too_late(archive: Path) -> None:
    data = bytearray(archive.read_bytes())
    size = struct.unpack_from("<Q", data, data.rfind(b"PK\x06\x06") + 40)[0] + 100
    at_end64(40, struct.pack("<Q", size))(data)
    at_end(12, struct.pack("<L", size))(data)
    archive.write_bytes(data)
    with pytest.raises(InputError, match="does not end before its end record"):
        open_archive(archive)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="a folder, not a regular file"):
        open_archive(tmp_path)


def test_a_member_in_the_middle_of_a_file(archive: Path, tmp_path: Path) -> None:
    data = archive.read_bytes()
    path = tmp_path / "several"
    path.write_bytes(b"x" * 37 + data + b"y" * 11)
    found = open_archive(path, 37, len(data))
    member = found.members["a/two"]
    assert found.read("a/two") == b"second"
    with io.BytesIO(path.read_bytes()) as file:
        file.seek(member.offset)
        assert file.read(member.size) == b"second"
