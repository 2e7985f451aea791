"""The order in which files are filled for a store: each from its start to its end, and shared rows once for all."""

from __future__ import annotations

import pytest

from ckptkit.dtypes import DTYPES
from ckptkit.io.plan import OutputFile
from ckptkit.io.schedule import Limits, in_order
from ckptkit.io.segments import Segment
from ckptkit.tensors import Tensor

ROWS, WIDTH, FIRST = 8, 12, 5
LIMITS = Limits(staging=40, scratch=64, casting=40)


def column(name: str, start: int, stop: int) -> Tensor:
    return Tensor.from_file(name, 0, DTYPES["U8"], (ROWS, WIDTH)).cols(start, stop)


def file(path: str, *tensors: Tensor) -> OutputFile:
    segments, offset = [], 3  # zeros before the first
    for tensor in tensors:
        segments.append(Segment(offset, tensor))
        offset += tensor.nbytes
    return OutputFile(path, offset, tuple(segments))


@pytest.mark.parametrize(("second", "shared"), [("AB", True), ("BA", False), ("CAB", True)])
def test_every_byte_in_order(second: str, shared: bool) -> None:
    """Also where two files have two matrices in different orders, so that none can wait for the other."""
    left = [column(name, 0, FIRST) for name in "AB"]
    right = [column(name, FIRST, WIDTH) for name in second]
    files = [file("left", *left), file("right", *right)]
    ends = [0, 0]
    together = 0
    for unit in in_order(files, [0, 1], LIMITS):
        together += len(unit.writes) > 1
        for write in unit.writes:
            assert write.offset == ends[write.file]
            ends[write.file] += unit.written(write)
    assert ends == [one.size for one in files]
    assert bool(together) == shared


def test_two_columns_of_one_file_do_not_wait_for_each_other() -> None:
    both = file("both", column("A", 0, FIRST), column("A", FIRST, WIDTH))
    ends = 0
    for unit in in_order([both], [0], LIMITS):
        (write,) = unit.writes
        assert write.offset == ends
        ends += unit.written(write)
    assert ends == both.size
