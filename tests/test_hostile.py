"""Inputs made to take memory, time or a wrong turn: each ends with one line, its exit code, and within bounds.

Every case is a sound checkpoint of which one thing is changed. The command runs in a process of its own, whose memory
and processor time are measured.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from fixtures.make_damaged import FIRST, INDEX, SOUND, read_safetensors
from tests.bounded_command import run_bounded

MEMORY = 500 << 20  # resident bytes at most, imports included
RANKS = ("release/mp_rank_00/model_optim_rng.pt", "release/mp_rank_01/model_optim_rng.pt")
TRACKER = "latest_checkpointed_iteration.txt"

Change = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """A change to a sound checkpoint (`hf`, `torch`, `torch_dist`), and how the message about it reads."""

    base: str
    change: Change
    message: str
    code: int = 3


def text(name: str, content: str | bytes) -> Change:
    """Gives a file another content."""
    data = content.encode() if isinstance(content, str) else content
    return lambda path: (path / name).write_bytes(data)


def config(key: str, value: str) -> Change:
    """Sets a key of config.json to text as it stands."""

    def change(path: Path) -> None:
        fields = json.loads((path / "config.json").read_text())
        fields.pop(key, None)
        (path / "config.json").write_text(json.dumps(fields)[:-1] + f', "{key}": {value}}}')

    return change


def instead(name: str, make: Callable[[Path], object]) -> Change:
    """Puts something else in the place of a file."""

    def change(path: Path) -> None:
        (path / name).unlink()
        make(path / name)

    return change


def make_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(path.name)
    finally:
        os.chdir(here)


def sparse(size: int) -> Callable[[Path], object]:
    """Makes a file of zeros that takes no space."""

    def make(path: Path) -> None:
        path.touch()
        os.truncate(path, size)

    return make


OUTSIDE, NOWHERE = "a symbolic link out of the folder (to /dev/zero)", "a symbolic link that leads nowhere"
KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "a pipe, not a regular file"),
    "endless": (lambda path: path.symlink_to("/dev/zero"), OUTSIDE),
    "socket": (make_socket, "a socket or a device, not a regular file"),
    "folder": (os.mkdir, "a folder, not a regular file"),
    "circle": (lambda path: path.symlink_to(path.name), NOWHERE),
}


def header(change: Callable[[dict[str, Any]], object] | bytes) -> Change:
    """Changes the header of the first shard, or replaces its text."""

    def make(path: Path) -> None:
        fields, data = read_safetensors(path / FIRST)
        if isinstance(change, bytes):
            raw = change
        else:
            change(fields)
            raw = json.dumps(fields).encode()
        (path / FIRST).write_bytes(struct.pack("<Q", len(raw)) + raw + data)

    return make


def first_shape(shape: str) -> Change:
    """Gives a tensor a shape as it stands."""

    def make(path: Path) -> None:
        fields, data = read_safetensors(path / FIRST)
        name = next(name for name in fields if name != "__metadata__")
        fields[name]["shape"] = "@"
        raw = json.dumps(fields).replace('"@"', shape).encode()
        (path / FIRST).write_bytes(struct.pack("<Q", len(raw)) + raw + data)

    return make


def pickled(change: Callable[[bytes], bytes]) -> Change:
    """Changes the pickle of every rank."""

    def make(path: Path) -> None:
        for rank in RANKS:
            with zipfile.ZipFile(path / rank) as archive:
                records = [(record.filename, archive.read(record)) for record in archive.infolist()]
            with zipfile.ZipFile(path / rank, "w") as archive:
                for name, data in records:
                    archive.writestr(name, change(data) if name.endswith("data.pkl") else data)

    return make


def layers(opcodes: bytes) -> Change:
    """Puts what opcodes make in the place of the number of layers in `args`."""
    marker = b"X\x0a\0\0\0num_layersq\x05"

    def change(data: bytes) -> bytes:
        assert data.count(marker + b"K\x02") == 1
        return data.replace(marker + b"K\x02", marker + opcodes)

    return pickled(change)


def stored(index: int) -> bytes:
    """PUT: the value on the stack is kept under a number that no other has."""
    return b"r" + struct.pack("<I", 10_000 + index)


def again(index: int) -> bytes:
    """GET."""
    return b"j" + struct.pack("<I", 10_000 + index)


def shared_lists(levels: int, width: int, before: bytes = b"", after: bytes = b"") -> bytes:
    """Lists that each hold the one before `width` times: walked part by part, there are `width ** levels`."""
    steps = (
        before + b"](" + again(level - 1) * width + b"e" + after + stored(level) + b"0" for level in range(1, levels)
    )
    return b"]K\x01a" + stored(0) + b"0" + b"".join(steps) + again(levels - 1)


RECORD = b"cpathlib\nPath\n"
COPIES = {
    "lists": (b"](" + b"N" * 2_000_000 + b"e" + stored(0) + b"0cbuiltins\nlist\n" + stored(1) + b"0](", b"", b"\x85R"),
    "dicts": (
        b"}("
        + b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(200_000))
        + b"u"
        + stored(0)
        + b"0ccollections\nOrderedDict\n"
        + stored(1)
        + b"0](",
        b"",
        b"\x85R",
    ),
    "strings": (
        b"X"
        + struct.pack("<I", 2_000_000)
        + b"a" * 2_000_000
        + stored(0)
        + b"0c_codecs\nencode\n"
        + stored(1)
        + b"0](",
        b"X\x06\0\0\0latin1",
        b"\x86R",
    ),
}


def copies(kind: str, count: int) -> bytes:
    """A list of copies of one large value, each made by a call."""
    start, argument, call = COPIES[kind]
    return start + (again(1) + again(0) + argument + call) * count + b"e"


def namespaces(count: int) -> bytes:
    """Namespaces that all take their attributes from one large dict."""
    names = b"".join(b"X" + struct.pack("<I", 6) + b"%06d" % i + b"N" for i in range(100_000))
    one = b"cargparse\nNamespace\n)R" + again(0) + b"b"
    return b"}(" + names + b"u" + stored(0) + b"0](" + one * count + b"e"


def renamed_model(name: str) -> Change:
    """Gives the state dict of a rank another key."""
    marker = b"X\x05\0\0\0model"
    new = b"X" + struct.pack("<I", len(name)) + name.encode()
    return pickled(lambda data: data.replace(marker, new, 1))


def without_common_state(content: str) -> Change:
    """A distributed checkpoint as Megatron-Bridge leaves it: run_config.yaml in place of args and sidecar."""

    def make(path: Path) -> None:
        shutil.rmtree(path / "ckptkit")
        (path / "release" / "common.pt").unlink()
        (path / "release" / "run_config.yaml").write_text(content)

    return make


def stack(shape: tuple[int, ...]) -> Change:
    """Gives a stack of layers another shape, and (as it is empty) no chunks."""
    from ckptkit.formats.torch_file.pickles import dumps, loads

    def make(path: Path) -> None:
        file = path / "release" / ".metadata"
        value: Any = loads(file.read_bytes(), file)
        found = value.state["state_dict_metadata"]["decoder.layers.mlp.linear_fc2.weight"].state
        found["size"] = shape
        found["chunks"] = [] if 0 in shape else found["chunks"]
        file.write_bytes(dumps(value))

    return make


def folders_in_circles(path: Path) -> None:
    (path / "a").symlink_to(".")
    (path / "b").symlink_to(".")


def ranks_of_fsdp(path: Path) -> None:
    (path / "model_world_size_999999999999_rank_0.pt").write_bytes(b"")
    for name in (FIRST, INDEX):
        (path / name).unlink()


ALIASES = "model:\n  a0: &a0 [1]\n" + "".join(
    f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
)
MERGES = (
    "m0: &m0 {x: 1}\n" + "".join(f"m{i}: &m{i}\n  <<: [*m{i - 1}, *m{i - 1}]\n" for i in range(1, 40)) + "model: {}"
)
ENTRY = b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'

CASES: dict[str, Case] = {
    **{
        f"config, {key} {value[:12]}": Case("hf", config(key, value), message)
        for key, value, message in (
            ("num_hidden_layers", "1000000000", "num_hidden_layers is 1,000,000,000, and at most 10,000 are read"),
            ("num_hidden_layers", "10000", "the config has 10,000 layers, but there are only"),
            ("rope_theta", "1" + "0" * 400, "rope_theta is an integer of more than 40 digits"),
            ("hidden_size", "9" * 5000, "a number of thousands of digits"),
            ("vocab_size", "1" + "0" * 30, "vocab_size is 1,000,000,000,000,000,000,"),
            ("rope_theta", "NaN", "config.json: rope_theta is NaN, which JSON does not have"),
            ("rms_norm_eps", "Infinity", "rms_norm_eps is infinite, or too large"),
            ("rms_norm_eps", "1e400", "rms_norm_eps is infinite, or too large"),
            ("initializer_range", "-1e999", "initializer_range is infinite, or too large"),
            ("rope_parameters", '{"a": [1, {"b": NaN}]}', "rope_parameters.a[1].b is NaN"),
            ("a", '1, "a": 2', "the key a appears twice in one object"),
            ("a", "[" * 200_000, "it is nested too deep"),
            ("a", '"\\ud800"', "half a character"),
            ("a", "[" + "[],".rstrip(",") + ",[]" * 4_000_001 + "]", "which are too many"),
        )
    },
    **{f"config is a {kind}": Case("hf", instead("config.json", make), told) for kind, (make, told) in KINDS.items()},
    **{
        f"{name} is a {kind}": Case(base, instead(name, make), of_kind if of_kind in (OUTSIDE, NOWHERE) else told)
        for (base, name, told), (kind, (make, of_kind)) in product(
            (("torch", RANKS[1], "no model_optim_rng.pt"), ("torch_dist", "release/.metadata", "no .metadata")),
            KINDS.items(),
        )
    },
    "config of 200 MB": Case("hf", instead("config.json", sparse(200_000_000)), "larger than 100,000,000 bytes"),
    "index is endless": Case("hf", instead(INDEX, lambda path: path.symlink_to("/dev/zero")), OUTSIDE),
    "index names a device": Case("hf", text(INDEX, '{"weight_map": {"a": "/dev/zero"}}'), "points outside the folder"),
    "index names nothing": Case("hf", text(INDEX, '{"weight_map": {"a": "."}}'), "points outside the folder"),
    "index twice": Case("hf", text(INDEX, '{"weight_map": {"a": "x", "a": "y"}}'), "the key a appears twice"),
    "shape of 4,000 digits": Case("hf", first_shape(f"[{'9' * 4000}, {'9' * 4000}]"), "header entry of tensor"),
    "2,000 such sizes": Case("hf", first_shape(f"[{', '.join(['9' * 4000] * 2000)}]"), "header entry of tensor"),
    "65 axes": Case("hf", first_shape(f"[{', '.join(['1'] * 65)}]"), "is malformed"),
    "size of 2^63": Case("hf", first_shape(f"[{1 << 63}, 0]"), "is malformed"),
    "header of empty lists": Case("hf", header(b'{"a":[' + b"[]," * 4_000_001 + b"[]]}"), "which are too many"),
    "header, nested": Case("hf", header(b'{"a":' * 100_000), "it is nested too deep"),
    "header, name twice": Case("hf", header(b"{" + ENTRY + b"," + ENTRY + b"}"), "tensor a appears twice"),
    "header, half a character": Case("hf", header(ENTRY.replace(b'"a"', b'{"\\udc00"') + b"}"), "half a character"),
    "folders in circles": Case("hf", folders_in_circles, "the same folder as"),
    "shared lists": Case("torch", layers(shared_lists(60, 4)), "unfolds to more values"),
    "shared lists in objects": Case("torch", layers(shared_lists(60, 4, RECORD, b"\x85R")), "unfolds to more values"),
    "shared tuples": Case("torch", layers(shared_lists(60, 4, after=b"\x85")), "unfolds to more values"),
    **{f"copies of {kind}": Case("torch", layers(copies(kind, 600)), "it asks for more memory") for kind in COPIES},
    "copies of attributes": Case("torch", layers(namespaces(600)), "it asks for more memory"),
    "empty lists": Case("torch", layers(b"(" + b"]" * 1_500_000 + b"t"), "it asks for more memory"),
    "empty sets": Case("torch", layers(b"(" + b"\x8f" * 1_500_000 + b"t"), "it asks for more memory"),
    "memos": Case("torch", layers(b"\x94" * 1_500_000 + b"0K\x02"), "it asks for more memory"),
    "layers, 1e9": Case("torch", layers(b"J\0\xca\x9a\x3b"), "it must be a positive integer of at most 10,000"),
    "layers, 255 bytes": Case("torch", layers(b"\x8a\xff" + b"\x7f" * 255), "it must be a positive integer of at most"),
    "layers, 9,999": Case("torch", layers(b"M\x0f\x27"), "the config has 9,999 layers, but there are only"),
    "model999...": Case("torch", renamed_model("model" + "9" * 5000), "holds no `model`"),
    "tracker of digits": Case("torch", text(TRACKER, "9" * 5000), "expected an iteration or `release`"),
    "tracker is large": Case("torch", instead(TRACKER, sparse(1 << 30)), "larger than 65,536 bytes"),
    "origin is a string": Case(
        "torch", text("ckptkit/manifest.json", '{"schema": 1, "origin": "x"}'), "its origin is no repository"
    ),
    "archive without records": Case(
        "torch",
        lambda path: (path / RANKS[1]).write_bytes((path / RANKS[1]).read_bytes() + b"PK\5\6" + bytes(18)),
        "it has no records",
    ),
    "metadata of zeros": Case("torch_dist", instead("release/.metadata", sparse(8 << 30)), "not a pickle"),
    "empty stack of 1e9": Case("torch_dist", stack((10**9, 0, 3)), "stacks 1,000,000,000 tensors"),
    "empty stack": Case("torch_dist", stack((2, 0, 3)), "an empty stack"),
    "stack of nothing": Case("torch_dist", stack((0, 8, 3)), "not a stack of layers"),
    "stack of 2^60": Case("torch_dist", stack((1 << 60, 8, 3)), "tensors, at most 500,000 are read"),
    "aliases": Case("torch_dist", without_common_state(ALIASES), "unfolds to more values"),
    "merges": Case("torch_dist", without_common_state(MERGES), "not valid YAML (a merged mapping"),
    "minutes and seconds": Case(
        "torch_dist", without_common_state("model: {a: 1" + ":59" * 100_000 + "}"), "a number too long"
    ),
    "run_config is large": Case("torch_dist", without_common_state("#" * 600_000), "larger than 524,288 bytes"),
    "world of 1e12": Case("hf", ranks_of_fsdp, "rank_1.pt and 999,999,999,997 more missing"),
}


@pytest.mark.parametrize("name", CASES)
def test_ends_with_one_line_within_bounds(tmp_path: Path, name: str) -> None:
    case, path = CASES[name], tmp_path / "in"
    shutil.copytree(SOUND / case.base, path)
    case.change(path)
    ended = run_bounded(tmp_path, "inspect", str(path))
    assert ended.code == case.code, ended.stderr[-400:]
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1, ended.stderr[:400]
    assert case.message in ended.stderr
    assert 0 < ended.memory < MEMORY


@pytest.mark.parametrize("base", ["hf", "torch", "torch_dist"])
def test_without_the_change_nothing_is_wrong(tmp_path: Path, base: str) -> None:
    ended = run_bounded(tmp_path, "inspect", str(SOUND / base))
    assert (ended.code, ended.stderr) == (0, "")
