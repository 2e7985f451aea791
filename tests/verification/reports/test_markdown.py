"""Markdown for GitHub: what it renders to, its size, and texts that are no markup. markdown-it is the judge."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from markdown_it import MarkdownIt

from ckptkit.errors import VerificationError
from ckptkit.verification.reports.markdown import LIMIT, markdown_error, markdown_text, plain
from ckptkit.verification.reports.report import VerificationReport
from tests.verification.reports.samples import hostile, report
from tests.verification.reports.test_html import Page

RENDERER = MarkdownIt("commonmark", {"html": True}).enable("table")


def rendered(found: VerificationReport) -> Page:
    return Page(RENDERER.render(markdown_text(found)))


@pytest.mark.parametrize("passed", [True, False])
def test_it_says_what_the_page_says(passed: bool) -> None:
    text = "".join(rendered(report(passed)).text)
    assert ("Same model" in text) == passed and ("The models differ" in text) == (not passed)
    for part in (
        "hf <model> & more",
        'out/"meg"',
        "what was found <&>",
        "a <note>",
        "2026-11-29T12:00:00+00:00",
        "python 3.12, torch 2.11",
        "TP2 x PP2 x EP2",
        "ab" * 32,
        "5 in 2 rows of 2 to 3",
    ):
        assert part in text, part
    for part in ("decoder.layers.1.mlp.<fc2>.weight", "ranks 0-1, 5, 7", "layer 1 mlp"):
        assert (part in text) == (not passed), part


def test_tables_are_tables() -> None:
    page = rendered(report(False))
    count = [tag for tag, _ in page.tags].count
    assert count("table") == 5  # answers, tensors, the run, two sides
    assert count("details") == count("summary") == 3
    rows = re.findall("<tr>(.*?)</tr>", RENDERER.render(markdown_text(report(False))), re.DOTALL)
    assert {len(re.findall("<t[hd]>", row)) for row in rows} == {2, 4, 5}


HOSTILE = [
    "a|b",
    "a\\|b",
    "`code`",
    "**bold** __bold__ ~~gone~~",
    "[text](javascript:alert(1))",
    "![image](//host/x)",
    "<img src=x onerror=alert(1)>",
    "</details></code>",
    "<!-- -->&lt;&#x3c;",
    "\n\n# heading\n- item",
    "https://host www.host.org someone@host.org @someone #12 GH-1",
    "$x$ :tada: \x1b[31m\u202e",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_that_comes_from_files_is_markup(text: str) -> None:
    judge = MarkdownIt("gfm-like", {"html": True, "linkify": False}).enable("table")
    page = Page(judge.render(plain(text)))
    assert {tag for tag, _ in page.tags} == {"p"}
    shown = text.replace("\n", r"\x0a").replace("\x1b", r"\x1b").replace("\u202e", r"\u202e")
    assert "".join(page.text).strip("\n") == shown
    cells = Page(judge.render(f"| a | b |\n|---|---|\n| {plain(text)} | c |"))
    assert [tag for tag, _ in cells.tags].count("td") == 2
    tags = [tag for tag, _ in rendered(hostile(report(False), text)).tags]
    assert tags == [tag for tag, _ in rendered(hostile(report(False), "")).tags]
    # What would be made into links after rendering is not there in one piece.
    assert not re.search(r"@\w|https?://|www\.|(?<!&)#\d", plain(text))


@pytest.mark.parametrize("tensors", [60, 5000])
def test_it_fits_the_summary_of_a_step(tensors: int) -> None:
    found = report(False)
    weights = found.levels[0]
    one = weights.details["differences"][0]
    many = [{**one, "tensor": f"{number}.{'|' * 1000}"} for number in range(tensors)]
    text = markdown_text(replace(found, levels=[replace(weights, details={"differences": many})]))
    assert len(text.encode()) <= LIMIT
    assert f"... and {tensors - 50:,} more" in text


def test_what_is_too_long_is_shortened_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = markdown_text(report(False))
    monkeypatch.setattr("ckptkit.verification.reports.markdown.LIMIT", len(whole.encode()) - 1)
    monkeypatch.setattr("ckptkit.verification.reports.markdown.ROWS", (50, 1, 0))
    text = markdown_text(report(False))
    assert len(text) < len(whole) and "... and 1 more" in text
    assert "mlp.&#60;fc2&#62;.weight" in text and "word&#95;embeddings" not in text


def test_a_verification_that_could_not_be_run() -> None:
    text = "".join(Page(RENDERER.render(markdown_error(VerificationError("rank 1 <died>"), "a|b", "c"))).text)
    assert "could not be run" in text and "rank 1 <died>" in text and "c against a|b" in text
