"""Tables and lines of text. Every text goes through `printable`, and lines break between words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ckptkit.printable import printable

SHOWN = 40
"""The number of lines of one kind that are printed."""

_BREAKS = tuple(re.compile(rf"[^{after}]*[{after}]+|[^{after}]+") for after in (r"\s", "/.", "_-"))
"""Places to break a line, in order of preference: after spaces, after `/` and `.`, after `_` and `-`."""


class Cell:
    """The text of a table cell. Its line breaks are kept.

    Args:
        text: The text.
        style: A style of rich.
        right: Whether it is aligned to the right.
    """

    def __init__(self, text: str, style: str = "", *, right: bool = False) -> None:
        self._lines = [printable(line) for line in text.split("\n")]
        self._style, self._right = style, right

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        words = (word for text in self._lines for word in _BREAKS[0].findall(text))
        pieces = (piece for word in words for piece in _BREAKS[1].findall(word))
        narrowest = max((cell_len(piece.rstrip()) for piece in pieces), default=0)
        return Measurement(narrowest, max(map(cell_len, self._lines)))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(options.max_width, 1)
        lines = (part for line in self._lines for part in broken(line, width))
        yield Text("\n".join(lines), self._style, justify="right" if self._right else "left", no_wrap=True)


def broken(text: str, width: int) -> list[str]:
    """The lines of a text that is `width` columns wide at most, broken between words."""
    lines = [""]
    for piece in _pieces(text, width):
        if cell_len(lines[-1]) + cell_len(piece.rstrip()) > width:
            lines[-1] = lines[-1].rstrip()
            lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines]


def _pieces(text: str, width: int, level: int = 0) -> Iterator[str]:
    """Pieces of a text that fit on a line: words; parts of longer words; slices of longer parts."""
    for part in _BREAKS[level].findall(text):
        if cell_len(part.rstrip()) <= width:
            yield part
        elif level + 1 < len(_BREAKS):
            yield from _pieces(part, width, level + 1)
        else:
            yield from (part[at : at + width] for at in range(0, len(part), width))


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = True) -> Table:
    """A table whose columns after the first hold numbers, or whose last column holds sentences.

    Args:
        headers: Names of the columns.
        rows: The cells.
        numbers: Whether the columns after the first hold numbers. Then the first column breaks its lines, otherwise the
            last one does.
    """
    made = Table(box=SIMPLE_HEAD, pad_edge=False)
    breaks = 0 if numbers else len(headers) - 1
    for index, header in enumerate(headers):
        right = numbers and index > 0
        made.add_column(header, justify="right" if right else "left", no_wrap=index != breaks)
    for row in rows:
        made.add_row(*(Cell(cell, right=numbers and index > 0) for index, cell in enumerate(row)))
    return made


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """Names and values in two columns."""
    made = Table.grid(padding=(0, 2))
    made.add_column(no_wrap=True)
    made.add_column()
    for name, value in rows:
        made.add_row(Cell(name, "dim"), Cell(value))
    return made


def line(*parts: str | tuple[str, str]) -> Text:
    """A line of texts; each part is a text or a (text, style) pair."""
    pairs = (part if isinstance(part, tuple) else (part, "") for part in parts)
    return Text.assemble(*((printable(text), style) for text, style in pairs))


def sentences(console: Console, texts: Iterable[str], label: str, style: str) -> None:
    """Sentences, each on a line of its own after a label."""
    for text in texts:
        console.print(line((f"{label}: ", style), text), soft_wrap=True)


def cut(texts: Sequence[str]) -> list[str]:
    """The first `SHOWN` texts, and a line that counts the others."""
    more = len(texts) - SHOWN
    return [*texts[:SHOWN], *([f"... and {more:,} more (--json has all)"] if more > 0 else [])]
