"""JSON as input: json.loads judges what is sound, and what it is too kind to is refused by name."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptkit.errors import InputError
from ckptkit.formats.json_files import JsonError, decode, parse_object, read_json

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**39), 10**39)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc.[é", max_size=4), inner, max_size=4),
    max_leaves=30,
)


@given(st.dictionaries(st.text("ab", max_size=3), VALUES), st.booleans())
def test_sound_json_is_what_python_reads(value: dict[str, Any], ascii: bool) -> None:
    data = json.dumps(value, ensure_ascii=ascii).encode()
    assert parse_object(data, "x") == json.loads(data)


@given(st.lists(st.sampled_from(["key", 0, 1]), max_size=5), st.sampled_from([math.nan, math.inf, -math.inf, 10**40]))
def test_the_place_of_a_number_that_is_none_is_named(path: list[str | int], number: float) -> None:
    value: Any = number
    told = ""
    for step in reversed(path):
        value = {"other": 1, step: value} if isinstance(step, str) else [*([0] * step), value]
        told = (f".{step}" if isinstance(step, str) else f"[{step}]") + told
    with pytest.raises(InputError) as caught:
        parse_object(json.dumps({"top": value}).encode(), "x.json")
    assert str(caught.value).startswith(f"x.json: top{told} is ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 1}', "the key a appears twice in one object"),
        ('{"x": [{"b": 1, "b": 2}]}', "the key b appears twice in one object"),
        pytest.param('{"a": ' * 101 + "1" + "}" * 101, "nested too deep", id="101 levels"),
        pytest.param('{"a": ' * 30000, "nested too deep|Expecting value", id="30,000 levels without an end"),
        ('{"a": ' + "1" * 5000 + "}", "a number of thousands of digits"),
        ('{"a": "\\ud83d"}', "half a character"),
        ('{"\\uDE00": 1}', "half a character"),
        ('{"a": 1,}', "Expecting property name"),
        ("\ufeff{}", "BOM"),
        ("", "Expecting value"),
    ],
)
def test_what_is_no_json(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_object(text.encode(), "x.json")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_pairs_of_halves_are_whole() -> None:
    assert parse_object(b'{"a": "\\ud83d\\ude00"}', "x") == {"a": "\U0001f600"}


@given(st.binary(max_size=100))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with suppress(JsonError):
        decode(data)


def test_a_file_may_have_so_many_bytes_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("{}" + " " * 8)
    assert read_json(path, 10) == {}
    with pytest.raises(InputError, match="larger than 9 bytes"):
        read_json(path, 9)
    with pytest.raises(InputError, match="no such file"):
        read_json(tmp_path / "absent", 9)
