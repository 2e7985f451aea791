"""A directory holds what a plan gives only if every byte of every file says so."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ckptkit.dtypes import DTYPES
from ckptkit.errors import InputError
from ckptkit.io.engine import run
from ckptkit.io.plan import OutputFile, Plan, literal
from ckptkit.io.present import holds, resembles
from ckptkit.io.segments import Checksum, Segment
from ckptkit.tensors import Tensor

F32 = DTYPES["F32"]
SIZE = 4200
DATA = slice(64, 64 + 4096)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Files with all that a file may consist of: a header with a checksum in it, columns, a cast, zeros, nothing."""
    source = tmp_path / "source"
    source.write_bytes(np.random.default_rng(0).standard_normal(2048, np.float32).tobytes())
    tensor = Tensor.from_file(str(source), 0, F32, (32, 64))
    archive = OutputFile(
        "rank/archive",
        SIZE,
        (Segment(0, literal(bytes(range(40)))), Segment(DATA.start, tensor.cols(16, 48))),
        (Checksum(DATA.start, DATA.stop, (8, 20)),),
    )
    cast = OutputFile("cast", 4096, (Segment(0, tensor.astype(DTYPES["BF16"])),))
    return Plan((archive, cast, OutputFile.small("config", b"{}"), OutputFile.small("empty", b"")))


@pytest.fixture
def out(plan: Plan, tmp_path: Path) -> Path:
    run(plan, tmp_path / "out")
    return tmp_path / "out"


def test_what_was_written_is_there(plan: Plan, out: Path) -> None:
    assert holds(plan, out)
    (out / "empty folder").mkdir()
    assert holds(plan, out)


def test_no_directory_holds_nothing(plan: Plan, tmp_path: Path) -> None:
    assert not holds(plan, tmp_path / "absent")


PLACES = {
    "header": 0,
    "checksum": 8,
    "its second place": 23,
    "zeros after the header": 40,
    "first of the data": DATA.start,
    "last of the data": DATA.stop - 1,
    "zeros at the end": SIZE - 1,
}


@pytest.mark.parametrize("place", PLACES)
def test_one_bit_is_found(plan: Plan, out: Path, place: str) -> None:
    with open(out / "rank/archive", "r+b") as file:
        data = bytearray(file.read())
        data[PLACES[place]] ^= 1
        file.seek(0)
        file.write(data)
    assert resembles(plan, out) and not holds(plan, out)


def test_one_bit_of_what_was_cast_is_found(plan: Plan, out: Path) -> None:
    data = bytearray((out / "cast").read_bytes())
    data[-1] ^= 128
    (out / "cast").write_bytes(data)
    assert not holds(plan, out)


def move_out_and_link(path: Path) -> None:
    path.symlink_to(path.rename(path.parent.parent / "moved"))


OTHERS: dict[str, Callable[[Path], object]] = {
    "a file more": lambda out: (out / "rank" / "more").touch(),
    "a file less": lambda out: (out / "empty").unlink(),
    "a byte more": lambda out: os.truncate(out / "rank/archive", SIZE + 1),
    "a byte less": lambda out: os.truncate(out / "rank/archive", SIZE - 1),
    "a link instead": lambda out: move_out_and_link(out / "config"),
    "a link to a folder": lambda out: (out / "other").symlink_to(out / "rank"),
    "a broken link": lambda out: (out / "other").symlink_to(out / "nowhere"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_names_and_sizes_come_first(plan: Plan, out: Path, other: str) -> None:
    OTHERS[other](out)
    assert not resembles(plan, out) and not holds(plan, out)


def test_a_source_that_is_gone_is_an_error(plan: Plan, out: Path) -> None:
    (out.parent / "source").unlink()
    with pytest.raises(InputError, match="source file is gone"):
        holds(plan, out)
