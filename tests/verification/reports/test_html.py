from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from ckptkit.sharding.grid import Parallelism
from ckptkit.verification.reports.charts import Series, log_chart, name_shown, rank_map
from ckptkit.verification.reports.contents import guilty_places, ranges
from ckptkit.verification.reports.html import html_page
from ckptkit.verification.reports.placement import place_of
from tests.verification.reports.samples import gradients_level, hostile, report, side

VOID = {"meta", "br", "hr", "img", "link", "input", "wbr"}


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
    text = "".join(page.text)
    assert ("Same model" in text) == passed and ("The models differ" in text) == (not passed)
    for part in (
        "hf <model> & more",
        'out/"meg"',
        'largest <error> "1" & more',
        "a <note>",
        "Error by layer",
        "RMSNorm",
        "ckptkit verify 'hf <model> & more' 'out/\"meg\"'",
        "2026-11-29T12:00:00+00:00",
        "torch 2.11",
        "devicecpu",
        "5 in 2 rows of 2 to 3, the last 1 of each chosen by the reference",
        "gridTP1 x PP1",
        "gridTP2 x PP2 x EP2",
        "ab" * 32,
        "not computed (--hash)",
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
    assert ("decoder.layers.1.mlp.<fc2>.weight" in text) == (not passed)


def test_a_failure_names_tensors_by_size_and_marks_ranks_and_layers() -> None:
    page = Page(html_page(report(False)))
    assert "".join(page.text).index("mlp.<fc2>.weight") < "".join(page.text).index("word_embeddings.weight")
    assert "ranks 0-1, 5, 7" in page.text
    titles = [text for text in page.text if text.endswith(": differs")]
    expected = ["rank 0, embedding", "rank 1, embedding", "rank 5, layer 1", "rank 7, layer 1"]
    assert titles == [f"{place}: differs" for place in expected]
    assert len(numbers(page, "rect", "guilty")) == 4
    assert not numbers(Page(html_page(report(True))), "rect", "guilty")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("passed", [True, False])
def test_gradients_are_drawn_by_layer(passed: bool, dtype: str) -> None:
    good = report(True)
    whole = replace(good, levels=[*good.levels, gradients_level(passed, dtype)])
    page = Page(html_page(whole))
    text = "".join(page.text)
    assert "Gradients by layer" in text and "Updates by layer" not in text
    assert "model.layers.1.mlp.<down>.weight" in text and "The worst of 4 tensors" in text
    assert ("times the reference's own, layer 1: 1.00e+00" in page.text) == (dtype == "bfloat16")
    assert "error, embedding: 1.00e-06" in page.text and "error, head: 1.00e-06" in page.text
    assert ("wrong in layer 1" in text) == (not passed)
    marked = [title for title in page.text if title.endswith(": differs")]
    assert marked == ([] if passed else [f"rank {rank}, layer 1: differs" for rank in (4, 5, 6, 7)])


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.language_model.layers.12.mlp.down_proj.weight", "layer 12"),
        ("decoder.layers.0.input_layernorm.weight", "layer 0"),
        ("model.layers.3.a.lora_A.weight + model.layers.3.b.lora_A.weight", "layer 3"),
        ("model.embed_tokens_per_layer.weight", "embedding"),
        ("model.per_layer_projection_norm.weight", "embedding"),
        ("model.norm.weight", "head"),
        ("lm_head.weight", "head"),
    ],
)
def test_places_of_tensors(name: str, place: str) -> None:
    assert place_of(name)[1] == place


def test_without_bytes_that_differ_all_ranks_that_hold_the_place_are_marked() -> None:
    whole = report(False)
    page = Page(html_page(replace(whole, levels=[report(True).levels[0], whole.levels[1]])))
    titles = [text for text in page.text if text.endswith(": differs")]
    assert titles == [f"rank {rank}, layer 1: differs" for rank in (4, 5, 6, 7)]


@pytest.mark.parametrize("place", ["embedding", "head", "final norm", "layer 0 router"])
def test_every_place_is_on_the_map(place: str) -> None:
    data = report(False).to_dict()
    data["levels"][0]["details"].pop("differences")
    data["levels"][1]["details"]["location"]["place"] = place
    ranks, rows = zip(*sorted(guilty_places(data)), strict=True)
    assert set(rows) == {{"embedding": 0, "layer 0 router": 1}.get(place, 3)}
    assert ranks == ((0, 1, 2, 3) if rows[0] < 2 else (4, 5, 6, 7))


def test_what_is_of_no_interest_is_folded() -> None:
    def folded(page: str) -> list[str]:
        return re.findall("<summary>(.*?)</summary>", page)

    always = ["Error by position", "Modules and times"]
    assert folded(html_page(report(False))) == always
    assert folded(html_page(report(True))) == ["Routers", *always]
    sides = {name: side(name, Parallelism(2)) for name in ("reference", "candidate")}
    assert folded(html_page(replace(report(False), sides=sides))) == ["Which rank holds what: the reference", *always]


HOSTILE = """<img src=x onerror=alert(1)>"'&\x1b[31m\u202e</style></script>"""


def test_nothing_that_comes_from_files_is_markup() -> None:
    evil = hostile(report(False), HOSTILE)
    page = Page(html_page(evil))
    assert not {"img", "script"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "\x1b" not in html_page(evil) and "\u202e" not in html_page(evil)
    assert html_page(evil).count("</style>") == 1
    assert "".join(page.text).count("<img src=x onerror=alert(1)>") > 10


def test_names_break_after_their_parts_only() -> None:
    parts = name_shown("see decoder.layers.1.self_attention/linear<qkv>.weight").split("<wbr>")
    assert parts == ["see decoder.", "layers.", "1.", "self_", "attention/", "linear&lt;qkv&gt;.", "weight"]
    assert name_shown("torch 2.11.0 a_b") == "torch 2.11.0 a_b"


def test_numbers_in_words() -> None:
    assert ranges([]) == "" and ranges([3]) == "3" and ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert ranges(range(0, 200, 2)).endswith("28, 30, ...")


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
