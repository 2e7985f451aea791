"""Workflow commands of GitHub Actions: errors become annotations, and nothing that comes from files is a command."""

from __future__ import annotations

import pytest
from rich.console import Console

from ckptkit.cli.github import MOST, error_line, inert
from ckptkit.cli.output import Output, annotate, say
from ckptkit.errors import InputError


@pytest.fixture
def actions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)


@pytest.mark.parametrize(
    ("message", "title", "line"),
    [
        ("differs", "ckptkit", "::error title=ckptkit::differs"),
        ("50 %: a,b", "verify: x, y", "::error title=verify%3A x%2C y::50 %25: a,b"),
        ("one\r\ntwo", "a%b", "::error title=a%25b::one%0D%0Atwo"),
        ("%0A", "t", "::error title=t::%250A"),
        ("::stop-commands::x", "t", "::error title=t::::stop-commands::x"),
    ],
)
def test_an_error_is_escaped_as_github_says(message: str, title: str, line: str) -> None:
    assert error_line(message, title) == line


def test_annotations_are_on_stderr_and_not_too_many(actions: None, capsys: pytest.CaptureFixture[str]) -> None:
    annotate([f"one\ntw\x07o {number}" for number in range(MOST + 5)], "t\n")
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == MOST
    assert err.splitlines()[0] == r"::error title=t\x0a::one%0Atw\x07o 0"


def test_there_are_none_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    annotate(["one"], "t")
    Output().error(InputError("is broken"), "is broken", 3)
    assert capsys.readouterr().err == "error: is broken\n"
    assert inert("::error::x") == "::error::x"


def test_an_error_of_any_command_is_one(actions: None, capsys: pytest.CaptureFixture[str]) -> None:
    Output().error(InputError("is broken"), "is broken", 3)
    assert capsys.readouterr().err == "error: is broken\n::error title=ckptkit::is broken\n"


@pytest.mark.parametrize("evil", ["::error::x", "  ::add-mask::x", "##[error]x", "a\n::stop-commands::x", "\t::x::"])
def test_what_is_printed_is_no_command(actions: None, capsys: pytest.CaptureFixture[str], evil: str) -> None:
    def render(result: str, console: Console) -> None:
        console.print(result)

    Output().result(evil, render)
    say(evil)
    out, err = capsys.readouterr()
    lines = [line.strip() for line in (out + err).splitlines()]
    assert len(lines) > 1 and not any(line.startswith(("::", "##[")) for line in lines)


def test_other_texts_stay(actions: None) -> None:
    text = "a::b\n decoder ::\n# ##[x]\n"
    assert inert(text) == text
