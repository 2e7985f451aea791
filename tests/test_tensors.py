"""The tensor algebra against NumPy: random trees of operations give the same elements."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptkit.dtypes import DTYPES
from ckptkit.tensors import Band, Const, Literal, Piece, Region, Tensor, hstack, stack, vstack

F16 = DTYPES["F16"]
FILE = np.arange(4096, dtype=np.uint16)  # no two elements are equal, so every mix-up shows

Pair = tuple[Tensor, np.ndarray]


def materialise(tensor: Tensor) -> np.ndarray:
    """What the bands of a tensor mean, read one element row at a time: slow and plain."""
    rows = ((band, row) for band in tensor.bands for row in range(band.rows))
    data = b"".join(row_bytes(piece, row) for band, row in rows for piece in band.pieces)
    return np.frombuffer(data, np.uint16).reshape(tensor.shape)


def row_bytes(piece: Piece, row: int) -> bytes:
    if isinstance(piece, Const):
        return (piece.pattern * piece.width)[: piece.width]
    data = FILE.tobytes() if isinstance(piece, Region) else piece.data
    start = piece.offset + row * piece.pitch
    return data[start : start + piece.width]


@st.composite
def leaves(draw: st.DrawFn, shape: tuple[int, ...]) -> Pair:
    size = prod(shape)
    kind = draw(st.sampled_from(["file", "file", "file", "strided", "bytes", "full"]))
    if kind == "full":
        value = np.uint16(draw(st.integers(0, 65535)))
        return Tensor.full(F16, shape, value.tobytes()), np.full(shape, value)
    start = draw(st.integers(0, max(0, len(FILE) - size)))
    if kind == "strided" and len(shape) >= 2 and size:
        rows, width = prod(shape[:-1]), shape[-1]
        pitch = width + draw(st.integers(0, 5))
        start = draw(st.integers(0, len(FILE) - rows * pitch))
        data = FILE[start : start + rows * pitch].reshape(rows, pitch)[:, :width].reshape(shape)
        return Tensor.from_file("file", 2 * start, F16, shape, pitch=2 * pitch), data
    data = FILE[start : start + size].reshape(shape)
    if kind == "bytes":
        return Tensor.from_bytes(data.tobytes(), F16, shape), data
    return Tensor.from_file("file", 2 * start, F16, shape), data


@st.composite
def pairs(draw: st.DrawFn, shape: tuple[int, ...] | None = None, depth: int = 3) -> Pair:
    """A tensor and the NumPy array that it should be."""
    if shape is None:
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    if not depth:
        return draw(leaves(shape))
    operations: list[Callable[..., Pair]] = [_leaf, _reshape]
    if shape:
        operations += [_rows, _vstack, _cols, _hstack]
    if len(shape) >= 1 and shape[0] > 0:
        operations.append(_stack)
    return draw(st.sampled_from(operations))(draw, shape, depth - 1)


def _leaf(draw: st.DrawFn, shape: tuple[int, ...], depth: int) -> Pair:
    return draw(leaves(shape))


def _reshape(draw: st.DrawFn, shape: tuple[int, ...], depth: int) -> Pair:
    size = prod(shape)
    factor = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0] or [1]))
    before = draw(st.sampled_from([(size,), (factor, size // factor), (1, factor, size // factor), shape]))
    tensor, array = draw(pairs(before, depth))
    return tensor.reshape(shape), array.reshape(shape)


def _rows(draw: st.DrawFn, shape: tuple[int, ...], depth: int) -> Pair:
    above, below = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    tensor, array = draw(pairs((above + shape[0] + below, *shape[1:]), depth))
    return tensor.rows(above, above + shape[0]), array[above : above + shape[0]]


def _cols(draw: st.DrawFn, shape: tuple[int, ...], depth: int) -> Pair:
    left, right = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    tensor, array = draw(pairs((*shape[:-1], left + shape[-1] + right), depth))
    return tensor.cols(left, left + shape[-1]), array[..., left : left + shape[-1]]


def _vstack(draw: st.DrawFn, shape: tuple[int, ...], depth: int) -> Pair:
    cut = draw(st.integers(0, shape[0]))
    parts = [draw(pairs((height, *shape[1:]), depth)) for height in (cut, shape[0] - cut)]
    return vstack([tensor for tensor, _ in parts]), np.concatenate([array for _, array in parts])


def _hstack(draw: st.DrawFn, shape: tuple[int, ...], depth: int) -> Pair:
    cut = draw(st.integers(0, shape[-1]))
    parts = [draw(pairs((*shape[:-1], width), depth)) for width in (cut, shape[-1] - cut)]
    return hstack([tensor for tensor, _ in parts]), np.concatenate([array for _, array in parts], axis=-1)


def _stack(draw: st.DrawFn, shape: tuple[int, ...], depth: int) -> Pair:
    parts = [draw(pairs(shape[1:], depth)) for _ in range(shape[0])]
    return stack([tensor for tensor, _ in parts]), np.stack([array for _, array in parts])


@settings(max_examples=300)
@given(pairs())
def test_algebra_equals_numpy(pair: Pair) -> None:
    tensor, array = pair
    assert tensor.shape == array.shape
    assert tensor.nbytes == array.nbytes
    assert np.array_equal(materialise(tensor), array)


@settings(max_examples=100)
@given(pairs())
def test_runs_are_the_same_bytes(pair: Pair) -> None:
    tensor, array = pair
    runs = b"".join(row_bytes(run, 0) for run in tensor.runs())
    assert runs == array.tobytes()


@settings(max_examples=100)
@given(pairs())
def test_bands_are_well_formed(pair: Pair) -> None:
    tensor, _ = pair
    for band in tensor.bands:
        assert band.rows > 0
        assert sum(piece.width for piece in band.pieces) == tensor.row_width
        assert all(piece.rows == band.rows and piece.width > 0 for piece in band.pieces)


class TestPlansStaySmall:
    """What a plan costs is its bands: neighbours that continue one another have to be one."""

    def test_split_rows_join_to_one_band(self) -> None:
        whole = Tensor.from_file("f", 0, F16, (64, 8))
        assert vstack([whole.rows(i, i + 4) for i in range(0, 64, 4)]).bands == whole.bands

    def test_strided_rows_join_to_one_band(self) -> None:
        column = Tensor.from_file("f", 0, F16, (64, 8)).cols(2, 4)
        assert vstack([column.rows(i, i + 1) for i in range(64)]).bands == column.bands

    def test_split_columns_are_the_same_bytes_again(self) -> None:
        whole = Tensor.from_file("f", 0, F16, (6, 8))
        assert hstack([whole.cols(0, 3), whole.cols(3, 8)]).same_bytes_as(whole)
        assert not hstack([whole.cols(3, 8), whole.cols(0, 3)]).same_bytes_as(whole)

    def test_a_cast_makes_other_bytes(self) -> None:
        whole = Tensor.from_file("f", 0, F16, (6, 8))
        assert not whole.same_bytes_as(whole.astype(DTYPES["F32"]))
        assert whole.astype(F16) == whole

    def test_columns_of_other_files_are_told_apart_at_their_first_row(self) -> None:
        """Each row is a run; whoever listed them all would not come back."""
        one, other = (
            hstack([Tensor.from_file(file, start, DTYPES["U8"], (10**12, 2), 8) for start in (0, 4)]) for file in "ab"
        )
        assert not one.same_bytes_as(other)


class TestRefusals:
    tensor = Tensor.from_file("f", 0, F16, (4, 6))

    @pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 5)])
    def test_rows_outside(self, start: int, stop: int) -> None:
        with pytest.raises(IndexError, match="rows"):
            self.tensor.rows(start, stop)

    @pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 7)])
    def test_columns_outside(self, start: int, stop: int) -> None:
        with pytest.raises(IndexError, match="columns"):
            self.tensor.cols(start, stop)

    def test_rows_of_a_scalar(self) -> None:
        with pytest.raises(IndexError):
            Tensor.from_file("f", 0, F16, ()).rows(0, 1)

    def test_reshape_to_another_size(self) -> None:
        with pytest.raises(ValueError, match="cannot reshape"):
            self.tensor.reshape((5, 5))

    def test_bytes_of_another_size(self) -> None:
        with pytest.raises(ValueError, match="3 bytes"):
            Tensor.from_bytes(b"abc", F16, (2,))

    @pytest.mark.parametrize("join", [vstack, hstack])
    def test_joining_other_types_or_shapes(self, join: Callable[[list[Tensor]], Tensor]) -> None:
        with pytest.raises(ValueError, match="cannot join"):
            join([self.tensor, Tensor.from_file("f", 0, DTYPES["F32"], (4, 6))])
        with pytest.raises(ValueError, match="cannot join"):
            join([self.tensor, Tensor.from_file("f", 0, F16, (5, 7))])
        with pytest.raises(ValueError, match="cannot join"):
            join([self.tensor, self.tensor.astype(DTYPES["F32"])])

    @pytest.mark.parametrize("join", [vstack, hstack, stack])
    def test_joining_nothing(self, join: Callable[[list[Tensor]], Tensor]) -> None:
        with pytest.raises(ValueError, match="nothing"):
            join([])

    @pytest.mark.parametrize("join", [vstack, hstack])
    def test_joining_scalars(self, join: Callable[[list[Tensor]], Tensor]) -> None:
        with pytest.raises(ValueError, match="cannot join"):
            join([Tensor.full(F16, ())])


def test_scalar_is_one_row() -> None:
    tensor = Tensor.from_file("f", 10, F16, ())
    assert tensor.bands == (Band(1, (Region("f", 10, 1, 2, 2),)),)


def test_literal_rows_are_cut_without_copying() -> None:
    data = FILE[:12].tobytes()
    (band,) = Tensor.from_bytes(data, F16, (3, 4)).rows(1, 2).bands
    assert isinstance(band.pieces[0], Literal)
    assert band.pieces[0].data is data
