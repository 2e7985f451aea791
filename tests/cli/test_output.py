"""Data on stdout, chatter on stderr, colour and bars only on a terminal."""

import io
import json
import sys

import pytest

from ckptkit.cli.output import Output, say
from ckptkit.cli.rendering import human_count, human_size
from ckptkit.cli.sizes import parse_size
from ckptkit.errors import InputError, StorageError, UsageError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


def render(console):
    from rich.text import Text

    console.print(Text("result", style="red"))


def test_colour_only_on_a_terminal(monkeypatch, capsys):
    Output().result({}, render)
    assert capsys.readouterr() == ("result\n", "")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    Output().result({}, render)
    assert "\x1b[31m" in terminal.getvalue()


def test_colour_can_be_refused(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    Output().result({}, render)
    assert terminal.getvalue() == "result\n"


def test_json_on_stdout_is_alone_there(capsys):
    Output("-").result({"a": "ü"}, render)
    assert capsys.readouterr() == ('{\n  "a": "ü"\n}\n', "")


def test_json_in_a_file_leaves_stdout_to_people(tmp_path, capsys):
    Output(str(tmp_path / "a.json")).result({"a": 1}, render)
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    assert capsys.readouterr().out == "result\n"
    with pytest.raises(StorageError, match="cannot write"):
        Output(str(tmp_path)).result({}, render)


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
    ("text", "size"),
    [("5GB", 5 * 10**9), ("5gb", 5 * 10**9), ("1.5 MB", 1_500_000), ("2GiB", 2**31), ("512", 512), ("7B", 7)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5 parsecs", "1e9", "0.1B"])
def test_what_is_not_a_size(text):
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (99_960, "100 kB"), (269_030_016, "269 MB"), (10**18, "1000 PB")],
)
def test_human_sizes(size, text):
    assert human_size(size) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (576, "576"), (28_311_552, "28.3 M"), (70_553_706_496, "70.6 B")]
)
def test_human_counts(count, text):
    assert human_count(count) == text
