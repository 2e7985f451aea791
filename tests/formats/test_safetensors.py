"""The safetensors header: the safetensors library judges both ways, and every damage has its own message."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptkit.dtypes import DTYPES
from ckptkit.errors import CkptkitError, InputError, UnsupportedError
from ckptkit.formats.safetensors import ALIGNMENT, build_header, lay_out, parse_header, read_header, tensors_of
from ckptkit.io.engine import read_tensor
from ckptkit.tensors import Tensor


@pytest.fixture
def file(tmp_path: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    tensors = {
        "a": torch.randn(3, 5).to(torch.bfloat16),
        "b": torch.arange(7),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "c": torch.randn(2, 3, 4).half(),
    }
    save_file(tensors, path, {"format": "pt", "origin": "test"})
    return path


def test_against_safetensors_reading(file: Path) -> None:
    import torch
    from safetensors.torch import load_file

    header = read_header(file)
    assert header.metadata == {"format": "pt", "origin": "test"}
    ours, theirs = tensors_of(file, header), load_file(file)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].shape == tuple(tensor.shape)
        assert read_tensor(ours[name]).tobytes() == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_against_safetensors_writing(tmp_path: Path) -> None:
    from safetensors import safe_open

    data = np.arange(12, dtype=np.float32)
    tensors = {
        "x": Tensor.from_bytes(data.tobytes(), DTYPES["F32"], (3, 4)),
        "y": Tensor.from_bytes(b"\1\0", DTYPES["BOOL"], (2,)),
    }
    output = lay_out("out.safetensors", tensors)
    raw = bytearray(output.size)
    for segment in output.segments:
        raw[segment.offset : segment.offset + segment.tensor.nbytes] = read_tensor(segment.tensor).tobytes()
    path = tmp_path / "out.safetensors"
    path.write_bytes(raw)
    with safe_open(path, "np") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert (opened.get_tensor("x").reshape(-1) == data).all()
        assert opened.get_tensor("y").tolist() == [True, False]
    assert len(read_header(path).raw) % ALIGNMENT == 0


def with_header(fields: object, data: bytes = b"") -> bytes:
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start: int, stop: int, dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": [stop - start], "data_offsets": [start, stop]}


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda raw: b"", "empty file"),
    "cut by one": (lambda raw: raw[:-1], r"truncated: .* \(1 missing\)"),
    "one too many": (lambda raw: raw + b"x", "1 trailing bytes"),
    "cut in the header": (lambda raw: raw[:40], "truncated inside the header"),
    "zeros": (lambda raw: bytes(len(raw)), "starts with zeros"),
    "git-lfs": (lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git-LFS pointer"),
    "html": (lambda raw: b"<!DOCTYPE html><html><body>404</body></html>", "HTML page"),
    "huge header": (lambda raw: struct.pack("<Q", 2**40) + raw[8:], "header of 1,099,511,627,776 bytes"),
    "not json": (lambda raw: raw[:8] + b"!" + raw[9:], "not valid JSON"),
    "list": (lambda raw: with_header([1]), "not a JSON object"),
    "overlap": (lambda raw: with_header({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6)), "tensors a and b overlap"),
    "hole": (lambda raw: with_header({"a": entry(0, 4), "b": entry(6, 8)}, bytes(8)), "2 bytes between a and b"),
    "size": (
        lambda raw: with_header({"a": {**entry(0, 4), "shape": [5]}}, bytes(4)),
        "needs 5 bytes, its offsets span 4",
    ),
    "malformed": (lambda raw: with_header({"a": {"dtype": "U8"}}), "entry of tensor a is malformed"),
    "a truth as a size": (lambda raw: with_header({"a": {**entry(0, 4), "shape": [True, 4]}}, bytes(4)), "malformed"),
    "three offsets": (
        lambda raw: with_header({"a": {**entry(0, 4), "data_offsets": [0, 4, 4]}}, bytes(4)),
        "malformed",
    ),
    "sizes as text": (lambda raw: with_header({"a": {**entry(0, 4), "shape": "4"}}, bytes(4)), "malformed"),
    "a list": (lambda raw: with_header({"a": [1, 2]}, bytes(4)), "entry of tensor a is malformed"),
    "negative": (lambda raw: with_header({"a": {**entry(0, 4), "shape": [-4]}}, bytes(4)), "malformed"),
    "metadata": (lambda raw: with_header({"__metadata__": {"a": 1}}), "__metadata__ must map strings"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_has_its_message(file: Path, damage: str) -> None:
    change, match = DAMAGES[damage]
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(InputError, match=match) as caught:
        read_header(file)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)


def test_duplicate_names_are_refused() -> None:
    text = b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    with pytest.raises(InputError, match="tensor a appears twice"):
        parse_header(struct.pack("<Q", len(text)) + text, "x")


@pytest.mark.parametrize("dtype", ["F4", "NEW"])
def test_unknown_dtypes_are_unsupported(file: Path, dtype: str) -> None:
    file.write_bytes(with_header({"a": entry(0, 4, dtype)}, bytes(4)))
    with pytest.raises(UnsupportedError, match=f"tensor a has the unknown dtype {dtype}"):
        read_header(file)


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    raw = struct.pack("<Q", len(data)) + data
    with suppress(CkptkitError):
        parse_header(raw, "fuzz")


@settings(max_examples=300)
@given(st.integers(0, 400), st.integers(0, 255))
def test_any_changed_byte_is_read_or_refused(position: int, value: int) -> None:
    tensors = {f"t{i}": Tensor.full(DTYPES["F16"], (i, 3)) for i in range(5)}
    raw = bytearray(build_header(tensors, {"format": "pt"}).raw)
    raw[8 + position % (len(raw) - 8)] = value
    with suppress(CkptkitError):
        parse_header(bytes(raw), "fuzz")


def header_only(path: Path, count: int) -> Path:
    """A file that says it holds so many tensors, as large mixtures of experts do; its data are holes."""
    at, size = 0, 2048 * 7168 * 2
    entries = []
    for number in range(count):
        name = f"model.layers.{number % 61}.mlp.experts.{number // 61}.down_proj.weight_packed_{number}"
        entries.append(f'"{name}":{{"dtype":"BF16","shape":[2048,7168],"data_offsets":[{at},{at + size}]}}')
        at += size
    raw = ("{" + ",".join(entries) + "}").encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + at)
    return path


READ = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), int(sys.argv[2])))
from ckptkit.formats.hf import read_shard
tensors, header = read_shard(Path(sys.argv[1]))
print(len(tensors), len(header.raw), header.data_size)
"""


