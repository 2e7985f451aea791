"""`--log-file`: every line of a command with its time, anywhere in the command line, and never a reason to fail."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ckptkit.cli import app as cli
from ckptkit.cli import log_file
from fixtures.make_damaged import SOUND

HF = str(SOUND / "hf")
STAMP = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ \d+ ", re.MULTILINE)


def run(*arguments: str, **environment: str) -> Any:
    return CliRunner().invoke(cli.app, list(arguments), prog_name="ckptkit", env=environment)


def lines(file: Path) -> list[str]:
    """The lines of a log, without their times."""
    text = file.read_text(encoding="utf-8")
    assert len(STAMP.findall(text)) == text.count("\n") and text.endswith("\n")
    return STAMP.sub("", text).splitlines()


@pytest.mark.parametrize("at", range(3))
def test_a_result_is_logged_wherever_the_option_stands(at: int, tmp_path: Path) -> None:
    words, file = ["inspect", HF], tmp_path / "a.log"
    done = run(*words[:at], "--log-file", str(file), *words[at:])
    found = lines(file)
    assert done.exit_code == 0 and found[0].endswith(f": ckptkit inspect {HF}")
    assert found[1] == "LlamaForCausalLM (llama), hf, TP1 x PP1"
    assert re.fullmatch(r"exit code 0 after \d+\.\d s", found[-1])
    assert done.stdout.splitlines() == found[1:-1]


def test_runs_are_appended_errors_included(tmp_path: Path) -> None:
    file = tmp_path / "a.log"
    run("inspect", HF, "--json", f"--log-file={file}")
    assert run("inspect", str(tmp_path / "gone"), CKPTKIT_LOG_FILE=str(file)).exit_code == 3
    found = lines(file)
    assert found[1] == "JSON on stdout" and found[4].startswith("error: ") and found[4].endswith("no such directory")
    assert found[-1].startswith("exit code 3 ") and not log_file.is_on()


@pytest.mark.parametrize(("words", "code"), [(["--log-file"], 2), (["--log-file="], 2), (["--log-file", "--json"], 2)])
def test_an_option_without_a_file_is_refused(words: list[str], code: int, tmp_path: Path) -> None:
    done = run("inspect", HF, *words)
    assert done.exit_code == code and "--log-file: it needs a file" in done.stderr


def test_a_file_that_cannot_be_written_ends_it_first(tmp_path: Path) -> None:
    done = run("convert", HF, str(tmp_path / "out"), "--to", "torch", "--log-file", str(tmp_path))
    assert done.exit_code == 5 and "Is a directory" in done.stderr and list(tmp_path.iterdir()) == []


def test_a_full_log_is_no_reason_to_fail() -> None:
    assert run("inspect", HF, "--log-file", "/dev/full").exit_code == 0


def test_words_after_two_dashes_are_no_options() -> None:
    assert log_file.taken(["inspect", "--", "--log-file", "a"]) == (["inspect", "--", "--log-file", "a"], None)


def test_steps_are_kept_where_a_terminal_shows_a_moving_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from ckptkit.cli.output import Output
    from ckptkit.steps import Step

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    end = log_file.logged(str(tmp_path / "a.log"), ["verify"])
    with Output().steps() as tell:
        tell(Step("loading", 1, 2, "layers"))
    end(0)
    assert len(lines(tmp_path / "a.log")) == 2  # a short step says nothing
