"""Shows on stderr what a long command is at: a line that changes on a terminal, now and then a new line elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ckptkit.printable import printable
from ckptkit.sizes import human_size, three_digits
from ckptkit.steps import Step, Tell

INTERVAL = 30.0
"""Seconds between two lines where stderr is no terminal. Whatever is done earlier says nothing there."""


@dataclass(frozen=True)
class Timed:
    """A step in time.

    Attributes:
        step: The step.
        seconds: Since it began.
        told: Seconds from its beginning to what was told last.
    """

    step: Step
    seconds: float
    told: float

    def __str__(self) -> str:
        return ", ".join(part for part in (self.step.what, self.amount, self.rate, f"{self.seconds:.0f} s") if part)

    @property
    def amount(self) -> str:
        """How much is done, of how much: `48/112 tokens`."""
        step = self.step
        if not step.total:
            return ""
        if step.unit == "bytes":
            return f"{human_size(step.done)} of {human_size(step.total)}"
        return f"{step.done:,}/{step.total:,} {step.unit}"

    @property
    def rate(self) -> str:
        """Units in a second, or below one of those seconds for a unit; empty before anything is done."""
        step = self.step
        if not step.done or self.told <= 0:
            return ""
        if step.unit == "bytes":
            return f"{human_size(int(step.done / self.told))}/s"
        rate = step.done / self.told
        return f"{three_digits(rate)} {step.unit}/s" if rate >= 1 else f"{three_digits(1 / rate)} s/{step.unit[:-1]}"


class Watched:
    """The step that a command is at. It may be told from any thread.

    Args:
        clock: Gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._step: Step | None = None
        self._began = self._told = 0.0

    def tell(self, step: Step) -> None:
        """Take note of a step."""
        with self._lock:
            self._told = self._clock()
            if self._step is None or step.what != self._step.what:
                self._began = self._told
            self._step = step

    def now(self) -> Timed | None:
        """The step, if there is one."""
        with self._lock:
            return (
                None if self._step is None else Timed(self._step, self._clock() - self._began, self._told - self._began)
            )


@contextmanager
def plain_lines(say: Callable[[str], None], interval: float = INTERVAL) -> Iterator[Tell]:
    """Say what runs every `interval` seconds.

    Args:
        say: Prints a line.
        interval: Seconds.

    Yields:
        Takes steps.
    """
    watched, ended = Watched(), threading.Event()

    def report() -> None:
        while not ended.wait(interval):
            if (timed := watched.now()) is not None:
                say(str(timed))

    reporter = threading.Thread(target=report, name="ckptkit-progress", daemon=True)
    reporter.start()
    try:
        yield watched.tell
    finally:
        ended.set()
        reporter.join()


@contextmanager
def moving_line(console: Any) -> Iterator[Tell]:
    """Show what runs on a line of a terminal, with a bar where its units are counted.

    Args:
        console: A rich console for stderr.

    Yields:
        Takes steps.
    """
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
    from rich.text import Text

    class Amounts(TextColumn):
        """Amount, rate and time of the step."""

        def render(self, task: Any) -> Text:
            timed = watched.now()
            parts = (timed.amount, timed.rate, f"{timed.seconds:.0f} s") if timed is not None else ()
            return Text("  ".join(part for part in parts if part), no_wrap=True)

    watched = Watched()
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(12), Amounts(""))
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as line:
        task = line.add_task("", total=None, visible=False)

        def tell(step: Step) -> None:
            watched.tell(step)
            line.update(
                task, description=printable(step.what), completed=step.done, total=step.total or None, visible=True
            )

        yield tell