def test_as_many_tensors_as_the_largest_models_have(tmp_path: Path) -> None:
    """A model of 2026 has 207,000. They are all read, and within 600 MB of addresses."""
    path, count = header_only(tmp_path / "model.safetensors", 210_000), 210_000
    result = subprocess.run(
        [sys.executable, "-c", READ, str(path), str(600 << 20)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-400:]
    names, start, size = map(int, result.stdout.split())
    assert (names, start + size) == (count, path.stat().st_size)


@pytest.mark.slow
def test_a_header_of_half_a_million_tensors(tmp_path: Path) -> None:
    path = header_only(tmp_path / "model.safetensors", 500_000)
    assert len(read_header(path).entries) == 500_000


@pytest.mark.parametrize(
    "shape", [[1 << 63, 0], [-1, 0], [1] * 65, [True], ["1"], [1.0], [10**4000, 10**4000], {"0": 1}, None]
)
def test_sizes_that_no_tensor_has(shape: object) -> None:
    if isinstance(shape, list) and shape and shape[0] == 10**4000:
        text = b'{"a":{"dtype":"U8","shape":[' + b"9" * 4000 + b"," + b"9" * 4000 + b'],"data_offsets":[0,0]}}'
    else:
        text = json.dumps({"a": {"dtype": "U8", "shape": shape, "data_offsets": [0, 0]}}).encode()
    with pytest.raises(InputError, match="the header entry of tensor a is malformed"):
        parse_header(struct.pack("<Q", len(text)) + text, "x")
