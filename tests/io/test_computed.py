"""Computed tensors: any range of their bytes, from any thread, is that of whole tiles rounded once."""

from __future__ import annotations

import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckptkit.dtypes import DTYPES
from ckptkit.io import computed as module
from ckptkit.io.cache import Cache
from ckptkit.io.casts import encode
from ckptkit.io.computed import columns_apart, columns_together, computed, elementwise, permuted
from ckptkit.io.plan import Comparison
from ckptkit.io.reading import compare, hash_tensor, read_tensor
from ckptkit.tensors import Literal, Tensor, hstack, vstack


def numbers(shape: tuple[int, ...], seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=shape).astype("<f4")


def tensor(array: np.ndarray[Any, Any], dtype: str = "F32") -> Tensor:
    return Tensor.from_bytes(array.tobytes(), DTYPES[dtype], array.shape)


@pytest.mark.parametrize("tile", [1, 7, 40, 1 << 20])
def test_cuts_of_computed_tensors(monkeypatch: Any, tile: int) -> None:
    monkeypatch.setattr(module, "TILE", tile)
    array, asked = numbers((9, 5)), []

    def values(start: int, stop: int) -> Any:
        asked.append((start, stop))
        return array[start:stop] * np.float32(3)

    made = computed(DTYPES["F32"], (9, 5), [tensor(array)], f"thrice by {tile}", values)
    expected = array * np.float32(3)
    assert read_tensor(made).tobytes() == expected.tobytes()
    both = hstack([made.rows(2, 8).cols(1, 4), made.rows(0, 6).cols(0, 2)])
    assert read_tensor(both).tobytes() == np.hstack([expected[2:8, 1:4], expected[:6, :2]]).tobytes()
    assert read_tensor(vstack([made.rows(5, 9), made.rows(0, 1)])).tobytes() == expected[[5, 6, 7, 8, 0]].tobytes()
    height = max(tile // 5, 1)
    assert set(asked) == {(top, min(top + height, 9)) for top in range(0, 9, height)}, "whole tiles, each from its top"


@pytest.mark.parametrize("any_rows", [False, True])
@given(first=st.integers(0, 359), size=st.integers(1, 360), tile=st.sampled_from([1, 7, 40, 100]))
def test_ranges_of_sums(any_rows: bool, first: int, size: int, tile: int) -> None:
    """With `any_rows`, ranges longer than a tile are computed as they are; an element stays the same."""
    arrays = [numbers((30, 3), seed) for seed in range(2)]
    asked = []

    def values(at: int, found: list[Any]) -> Any:
        asked.append(at)
        return found[0] + found[1] * np.arange(at, at + len(found[0]), dtype=np.float32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TILE", tile)
        patch.setattr(module, "BLOCK", 6)
        patch.setattr(module, "_tiles", Cache(1 << 20, len))
        made = elementwise(
            DTYPES["F32"], [tensor(array) for array in arrays], "sum", values, double=False, any_rows=any_rows
        )
        (piece,) = made.bands[0].pieces
        assert isinstance(piece, Literal) and not isinstance(piece.data, bytes)
        last = min(first + size, len(piece.data))
        found = bytes(piece.data.read(first, last))
    whole = arrays[0] + arrays[1] * np.arange(90, dtype=np.float32).reshape(30, 3)
    assert found == whole.tobytes()[first:last]
    rows = max(tile // 3, 1)
    direct = any_rows and last - first >= rows * 12
    assert asked[0] == (first // 12 if direct else first // 12 // rows * rows) * 3


def test_digests_name_the_bytes() -> None:
    array = numbers((4, 4))

    def made(what: str, source: np.ndarray[Any, Any] = array, dtype: str = "F32") -> str:
        (piece,) = computed(DTYPES[dtype], (4, 4), [tensor(source)], what, lambda a, b: source[a:b]).bands[0].pieces
        assert isinstance(piece, Literal) and not isinstance(piece.data, bytes)
        assert piece.data.digest in repr(piece.data)
        return piece.data.digest

    digests = [made("a"), made("b"), made("a", numbers((4, 4), 1)), made("a", dtype="BF16")]
    assert len(set(digests)) == 4 and made("a") == digests[0]


@pytest.mark.parametrize("axes", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
@pytest.mark.parametrize("tile", [3, 1 << 20])
def test_permuted(monkeypatch: Any, axes: tuple[int, int, int], tile: int) -> None:
    monkeypatch.setattr(module, "TILE", tile)
    array = numbers((3, 4, 5))
    found = permuted(tensor(array), axes)
    expected = np.ascontiguousarray(array.transpose(axes))
    assert found.shape == expected.shape and read_tensor(found).tobytes() == expected.tobytes()
    assert read_tensor(found.rows(1, 3)).tobytes() == expected[1:3].tobytes()
    with pytest.raises(ValueError, match="three axes"):
        permuted(tensor(array).reshape((12, 5)), axes)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("tile", [1, 11, 1 << 20])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "U8"])
def test_columns_become_rows(monkeypatch: Any, tmp_path: Path, count: int, tile: int, dtype: str) -> None:
    monkeypatch.setattr(module, "TURNED", tile)
    kind = DTYPES[dtype]
    array = np.arange(70 * 5 * count, dtype=f"u{kind.itemsize}").reshape(70, 5 * count)
    (tmp_path / "matrix").write_bytes(array.tobytes())
    matrix = Tensor.from_file(str(tmp_path / "matrix"), 0, kind, array.shape)
    parts = columns_apart(matrix, count)
    for at, part in enumerate(parts):
        expected = np.ascontiguousarray(array[:, at::count].T)
        assert part.shape == expected.shape and read_tensor(part).tobytes() == expected.tobytes()
        assert read_tensor(part.rows(1, 4).cols(3, 60)).tobytes() == expected[1:4, 3:60].tobytes()
        (tmp_path / f"part{at}").write_bytes(expected.tobytes())
    stored = [Tensor.from_file(str(tmp_path / f"part{at}"), 0, kind, (5, 70)) for at in range(count)]
    joined = columns_together(stored)
    assert joined.shape == array.shape and read_tensor(joined).tobytes() == array.tobytes()
    assert read_tensor(joined.rows(60, 70).cols(2, 4)).tobytes() == array[60:, 2:4].tobytes()
    assert (
        read_tensor(columns_apart(matrix.rows(3, 9), count)[-1]).tobytes() == array[3:9, count - 1 :: count].T.tobytes()
    )


def test_columns_there_and_back_are_the_same_bytes() -> None:
    """Nothing is computed twice over: a matrix that is only passed on is read where it lies."""
    matrix = tensor(numbers((6, 8)))
    parts = columns_apart(matrix, 2)
    whole = vstack(parts)  # as they lie in another tensor, and are cut out again
    assert columns_together([whole.rows(0, 4), whole.rows(4, 8)]).same_bytes_as(matrix)
    assert all(map(Tensor.same_bytes_as, columns_apart(columns_together(parts[::-1]), 2), parts[::-1]))
    swapped = columns_together(parts[::-1])
    assert not swapped.same_bytes_as(matrix)
    assert read_tensor(swapped).tobytes() == matrix_of(matrix)[:, [1, 0, 3, 2, 5, 4, 7, 6]].tobytes()
    other = columns_apart(tensor(numbers((6, 8), 1)), 2)
    assert not columns_together([parts[0], other[1]]).same_bytes_as(matrix)
    assert not columns_together(columns_apart(matrix, 4)[:2]).same_bytes_as(matrix)
    narrow = [part.astype(DTYPES["BF16"]) for part in parts]
    assert columns_together(narrow).same_bytes_as(matrix.astype(DTYPES["BF16"]))
    assert [part.cast for part in columns_apart(matrix.astype(DTYPES["BF16"]), 2)] == [DTYPES["BF16"]] * 2
    with pytest.raises(ValueError, match="cannot join BF16"):
        columns_together([narrow[0], parts[1]])


def matrix_of(whole: Tensor) -> Any:
    return read_tensor(whole).view("<f4").reshape(whole.shape)


def test_the_cache_makes_a_value_once_and_forgets_the_oldest() -> None:
    cache: Cache[bytes] = Cache(10, len)
    made: list[str] = []

    def make(key: str) -> bytes:
        made.append(key)
        return key.encode() * 4

    started = threading.Barrier(4)

    def ask() -> None:
        started.wait()
        assert cache.get("a", lambda: make("a")) == b"aaaa"

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == ["a"]
    for key in ("b", "a", "c", "a", "b"):
        cache.get(key, lambda key=key: make(key))
    assert made == ["a", "b", "c", "b"], "of three, two fit; a was asked for last"
    with pytest.raises(ZeroDivisionError):
        cache.get("bad", lambda: bytes([1 // 0]))
    assert cache.get("bad", lambda: b"good") == b"good"


def test_errors_of_sources_reach_whoever_reads(tmp_path: Any) -> None:
    gone = Tensor.from_file(str(tmp_path / "gone"), 0, DTYPES["F32"], (4, 4))
    made = computed(DTYPES["F32"], (4, 4), [gone], "", lambda a, b: module.numbers(gone.rows(a, b)))
    with pytest.raises(Exception, match="the source file is gone"):
        hash_tensor(made)
    with pytest.raises(Exception, match="the source file is gone"):
        compare(Comparison(made, tensor(numbers((4, 4))), "both"))


@given(st.lists(st.floats(allow_nan=False, width=64), min_size=1, max_size=40))
def test_rounding_of_float64_is_done_once(values: list[float]) -> None:
    """To bfloat16: the nearest neighbour, and of two the one with an even last bit, by exact arithmetic."""
    array = np.array(values)
    with np.errstate(over="ignore"):
        found = torch.from_numpy(encode(array, DTYPES["BF16"]).view(np.int16)).view(torch.bfloat16)
    for value, one in zip(values, found, strict=True):
        near = float(one)
        if not np.isfinite(near):
            assert abs(value) >= float(torch.finfo(torch.bfloat16).max)
            continue
        bits = int(one.view(torch.int16)) & 0xFFFF
        for neighbour in (bits - 1, bits + 1):
            other = float(torch.tensor([neighbour & 0xFFFF], dtype=torch.int32).to(torch.int16).view(torch.bfloat16))
            if np.isfinite(other) and other != near:
                mine, theirs = (abs(Fraction(value) - Fraction(x)) for x in (near, other))
                assert mine < theirs or (mine == theirs and bits % 2 == 0)


def test_rounding_twice_would_differ() -> None:
    """Just above the middle of two bfloat16, where float32 has nothing in between."""
    value = np.array([1 + 2.0**-8 + 2.0**-40])
    assert encode(value, DTYPES["BF16"]).view(np.uint16)[0] == 0x3F81
    assert encode(value.astype(np.float32), DTYPES["BF16"]).view(np.uint16)[0] == 0x3F80


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_is_written_anew_is_computed_anew(tmp_path: Path, replaced: bool) -> None:
    """One process may convert the same paths again and again, with other weights each time."""
    file = tmp_path / "weights"

    def raised(values: list[float]) -> list[float]:
        new = tmp_path / "new" if replaced else file
        new.write_bytes(np.array(values, np.float32).tobytes())
        new.replace(file)
        tensor = Tensor.from_file(str(file), 0, DTYPES["F32"], (3,))
        found = elementwise(DTYPES["F32"], [tensor], "one more", lambda at, some: some[0] + 1, double=False)
        small = module.operand(tensor, module.digest_of([tensor]))
        assert small.tolist() == values
        return read_tensor(found).view(np.float32).tolist()

    assert raised([1, 2, 3]) == [2, 3, 4]
    assert raised([5, 6, 7]) == [6, 7, 8]
