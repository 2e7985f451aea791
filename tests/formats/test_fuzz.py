"""Mutated files against the libraries that define the formats: what we accept, they accept, with the very same tensors.

A header can be changed into another valid one, and tensor data have no checksum that the libraries look at: nobody can
tell such a file from an intended one. All else has to end in an error of ours.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import save

from ckptkit.dtypes import DTYPES_BY_TORCH_NAME
from ckptkit.errors import CkptkitError
from ckptkit.formats.safetensors import read_header, tensors_of
from ckptkit.formats.torch_file.pickles import read_torch_file
from ckptkit.io.engine import read_tensor
from ckptkit.tensors import Tensor

Found = Mapping[str, tuple[str, tuple[int, ...], bytes]]
"""Name -> dtype, shape and bytes."""

EDITS = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=4)
CUTS = st.none() | st.integers(0, 1 << 16)
TAILS = st.binary(max_size=12)


def mutated(data: bytes, edits: list[tuple[int, int]], cut: int | None, tail: bytes) -> bytes:
    result = bytearray(data)
    for at, value in edits:
        result[at % len(result)] = value
    return bytes(result[: None if cut is None else cut % len(result)]) + tail


def ours(tensors: Mapping[str, Tensor]) -> Found:
    return {name: (str(t.out_dtype), t.shape, read_tensor(t).tobytes()) for name, t in tensors.items()}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "model"


# safetensors

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.arange(5, dtype=torch.uint8),
    "c": torch.zeros(0, 3, dtype=torch.bfloat16),
    "d": torch.tensor(7, dtype=torch.int64),
}
SPECIMEN = save(TENSORS, {"format": "pt"})
LENGTH = struct.unpack("<Q", SPECIMEN[:8])[0]
HEADER, DATA = json.loads(SPECIMEN[8 : 8 + LENGTH]), SPECIMEN[8 + LENGTH :]


def safetensors_agrees(file: Path, data: bytes) -> bool:
    """Whether we read it; then so does safetensors, and sees the same."""
    file.write_bytes(data)
    try:
        found = ours(tensors_of(file, read_header(file)))
    except CkptkitError as error:
        assert "\n" not in str(error)
        return False
    theirs = {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in deserialize(data)}  # type: ignore[no-untyped-call]
    assert found == theirs
    return True


def test_the_safetensors_specimen_is_read(file: Path) -> None:
    assert safetensors_agrees(file, SPECIMEN)


@settings(max_examples=500)
@given(EDITS, CUTS, TAILS)
def test_mutated_safetensors(file: Path, edits: list[tuple[int, int]], cut: int | None, tail: bytes) -> None:
    safetensors_agrees(file, mutated(SPECIMEN, edits, cut, tail))


@settings(max_examples=500)
@given(st.integers(8, 7 + LENGTH), st.sampled_from(list(b'0123456789",:[]{} abx')))
def test_a_changed_character_of_the_header(file: Path, at: int, character: int) -> None:
    """Near misses: most of them are still JSON."""
    safetensors_agrees(file, mutated(SPECIMEN, [(at, character)], None, b""))


SIZES = st.integers(-2, 40) | st.sampled_from([2**31, 2**63, 2**64, 10**30])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "I64", "BF16", "F16", "BOOL", "F4", "X"]) | st.none(),
        "shape": st.lists(SIZES, max_size=3) | st.just([2, 3]),
        "data_offsets": st.lists(SIZES, min_size=1, max_size=3) | st.tuples(SIZES, SIZES).map(sorted).map(list),
    }
)


@settings(max_examples=500)
@given(st.sampled_from(list(TENSORS)), ENTRIES, st.sets(st.sampled_from(["dtype", "shape", "data_offsets"])))
def test_a_header_with_another_entry(file: Path, name: str, entry: dict[str, Any], fields: set[str]) -> None:
    changed = {**HEADER, name: {**HEADER[name], **{field: entry[field] for field in fields}}}
    text = json.dumps(changed).encode()
    safetensors_agrees(file, struct.pack("<Q", len(text)) + text + DATA)


def test_a_reader_that_looked_away_would_be_found(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptkit.formats.safetensors._check_cover", lambda *_: None)
    lying = {**HEADER, "a.weight": {**HEADER["a.weight"], "data_offsets": [0, 24]}}  # over the bytes of d
    text = json.dumps(lying).encode()
    with pytest.raises(SafetensorError):
        safetensors_agrees(file, struct.pack("<Q", len(text)) + text + DATA)


# torch.save


def torch_specimen() -> bytes:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    torch.save({"base": base, "view": base[1:3], "half": base.to(torch.bfloat16), "n": 3}, buffer := io.BytesIO())
    return buffer.getvalue()


ARCHIVE = torch_specimen()


def leaves(content: Any) -> dict[str, Tensor]:
    if not isinstance(content, dict):
        return {}
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def by_torch(data: bytes) -> Found:
    content = torch.load(io.BytesIO(data), weights_only=True)
    return {
        str(name): (
            str(DTYPES_BY_TORCH_NAME[str(value.dtype).removeprefix("torch.")]),
            tuple(value.shape),
            value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
        for name, value in content.items()
        if isinstance(value, torch.Tensor)
    }


UNHARMED = by_torch(ARCHIVE)


def as_it_lies(data: bytes) -> Found:
    """The specimen with its bytes taken from `data`: nothing tells that they are others, for torch neither."""
    found: Found = {}
    for name, (dtype, shape, content) in UNHARMED.items():
        start = ARCHIVE.index(content)
        found[name] = (dtype, shape, data[start : start + len(content)])
    return found


def torch_agrees(file: Path, data: bytes) -> bool:
    """Whether we read it; then it is what it was but for the bytes of tensors, or what torch reads too."""
    file.write_bytes(data)
    try:
        found = ours(leaves(read_torch_file(file)))
    except CkptkitError as error:
        assert "\n" not in str(error)
        return False
    assert found == as_it_lies(data) or found == by_torch(data)
    return True


def test_the_torch_specimen_is_read(file: Path) -> None:
    assert torch_agrees(file, ARCHIVE)


@settings(max_examples=500)
@given(EDITS, CUTS, TAILS)
def test_mutated_archives(file: Path, edits: list[tuple[int, int]], cut: int | None, tail: bytes) -> None:
    torch_agrees(file, mutated(ARCHIVE, edits, cut, tail))


@settings(max_examples=300)
@given(st.integers(0, 400), st.integers(0, 255))
def test_a_changed_byte_of_the_directory(file: Path, from_end: int, value: int) -> None:
    torch_agrees(file, mutated(ARCHIVE, [(len(ARCHIVE) - 1 - from_end, value)], None, b""))


@settings(max_examples=300)
@given(st.integers(0, 1 << 12), st.integers(0, 255))
def test_a_changed_byte_of_the_pickle_is_never_read(file: Path, at: int, value: int) -> None:
    """Its checksum tells."""
    start = ARCHIVE.index(b"\x80\x02}q")
    stop = ARCHIVE.index(b"PK", start)
    place = start + at % (stop - start)
    data = mutated(ARCHIVE, [(place, value)], None, b"")
    assert torch_agrees(file, data) == (ARCHIVE[place] == value)


def test_another_reading_would_be_found(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "UNHARMED", {})
    monkeypatch.setitem(globals(), "by_torch", lambda data: {**UNHARMED, "view": None})
    with pytest.raises(AssertionError):
        torch_agrees(file, ARCHIVE)
