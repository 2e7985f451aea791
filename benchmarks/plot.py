"""Two small line charts side by side, written as SVG by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, TOP, GAP = 330, 210, 58, 34, 80
_COLOURS = ("#888888", "#1f77b4", "#d62728", "#2ca02c")

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """Lines over a common x axis that starts at 0, as does y.

    Attributes:
        title: Above the chart.
        x: What the x axis shows.
        lines: Name -> points.
        limit: Name and height of a dashed line, or None.
    """

    title: str
    x: str
    lines: dict[str, Points]
    limit: tuple[str, float] | None = None


def draw(charts: Sequence[Chart]) -> str:
    """The charts as one SVG document."""
    width = len(charts) * (LEFT + WIDTH + GAP)
    height = TOP + HEIGHT + 60
    style = "font-family:sans-serif;font-size:12px"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" style="{style}">'
    body = [
        f'<g transform="translate({LEFT + index * (LEFT + WIDTH + GAP)} {TOP})">{"".join(_chart(chart))}</g>'
        for index, chart in enumerate(charts)
    ]
    background = f'<rect width="{width}" height="{height}" fill="white"/>'
    return "\n".join([head, background, *body, "</svg>", ""])


def _chart(chart: Chart) -> Iterable[str]:
    points = [point for line in chart.lines.values() for point in line]
    limit = [chart.limit[1]] if chart.limit else []
    x_ticks, y_ticks = _ticks(max(x for x, _ in points)), _ticks(max([y for _, y in points] + limit))

    def place(x: float, y: float) -> str:
        return f"{x / x_ticks[-1] * WIDTH:.1f},{HEIGHT - y / y_ticks[-1] * HEIGHT:.1f}"

    yield _text(0, -14, chart.title, "start", "font-weight:bold")
    for tick in x_ticks:
        x = tick / x_ticks[-1] * WIDTH
        yield f'<path d="M{x:.1f},0V{HEIGHT}" stroke="#eeeeee"/>{_text(x, HEIGHT + 17, f"{tick:g}", "middle")}'
    for tick in y_ticks:
        y = HEIGHT - tick / y_ticks[-1] * HEIGHT
        yield f'<path d="M0,{y:.1f}H{WIDTH}" stroke="#eeeeee"/>{_text(-6, y + 4, f"{tick:g}", "end")}'
    yield _text(WIDTH / 2, HEIGHT + 38, chart.x, "middle")
    if chart.limit:
        start, end = place(0, chart.limit[1]), place(x_ticks[-1], chart.limit[1])
        yield f'<path d="M{start} L{end}" stroke="#333333" stroke-dasharray="5 4" fill="none"/>'
        yield _text(4, float(start.split(",")[1]) - 5, chart.limit[0], "start")
    for colour, (name, line) in zip(_COLOURS, chart.lines.items(), strict=False):
        path = " L".join(place(x, y) for x, y in line)
        yield f'<path d="M{path}" stroke="{colour}" stroke-width="2" fill="none"/>'
        for x, y in line:
            across, down = place(x, y).split(",")
            yield f'<circle cx="{across}" cy="{down}" r="3" fill="{colour}"/>'
        across, down = place(*line[-1]).split(",")
        yield _text(float(across) + 7, float(down) + 4, name, "start", f"fill:{colour}")


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="{style}">{escape(text)}</text>'


def _ticks(highest: float) -> list[float]:
    """About five round numbers from 0 to at least `highest`."""
    step = next(
        factor * 10.0**power for power in range(-3, 9) for factor in (1, 2, 5) if factor * 10.0**power * 6 >= highest
    )
    count = -int(-highest // step)
    return [round(index * step, 6) for index in range(count + 1)]
