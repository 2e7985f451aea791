"""What comes out of a file is printed as visible characters of bounded length, and nothing else is changed."""

from __future__ import annotations

import unicodedata

import pytest

from ckptkit.printable import LONGEST_IN_JSON, LONGEST_TEXT, LONGEST_WORD, printable, printable_json


@pytest.mark.parametrize("text", ["", "model.layers.0.mlp", "größe ß 模型 ñ 🤗", "a  b   c", "[bold]x[/bold]"])
def test_what_is_visible_stays(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;OWNED\x07\x1b[2J", r"\x1b]0;OWNED\x07\x1b[2J"),
        ("a\nb\r\tc\x00", r"a\x0ab\x0d\x09c\x00"),
        ("\x7f\x9b31m", r"\x7f\x9b31m"),
        ("safe\u202etxt.exe", r"safe\u202etxt.exe"),
        ("\u2066\u2069\u200f\u061c", r"\u2066\u2069\u200f\u061c"),
        ("\udcff", r"\udcff"),
        ("a\u2028b\u2029", r"a\u2028b\u2029"),
        ("\U000e0001", r"\U000e0001"),
    ],
)
def test_what_a_terminal_obeys_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_no_character_of_an_unsafe_category_passes() -> None:
    every = "".join(map(chr, range(0x110000)))
    shown = "".join(printable(every[at : at + 200]) for at in range(0, len(every), 200))
    categories = {unicodedata.category(character) for character in shown}
    assert not categories & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    shown.encode("utf-8")


def test_long_words_and_long_texts_are_cut_in_the_middle() -> None:
    shown = printable(f"tensor {'a' * 10_000}z is missing")
    assert len(shown) < LONGEST_WORD + 30
    assert shown.startswith("tensor aaa") and shown.endswith("az is missing") and "...+" in shown
    shown = printable("word " * 10_000 + "end")
    assert len(shown) <= LONGEST_TEXT and shown.endswith("end")
    assert len(printable("\x00" * 10**6)) <= LONGEST_WORD
    whole = "a" * LONGEST_WORD
    assert printable(whole) == whole


def test_a_million_characters_take_no_time() -> None:
    import time

    start = time.process_time()
    printable("\u202e" * 10**7)
    assert time.process_time() - start < 0.5


def test_json_keeps_its_numbers_and_its_paths() -> None:
    path = "/" + "/".join(["directory"] * 200)
    data = {"a\x1b": [1, 2.5, None, True, path], "b": {"c": "\u202e"}}
    assert printable_json(data) == {r"a\x1b": [1, 2.5, None, True, path], "b": {"c": r"\u202e"}}
    assert len(printable_json("x" * 10**6)) <= LONGEST_IN_JSON
