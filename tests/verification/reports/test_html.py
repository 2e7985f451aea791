from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from ckptkit.sharding.grid import Parallelism
from ckptkit.verification.reports.charts import Series, log_chart, rank_map
from ckptkit.verification.reports.html import html_page
from tests.verification.reports.samples import report, side

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; every tag that opens must close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def numbers(page: Page, tag: str, kind: str) -> list[dict[str, str | None]]:
    return [attributes for name, attributes in page.tags if name == tag and kind in str(attributes.get("class"))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("passed", [True, False])
def test_the_page_says_what_was_found_and_needs_nothing_else(passed: bool, dtype: str) -> None:
    source = html_page(report(passed, dtype))
    page = Page(source)
    text = " ".join(page.text)
    assert ("Same model" in text) == passed and ("The models differ" in text) == (not passed)
    for part in (
        "hf <model> & more",
        'out/"meg"',
        'largest <error> "1" & more',
        "a <note>",
        "Error by layer",
        "RMSNorm",
    ):
        assert part in text, part
    assert ("the models part at <layer 1> mlp" in text) == (not passed)
    assert "Error by position" in text and "Which rank holds what" in text and "Routers" in text
    assert "not reached" in text
    fetched = {"src", "href", "data", "poster", "srcset"}
    assert not any(fetched & attributes.keys() for _, attributes in page.tags)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?:|@import|url\(", source)
    assert "prefers-color-scheme: dark" in source
    assert ("reference itself" in text) == (dtype == "bfloat16")
    assert len(numbers(page, "line", "mark")) == int(not passed)


def test_a_chart_is_logarithmic_and_shows_what_is_not_finite() -> None:
    page = Page(log_chart([Series("s", "a", [1e-6, 1e-4, 1e-2, 0.0, None])], list("abcde"), limit=(1e-3, "limit")))
    heights = [float(str(dot["cy"])) for dot in numbers(page, "circle", "dot")]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
    assert heights[3] == max(heights) and heights[4] == min(heights)
    assert "s, e: not finite" in page.text and "s, a: 1.00e-06" in page.text
    (limit,) = numbers(page, "line", "limit")
    assert heights[1] > float(str(limit["y1"])) > heights[2]


@pytest.mark.parametrize("values", [[], [0.0], [None, None], [5.0]])
def test_a_chart_of_next_to_nothing(values: list[float | None]) -> None:
    page = Page(log_chart([Series("s", "a", values)], ["p"] * len(values)))
    assert len(numbers(page, "circle", "dot")) == len(values)


GRIDS = [Parallelism(), Parallelism(2, 2, ep=2), Parallelism(1, 2, 2), Parallelism(8, 8), Parallelism(1, 4, 2)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_map_covers_every_layer_on_every_rank(grid: Parallelism) -> None:
    layers = 16
    data = report().to_dict()["sides"]["candidate"] | side_dict(grid, layers)
    page = Page(rank_map(data))
    blocks = numbers(page, "rect", "block")
    row = max(5, min(16, 460 // (layers + 2)))
    covered = sum(round((float(str(block["height"])) + 2) / row) for block in blocks)
    assert covered == (layers + 2) * grid.stage_size
    assert len({block["x"] for block in blocks}) == grid.world_size
    assert any(re.match(r"rank \d+ .*embedding, layers? 0", text) for text in page.text)


def side_dict(grid: Parallelism, layers: int) -> dict[str, object]:
    from dataclasses import asdict

    return asdict(side("meg", grid, layers, experts=4))
