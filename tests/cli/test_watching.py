"""What a long command is at: the words, the times, and where they are shown."""

from __future__ import annotations

import io
import sys
import threading

import pytest

from ckptkit.cli.output import Output, bytes_of
from ckptkit.cli.watching import INTERVAL, Watched, plain_lines
from ckptkit.steps import Counted, Step, nobody


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def watched(*steps: tuple[float, Step]) -> str:
    """What is said of steps that are told so many seconds after one another, 8 seconds after the last."""
    clock = Clock()
    found = Watched(clock)
    assert found.now() is None
    for seconds, step in steps:
        clock.seconds += seconds
        found.tell(step)
    clock.seconds += 8
    return str(found.now())


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([(0, Step("loading"))], "loading, 8 s"),
        ([(0, Step("running", 0, 112, "tokens"))], "running, 0/112 tokens, 8 s"),
        # The rate is that of the time in which the units were done, not of the time since.
        ([(0, Step("running", 0, 112, "tokens")), (2, Step("running", 48, 112, "tokens"))], "24.0 tokens/s, 10 s"),
        ([(0, Step("running", 0, 9, "layers")), (30, Step("running", 4, 9, "layers"))], "7.50 s/layer, 38 s"),
        (
            [(0, Step("copying", 0, 4_000_000, "bytes")), (1, Step("copying", 10**6, 4 * 10**6, "bytes"))],
            "1.00 MB of 4.00 MB, 1.00 MB/s, 9 s",
        ),
        ([(0, Step("loading")), (50, Step("running", 1, 2, "tokens"))], "running, 1/2 tokens, 8 s"),
    ],
)
def test_a_step_in_words(steps: list[tuple[float, Step]], said: str) -> None:
    assert watched(*steps).endswith(said)


def test_units_are_counted() -> None:
    told: list[Step] = []
    counted = Counted("running", 12, "tokens", told.append)
    counted.add(4)
    counted.add(8)
    assert [(step.done, step.total) for step in told] == [(0, 12), (4, 12), (12, 12)]
    bytes_of("copying", told.append)(5, 7)
    assert told[-1] == Step("copying", 5, 7, "bytes")


def test_a_line_now_and_then_where_stderr_is_no_terminal() -> None:
    lines: list[str] = []
    twice = threading.Event()

    def say(line: str) -> None:
        lines.append(line)
        if len(lines) == 2:
            twice.set()

    with plain_lines(say, interval=0.01) as tell:
        tell(Step("loading"))
        assert twice.wait(60)
    count = len(lines)
    assert set(lines) == {"loading, 0 s"}
    with plain_lines(say, interval=3600) as tell:
        tell(Step("loading"))  # and it ends at once
    assert len(lines) == count


def test_short_commands_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert INTERVAL >= 10
    with Output("-").steps() as tell:
        tell(Step("loading"))
    assert capsys.readouterr() == ("", "")
    with Output().steps(shown=False) as tell:
        assert tell is nobody


def test_a_terminal_shows_the_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Output("-").steps() as tell:
        tell(Step("load\x07ing [bold]", 3, 9, "layers"))
    assert r"load\x07ing [bold]" in terminal.getvalue() and "3/9 layers" in terminal.getvalue()
    assert "\x07" not in terminal.getvalue() and capsys.readouterr().out == ""


def test_the_reporter_ends_with_a_command_that_fails() -> None:
    with pytest.raises(ZeroDivisionError), plain_lines(lambda line: None) as tell:
        tell(Step("loading"))
        raise ZeroDivisionError
    assert "ckptkit-progress" not in {thread.name for thread in threading.enumerate()}
