"""Drawings for the HTML report, as SVG that takes its colours from the page."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

from ckptkit.printable import printable
from ckptkit.verification.reports.contents import rows_of

WIDTH, HEIGHT = 920, 270
LEFT, RIGHT, TOP, BOTTOM = 62, 30, 16, 32
NARROWEST = 1e-9
"""Errors below this are drawn as this: it is far under what fp32 can tell."""

LONG_WORD = 20
"""Characters of a word that need not break."""


def shown(text: str) -> str:
    """A text as HTML: visible characters, and none that means markup."""
    return escape(printable(text))


def name_shown(text: str) -> str:
    """A text as HTML whose long words, names and paths, may break after their parts and nowhere else."""
    return " ".join(
        "<wbr>".join(escape(part) for part in re.findall(r"[^./_]*[./_]+|[^./_]+", word))
        if len(word) > LONG_WORD
        else escape(word)
        for word in printable(text).split(" ")
    )


@dataclass(frozen=True)
class Series:
    """A line.

    Attributes:
        name: For the legend and the tooltips.
        style: CSS class that gives its colour.
        values: One per place; None is not finite and is drawn at the top.
    """

    name: str
    style: str
    values: Sequence[float | None]


def log_chart(
    series: Sequence[Series],
    places: Sequence[str],
    *,
    limit: tuple[float, str] | None = None,
    mark: tuple[int, str] | None = None,
    title: str = "",
) -> str:
    """Lines over places on a logarithmic axis.

    Args:
        series: The lines, all as long as `places`.
        places: Names along the horizontal axis; as many are written as fit.
        limit: Where to draw a horizontal line, and its name.
        mark: Number of a place to draw a vertical line at, and its name.
        title: Description of the chart, for screen readers.
    """
    low, high = _decades([value for line in series for value in line.values], limit)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" class="chart"><title>{shown(title)}</title>',
        *_horizontal_grid(low, high),
        *_place_names(places),
    ]
    if limit is not None and limit[0] > 0:
        y = _y(limit[0], low, high)
        parts.append(f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="limit-name" x="{WIDTH - RIGHT - 4}" y="{y - 5:.1f}">{shown(limit[1])}</text>')
    if mark is not None:
        x = _x(mark[0], len(places))
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        side = "end" if x > WIDTH / 2 else "start"
        at = x - 6 if side == "end" else x + 6
        parts.append(
            f'<text class="mark-name" x="{at:.1f}" y="{TOP + 11}" text-anchor="{side}">{shown(mark[1])}</text>'
        )
    for line in series:
        parts += _line(line, places, low, high)
    return "".join([*parts, "</svg>"])


def _decades(values: Sequence[float | None], limit: tuple[float, str] | None) -> tuple[int, int]:
    """Powers of ten that hold all values."""
    found = [max(value, NARROWEST) for value in [*values, limit[0] if limit else None] if value is not None]
    low = math.floor(math.log10(min(found, default=NARROWEST)))
    return low, max(low + 2, math.ceil(math.log10(max(found, default=1.0))))


def _x(place: int, count: int) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * (place / (count - 1) if count > 1 else 0.5)


def _y(value: float | None, low: int, high: int) -> float:
    if value is None:
        return TOP
    share = (math.log10(max(value, NARROWEST)) - low) / (high - low)
    return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)


def _horizontal_grid(low: int, high: int) -> Iterator[str]:
    step = max(1, math.ceil((high - low) / 7))
    for power in range(low, high + 1, step):
        y = _y(10.0**power, low, high)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">1e{power}</text>'


def _place_names(places: Sequence[str]) -> Iterator[str]:
    """Names that fit, the first and the last among them."""
    step = max(1, math.ceil(len(places) / 12))
    last = len(places) - 1
    for number, name in enumerate(places):
        if number == last or (number % step == 0 and last - number >= step):
            x, y = _x(number, len(places)), HEIGHT - BOTTOM + 20
            yield f'<text class="tick" x="{x:.1f}" y="{y}" text-anchor="middle">{shown(name)}</text>'


def _line(line: Series, places: Sequence[str], low: int, high: int) -> Iterator[str]:
    points = [(_x(number, len(places)), _y(value, low, high)) for number, value in enumerate(line.values)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    yield f'<polyline class="line {line.style}" points="{path}"/>'
    for (x, y), place, value in zip(points, places, line.values, strict=True):
        text = "not finite" if value is None else f"{value:.2e}"
        radius = 2.8 if len(points) <= 120 else 1.6
        yield (
            f'<circle class="dot {line.style}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">'
            f"<title>{shown(line.name)}, {shown(place)}: {text}</title></circle>"
        )


# Which rank holds what ------------------------------------------------------------------------------------------------

LABELLED = 20
"""Up to so many ranks the map has room to write into its columns."""
HUES = (212, 28, 150, 330, 265, 48, 184, 0)
"""Degrees; neighbours are far apart, and stages repeat them from the ninth on."""


def rank_map(side: Mapping[str, Any], guilty: Collection[tuple[int, int]] = ()) -> str:
    """The layers, top to bottom, over the ranks of a grid, left to right; each block is a model chunk.

    Args:
        side: A `SideReport` as JSON.
        guilty: (rank, row) of what is outlined; row 0 is the embedding, the last one the head.
    """
    ranks, layers = side["ranks"], side["num_layers"]
    roomy = len(ranks) <= LABELLED
    column = max(84, min(170, 860 // max(1, len(ranks)))) if roomy else max(6, min(28, 860 // len(ranks)))
    row = max(5, min(16, 460 // (layers + 2)))
    left, top = 74, 40 if roomy else 26
    width, height = left + column * len(ranks) + 6, top + row * (layers + 2) + 6
    parts = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" class="map">'
        f"<title>Which rank of {shown(side['grid']['name'])} holds which layers</title>",
        *_layer_names(layers, set(side["moe_layers"]), left, top, row),
    ]
    if not roomy:
        parts += _stage_names(ranks, left, column)
    for number, rank in enumerate(ranks):
        x = left + number * column
        if roomy:
            middle = x + column / 2
            parts.append(f'<text class="rank" x="{middle:.1f}" y="14">rank {rank["rank"]}</text>')
            parts.append(f'<text class="tick" x="{middle:.1f}" y="29" text-anchor="middle">{_place(rank, side)}</text>')
        for chunk in rank["chunks"]:
            parts += _blocks(rank, chunk, side, (x, top, column, row), roomy)
        for at in sorted(at for holder, at in guilty if holder == rank["rank"]):
            parts.append(
                f'<rect class="guilty" x="{x + 1}" y="{top + at * row}" width="{column - 2}" height="{row}" rx="2">'
                f"<title>rank {rank['rank']}, {_row_name(at, layers)}: differs</title></rect>"
            )
    return "".join([*parts, "</svg>"])


def _row_name(row: int, layers: int) -> str:
    return "embedding" if row == 0 else "final norm and head" if row > layers else f"layer {row - 1}"


def _stage_names(ranks: Sequence[Mapping[str, Any]], left: int, column: int) -> Iterator[str]:
    """Names of the pipeline ranks over their columns, where those of single ranks have no room."""
    for stage, run in groupby(enumerate(ranks), key=lambda pair: pair[1]["pp"]):
        at = [number for number, _ in run]
        if len(at) * column >= 30:
            middle = left + (at[0] + len(at) / 2) * column
            yield f'<text class="rank" x="{middle:.1f}" y="16">PP{stage}</text>'


def _place(rank: Mapping[str, Any], side: Mapping[str, Any]) -> str:
    """The rank's places in the dimensions that the grid splits."""
    grid = side["grid"]
    names = [f"{name.upper()}{rank[name]}" for name in ("pp", "tp", "ep") if grid[name] > 1]
    return " ".join(names) or "whole model"


