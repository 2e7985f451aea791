"""Names and sizes in a list of a store are input."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptkit.errors import InputError
from ckptkit.io.stores import objects
from ckptkit.io.stores.address import parse
from ckptkit.io.stores.objects import LARGEST_OBJECT, Object, checked
from ckptkit.io.stores.ranges import Ranges

WHERE = parse("s3://models/run")


def listed(*names: str, size: int = 1) -> list[str]:
    return [file.name for file in checked([Object(name, size, "", 0) for name in names], WHERE)]


def test_plain_names() -> None:
    assert listed("b", "a/é ü.bin", ".metadata") == [".metadata", "a/é ü.bin", "b"]


def test_markers_of_folders_are_left_out() -> None:
    files = [Object("", 0, "", 0), Object("a/", 0, "", 0), Object("a", 0, "", 0), Object("a/b", 1, "", 0)]
    assert [file.name for file in checked(files, WHERE)] == ["a/b"]


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["/etc/passwd"], "no name of a file"),
        (["../up"], "no name of a file"),
        (["a/../../up"], "no name of a file"),
        (["a//b"], "no name of a file"),
        (["a/./b"], "no name of a file"),
        (["a\\b"], "characters that are refused"),
        (["a\nb"], "characters that are refused"),
        (["a\x00b"], "characters that are refused"),
        (["a\u202eb"], "characters that are refused"),
        (["a\ud800b"], "characters that are refused"),
        (["a" * 256], "too long"),
        (["a", "a/b"], "a file and a folder"),
        (["a", "a"], "listed twice"),
        (["a/"], "bytes of its own"),
    ],
)
def test_hostile_names(names: list[str], text: str) -> None:
    with pytest.raises(InputError, match=text) as caught:
        listed(*names)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("size", [-1, LARGEST_OBJECT + 1])
def test_impossible_sizes(size: int) -> None:
    with pytest.raises(InputError, match="which no file has"):
        listed("a", size=size)


def test_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "MOST_OBJECTS", 3)
    assert len(listed("a", "b", "c")) == 3
    with pytest.raises(InputError, match="more than 3 files"):
        listed("a", "b", "c", "d")


SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=12)


@given(SPANS, st.integers(0, 60), st.integers(0, 60))
def test_ranges_are_sets_of_bytes(spans: list[tuple[int, int]], start: int, stop: int) -> None:
    ranges = Ranges(spans)
    expected = {at for first, end in spans for at in range(first, end)}
    found = list(ranges)
    assert {at for first, end in found for at in range(first, end)} == expected
    assert all(one[1] < other[0] for one, other in pairwise(found))
    assert ranges.nbytes == len(expected)
    parts = list(ranges.split(start, stop))
    assert [at for first, end, _ in parts for at in range(first, end)] == list(range(start, stop))
    assert all((at in expected) == inside for first, end, inside in parts for at in range(first, end))
