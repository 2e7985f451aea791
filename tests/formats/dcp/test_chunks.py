"""Boxes in any arrangement against NumPy."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptkit.dtypes import DTYPES
from ckptkit.formats.dcp.chunks import Box, ChunkError, join_chunks, split_chunks
from ckptkit.tensors import Tensor
from tests.formats.torch_file.torch_files import contents

I16 = DTYPES["I16"]
Bounds = tuple[tuple[int, int], ...]


def box(array: np.ndarray, bounds: Bounds) -> Box:
    part = np.ascontiguousarray(array[tuple(slice(*bound) for bound in bounds)])
    return Box(tuple(start for start, _ in bounds), Tensor.from_bytes(part.tobytes(), I16, part.shape))


def values(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(np.prod(shape, dtype=int), dtype=np.int16).reshape(shape)


@st.composite
def partitions(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Bounds]]:
    """A shape of 1 to 4 axes, and boxes that come from cutting it again and again anywhere along any axis."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    boxes: list[Bounds] = [tuple((0, size) for size in shape)]
    for _ in range(draw(st.integers(0, 8))):
        bounds = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        start, stop = bounds[axis]
        cut = draw(st.integers(start, stop))
        halves = [(start, cut), (cut, stop)]
        boxes += [(*bounds[:axis], half, *bounds[axis + 1 :]) for half in halves]
    return shape, draw(st.permutations(boxes))


@settings(max_examples=300)
@given(partitions())
def test_any_cutting_is_joined(case: tuple[tuple[int, ...], list[Bounds]]) -> None:
    shape, bounds = case
    array = values(shape)
    boxes = [box(array, part) for part in bounds]
    joined = join_chunks(I16, shape, boxes)
    assert joined.shape == shape
    assert contents(joined) == array.tobytes()
    for axes in range(1, len(shape) + 1):
        parts = dict(split_chunks(I16, shape, boxes, axes))
        assert list(parts) == list(product(*map(range, shape[:axes])))
        assert all(contents(part) == array[index].tobytes() for index, part in parts.items())


@settings(max_examples=200)
@given(partitions(), st.data())
def test_a_missing_or_repeated_or_moved_box_is_found(
    case: tuple[tuple[int, ...], list[Bounds]], data: st.DataObject
) -> None:
    shape, bounds = case
    boxes = [box(values(shape), part) for part in bounds if all(start < stop for start, stop in part)]
    index = data.draw(st.integers(0, len(boxes) - 1))
    with pytest.raises(ChunkError, match="leave holes"):
        join_chunks(I16, shape, boxes[:index] + boxes[index + 1 :])
    with pytest.raises(ChunkError, match="overlap"):
        join_chunks(I16, shape, [*boxes, boxes[index]])
    axis = data.draw(st.integers(0, len(shape) - 1))
    moved = tuple(offset + (number == axis) for number, offset in enumerate(boxes[index].offsets))
    with pytest.raises(ChunkError, match=r"overlap|leave holes|does not lie inside"):
        join_chunks(I16, shape, [*boxes[:index], Box(moved, boxes[index].tensor), *boxes[index + 1 :]])


def test_a_pinwheel_has_no_straight_cut_and_is_joined() -> None:
    array = values((3, 3))
    bounds = [((0, 1), (0, 2)), ((0, 2), (2, 3)), ((2, 3), (1, 3)), ((1, 3), (0, 1)), ((1, 2), (1, 2))]
    assert contents(join_chunks(I16, (3, 3), [box(array, part) for part in bounds])) == array.tobytes()
    cube = values((3, 3, 2))
    boxes = [box(cube, (*part, (0, 2))) for part in bounds]
    assert contents(join_chunks(I16, (3, 3, 2), boxes)) == cube.tobytes()


def test_a_hole_and_an_overlap_of_equal_size_are_found() -> None:
    array = values((4, 4))
    with pytest.raises(ChunkError, match=r"overlap|leave holes"):
        join_chunks(I16, (4, 4), [box(array, ((0, 2), (0, 4))), box(array, ((1, 3), (0, 4)))])


def test_empty_and_single_tensors() -> None:
    assert join_chunks(I16, (0, 3), []).shape == (0, 3)
    assert [part.shape for _, part in split_chunks(I16, (2, 0), [], 1)] == [(0,), (0,)]
    single = Box((), Tensor.from_bytes(b"ab", I16, ()))
    assert contents(join_chunks(I16, (), [single])) == b"ab"
    with pytest.raises(ChunkError, match="overlap"):
        join_chunks(I16, (), [single, single])
    with pytest.raises(ChunkError, match="leave holes"):
        join_chunks(I16, (), [])


def test_boxes_with_other_axes_are_refused() -> None:
    with pytest.raises(ChunkError, match=r"does not lie inside \[4\]"):
        join_chunks(I16, (4,), [box(values((2, 2)), ((0, 2), (0, 2)))])


def test_boxes_that_interlock_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptkit.formats.dcp.chunks._MAX_PIECES", 20)
    array = values((16, 4))
    columns = [((0, 16), (column, column + 1)) for column in (0, 1)]
    rows = [((row, row + 1), (2, 4)) for row in range(16)]
    with pytest.raises(ChunkError, match="interlock"):
        join_chunks(I16, (16, 4), [box(array, part) for part in (*columns, *rows)])