def _layer_names(layers: int, moe: set[int], left: int, top: int, row: int) -> Iterator[str]:
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, layers + 1) if step * row >= 14)
    names = {0: "embedding", layers + 1: "head"} | {layer + 1: f"layer {layer}" for layer in range(0, layers, step)}
    if row < 11:  # no room for the first or last layer beside them
        names = {
            at: name for at, name in names.items() if at in (0, layers + 1) or 14 <= at * row <= (layers * row) - 3
        }
    for at, name in names.items():
        y = top + (at + 0.5) * row + 4
        yield f'<text class="tick" x="{left - 12}" y="{y:.1f}" text-anchor="end">{name}</text>'
    for layer in moe:
        y = top + (layer + 1.5) * row
        title = f"<title>layer {layer} has experts</title>"
        yield f'<circle class="moe" cx="{left - 5}" cy="{y:.1f}" r="2">{title}</circle>'


def _blocks(
    rank: Mapping[str, Any],
    chunk: Mapping[str, Any],
    side: Mapping[str, Any],
    box: tuple[int, int, int, int],
    roomy: bool,
) -> Iterator[str]:
    """The content of a chunk: its layers, with the embedding above and the head below them."""
    x, top, column, row = box
    gap = 2 if column >= 16 else 1
    rows = rows_of(chunk, side)
    hue = HUES[rank["pp"] % len(HUES)]
    text = _describe(rank, chunk, side)
    for _, run in groupby(enumerate(rows), key=lambda pair: pair[1] - pair[0]):
        part = [at for _, at in run]
        y, height = top + part[0] * row, row * len(part)
        yield (
            f'<rect class="block" style="--hue:{hue};--step:{chunk["vp_stage"] % 4}" x="{x + gap}" y="{y + 1}"'
            f' width="{column - 2 * gap}" height="{height - 2}" rx="{2 * gap}"><title>{shown(text)}</title></rect>'
        )
        lines = _block_lines(rank, chunk, side) if roomy else []
        lines = lines[: max(0, int((height - 4) // 14))]
        for number, line in enumerate(lines):
            baseline = y + height / 2 + 4 + (number - (len(lines) - 1) / 2) * 14
            yield f'<text class="inside" x="{x + column / 2:.1f}" y="{baseline:.1f}">{shown(line)}</text>'


def _block_lines(rank: Mapping[str, Any], chunk: Mapping[str, Any], side: Mapping[str, Any]) -> list[str]:
    grid, lines = side["grid"], []
    if chunk["layers"]:
        lines.append(_range("layer", chunk["layers"]))
    if grid["vpp"] > 1:
        lines.append(f"VPP{chunk['vp_stage']}")
    if grid["tp"] > 1:
        lines.append(f"{rank['tp'] + 1} of {grid['tp']}")
    if grid["ep"] > 1 and rank["experts"]:
        lines.append(_range("expert", rank["experts"]))
    return lines


def _describe(rank: Mapping[str, Any], chunk: Mapping[str, Any], side: Mapping[str, Any]) -> str:
    holds = ["embedding"] * chunk["embedding"] + ([_range("layer", chunk["layers"])] if chunk["layers"] else [])
    holds += ["final norm and head"] * chunk["head"]
    experts = f"; {_range('expert', rank['experts'])}" if rank["experts"] else ""
    return f"rank {rank['rank']} ({_place(rank, side)}): {', '.join(holds)}{experts}"


def _range(what: str, numbers: Sequence[int]) -> str:
    return f"{what} {numbers[0]}" if len(numbers) == 1 else f"{what}s {numbers[0]}\u2013{numbers[-1]}"
