"""Data on stdout, chatter on stderr, colour and bars only on a terminal."""

import io
import json
import sys

import pytest

from ckptkit.cli.output import Output, say
from ckptkit.cli.rendering import human_count
from ckptkit.errors import InputError, StorageError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


class Result(dict):
    def to_dict(self):
        return dict(self)


def render(result, console):
    from rich.text import Text

    console.print(Text("result", style="red"))


def test_colour_only_on_a_terminal(monkeypatch, capsys):
    Output().result(Result(), render)
    assert capsys.readouterr() == ("result\n", "")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    Output().result(Result(), render)
    assert "\x1b[31m" in terminal.getvalue()


def test_colour_can_be_refused(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    Output().result(Result(), render)
    assert terminal.getvalue() == "result\n"


def test_json_on_stdout_is_alone_there(capsys):
    Output("-").result(Result(a="ü"), render)
    assert capsys.readouterr() == ('{\n  "a": "ü"\n}\n', "")


def test_json_in_a_file_leaves_stdout_to_people(tmp_path, capsys):
    Output(str(tmp_path / "a.json")).result(Result(a=1), render)
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    assert capsys.readouterr().out == "result\n"
    with pytest.raises(StorageError, match="cannot write"):
        Output(str(tmp_path)).result(Result(), render)


def test_an_error_survives_an_unwritable_json_file(tmp_path, capsys):
    Output(str(tmp_path)).error(InputError("is broken"), "is broken", 3)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "error: is broken"
    assert told[1].startswith(f"error: {tmp_path}: cannot write")


def test_progress_only_on_a_terminal(monkeypatch, capsys):
    with Output().progress("converting") as progress:
        assert progress is None
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Output().progress("converting") as progress:
        assert progress is not None
        progress(500_000, 1_000_000)
    assert "converting" in terminal.getvalue()
    assert "0.5/1.0 MB" in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_a_label_is_coloured_on_a_terminal_only(monkeypatch, capsys):
    say("[bold] is not markup", label="error", style="bold red")
    assert capsys.readouterr().err == "error: [bold] is not markup\n"
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    say("[bold] is not markup", label="error", style="bold red")
    assert "[bold] is not markup" in terminal.getvalue()
    assert "\x1b[1;31merror: " in terminal.getvalue()


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (576, "576"), (28_311_552, "28.3 M"), (70_553_706_496, "70.6 B")]
)
def test_human_counts(count, text):
    assert human_count(count) == text
