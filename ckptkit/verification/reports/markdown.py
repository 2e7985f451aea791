"""The report as Markdown for pages that show GitHub's: the summary of a step in Actions, comments, issues."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ckptkit.errors import CkptkitError
from ckptkit.printable import printable
from ckptkit.verification.reports.contents import (
    DIFFERENCES,
    STEPS,
    WORST,
    details_of,
    difference_rows,
    fed_by,
    guilty_ranks,
    passed,
    rollout_table,
    run_facts,
    side_facts,
    step_rows,
    title_of,
    worst_rows,
)
from ckptkit.verification.reports.report import TRAINABILITY, VerificationReport, verdict_of

LIMIT = 2**20
"""Bytes that GitHub takes for the summary of a step; of a longer one it shows nothing."""
LONGEST = 600
"""Characters of a text that are shown."""
ROWS = (50, 20, 5, 0)
"""Rows of a list, of which as many are shown as `LIMIT` allows."""

_ENTITIES = {ord(character): f"&#{ord(character)};" for character in "\\`*_{}[]<>()#+!|~&:$\"'^="}
# A comment ends the word: what follows would be the name of somebody.
_ENTITIES[ord("@")] = "&#64;<!-- -->"


def markdown_text(report: VerificationReport) -> str:
    """The report: the verdict, the answers, what differs, and the run folded; at most `LIMIT` bytes."""
    data = report.to_dict()
    for rows in ROWS:
        text = "\n".join(_lines(data, rows))
        if len(text.encode()) <= LIMIT:
            break
    return text


def markdown_error(error: CkptkitError, reference: str, candidate: str) -> str:
    """A verification that could not be made."""
    sides = f"{plain(candidate)} against {plain(reference)}"
    return f"## \u26a0\ufe0f The verification could not be run\n\n{sides}\n\n{plain(str(error))}\n"


def plain(text: str) -> str:
    """A text of one line that is no markup: neither Markdown nor HTML, a mention or a link, nor the end of a cell."""
    text = printable(text, longest=LONGEST).translate(_ENTITIES)
    return text.replace("www.", "www&#46;").replace("WWW.", "WWW&#46;") or " "


def _lines(data: Mapping[str, Any], rows: int) -> Iterator[str]:
    mark = "\u2705" if passed(data) else "\u274c"
    yield f"## {mark} {title_of(data)}"
    yield from ("", f"{_name(data['candidate'])} against {_name(data['reference'])}", "")
    answers = [
        (level["name"], _answer(level), level["summary"], f"{level['seconds']:.1f} s") for level in data["levels"]
    ]
    answers += [(name, "not asked", "", "") for name in data["not_run"]]
    yield from _table(("level", "answer", "because", "time"), [(plain(a), b, plain(c), d) for a, b, c, d in answers])
    yield from _differences(data, rows)
    yield from _rollouts(details_of(data, "rollouts"), rows)
    yield from _steps(details_of(data, TRAINABILITY), rows)
    messages = [message for level in data["levels"] for message in level["details"].get("messages", [])]
    for message in [*messages, *data["messages"]][:rows]:
        yield f"- {plain(message)}"
    yield ""
    for title, facts in (("The run", run_facts(data)), *side_facts(data)):
        yield from _folded(title.capitalize(), _table(("", ""), [(plain(name), plain(text)) for name, text in facts]))


def _rollouts(details: Mapping[str, Any], rows: int) -> Iterator[str]:
    if not details:
        return
    head, figures = rollout_table(details)
    yield from _table(head, [tuple(map(plain, row)) for row in figures])
    if worst := worst_rows(details)[:rows]:
        yield from _folded("The worst tokens", _table(WORST, [tuple(map(plain, row)) for row in worst]))


def _answer(level: Mapping[str, Any]) -> str:
    word = verdict_of([level["name"]], level["passed"])
    return word if level["passed"] else f"**{word}**"


def _steps(details: Mapping[str, Any], rows: int) -> Iterator[str]:
    """The first steps of a run that learns, and the last one."""
    if details and (found := step_rows(details)):
        some = found if len(found) <= rows else [*found[: max(0, rows - 1)], found[-1]]
        yield from _folded("The steps", _table(STEPS, [tuple(map(plain, row)) for row in some]))


def _differences(data: Mapping[str, Any], rows: int) -> Iterator[str]:
    parted, ranks = fed_by(data), guilty_ranks(data)
    if parted is not None:
        yield f"The models part at **{plain(parted[0])}**, which is fed by"
        yield from ("", *(f"- {_name(name)}" for name in parted[1][:rows]), *_more(len(parted[1]), rows), "")
    if ranks:
        yield from (f"It is held by **{plain(ranks)}** of the candidate.", "")
    found = difference_rows(data)
    if found:
        yield from _table(DIFFERENCES, [(_name(name), *map(plain, figures)) for name, *figures in found[:rows]])
        yield from (*_more(len(found), rows), "")


def _more(count: int, rows: int) -> list[str]:
    """A line that counts what is left out, apart from what is above it."""
    return ["", f"... and {count - rows:,} more (`--json` has all)"] if count > rows else []


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table of cells that are Markdown already."""
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def _folded(title: str, lines: Iterator[str]) -> Iterator[str]:
    yield from (f"<details><summary>{title}</summary>", "", *lines, "</details>", "")


def _name(text: str) -> str:
    """A name in the type of code."""
    return f"<code>{plain(text)}</code>"
