"""Tables: at most as wide as the console, names whole or broken between their words, nothing a terminal obeys."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from ckptkit.cli.output import PIPED_WIDTH
from ckptkit.cli.tables import broken, cut, facts, line, sentences, table

LONG = "language_model.model.layers.47.block_sparse_moe.experts.127.down_projection_weight_quantised.weight"


def drawn(renderable: object, width: int = PIPED_WIDTH) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [20, 40, 60, 100])
def test_names_break_between_words_only(width: int) -> None:
    lines = broken(LONG, width)
    assert "".join(lines) == LONG
    assert all(len(text) <= width for text in lines)
    assert all(text[-1] in "._" for text in lines[:-1])


def test_what_has_no_place_to_break_is_broken_anywhere() -> None:
    lines = broken("x" * 95, 30)
    assert [len(text) for text in lines] == [30, 30, 30, 5]
    assert broken("", 10) == [""]
    assert broken("one two three", 7) == ["one two", "three"]


@pytest.mark.parametrize("width", [50, 80, 100])
def test_tables_keep_to_the_width_and_to_their_numbers(width: int) -> None:
    rows = [(LONG, "1,048,576", "1,048,576", "0.00123"), ("head", "1", "2", "3")]
    text = drawn(table(("Tensor", "Differ", "Of", "Largest"), rows), width)
    assert max(map(len, text.splitlines())) <= width
    assert "1,048,576" in text and "0.00123" in text
    column = "".join(row[: row.find("  ") if "  " in row else None].strip() for row in text.splitlines())
    assert LONG in column


def test_sentences_wrap_in_the_last_column() -> None:
    why = "largest error 1.0e+00 of the largest |logit| (tolerance 1e-04), top-1 agreement 50.0 %, greedy tokens 1 of 8"
    text = drawn(
        table(("Level", "Answer", "Because"), [("logits", "DIFFERS", f"{why}\nthe models part")], numbers=False)
    )
    assert max(map(len, text.splitlines())) <= PIPED_WIDTH
    words = " ".join(text.split())
    assert all(word in words for word in why.split()) and "the models part" in words


def test_nothing_that_a_terminal_obeys() -> None:
    evil = "a\x1b[2J\u202eb\x07"
    console = Console(file=io.StringIO(), width=100)
    console.print(table(("Name", "N"), [(evil, evil)]))
    console.print(facts([(evil, evil)]))
    console.print(line(evil, (evil, "bold")))
    sentences(console, [evil], "note", "cyan")
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "\x1b" not in text and "\u202e" not in text and "\x07" not in text
    assert text.count(r"a\x1b[2J\u202eb\x07") == 7


def test_long_lists_are_cut() -> None:
    assert cut(["a"] * 40) == ["a"] * 40
    assert cut(["a"] * 43)[-1] == "... and 3 more (--json has all)"
