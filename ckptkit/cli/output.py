"""The one place that writes to the terminal: data on stdout, chatter on stderr, JSON where asked for."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from ckptkit.errors import CkptkitError, StorageError
from ckptkit.io.system import write_text

if TYPE_CHECKING:
    from rich.console import Console

SIGPIPE_EXIT = 141
PIPED_WIDTH = 160
"""Columns when stdout is no terminal: tables keep their width, nothing is cut for a screen that is not there."""

KINDS = {
    2: "usage",
    3: "input",
    4: "unsupported",
    5: "storage",
    6: "verification",
    70: "internal",
    130: "interrupted",
    143: "terminated",
}

Progress = Callable[[int, int], None]


class Output:
    """Where a command's results go.

    Attributes:
        json_file: Where JSON goes: `-` is stdout, None means that nobody asked for it.
    """

    def __init__(self, json_file: str | None = None) -> None:
        self.json_file = json_file

    @property
    def json_only(self) -> bool:
        """Whether stdout carries JSON and therefore nothing else."""
        return self.json_file == "-"

    def result(self, data: dict[str, Any] | list[Any], render: Callable[[Console], None]) -> None:
        """Gives a command's result: as JSON where asked for, and to people unless stdout carries the JSON.

        Raises:
            StorageError: The JSON file cannot be written.
        """
        if self.json_file is not None:
            self.json(data)
        if not self.json_only:
            with self.console() as console:
                render(console)

    def json(self, data: object) -> None:
        """Writes one JSON document to stdout or to the file asked for.

        Raises:
            StorageError: The file cannot be written.
        """
        text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
        if self.json_only or self.json_file is None:
            _write_stdout(text)
            return
        write_text(self.json_file, text)

    @contextmanager
    def console(self) -> Iterator[Console]:
        """A rich console whose text goes to stdout in one write, coloured only if that is a terminal."""
        console = _console(sys.stdout, io.StringIO())
        yield console
        buffer = console.file
        assert isinstance(buffer, io.StringIO)
        _write_stdout(buffer.getvalue())

    def error(self, error: CkptkitError | None, message: str, exit_code: int) -> None:
        """One line on stderr; with JSON asked for, an object `{"error": ...}` there too."""
        line = " ".join(message.split("\n"))
        say(line, label="error", style="bold red")
        if self.json_file is None:
            return
        details = {
            "kind": KINDS.get(exit_code, "internal"),
            "exit_code": exit_code,
            "message": line,
            "what": error.what if error else line,
            "where": error.where if error else None,
            "hint": error.hint if error else None,
        }
        try:
            self.json({"error": details})
        except StorageError as failure:
            say(str(failure), label="error", style="bold red")

    @contextmanager
    def progress(self, what: str) -> Iterator[Progress | None]:
        """A progress bar on stderr in bytes, with rate and time left; None where stderr is no terminal.

        Yields:
            A callable that takes (bytes done, bytes in all), from any thread.
        """
        if not sys.stderr.isatty():
            yield None
            return
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Bar(*columns, console=_console(sys.stderr, sys.stderr), transient=True) as bar:
            task = bar.add_task(what, total=None)
            # A full bar goes away: what follows it (syncing, starting ranks) is not measured in bytes.
            yield lambda done, total: bar.update(task, completed=done, total=total, visible=done < total)


def say(text: str, *, label: str = "", style: str = "") -> None:
    """Chatter: a line on stderr. A reader that went away is no reason to fail."""
    try:
        if not label:
            print(text, file=sys.stderr, flush=True)
        elif sys.stderr.isatty():
            from rich.text import Text

            line = Text.assemble((f"{label}: ", style), text)
            _console(sys.stderr, sys.stderr).print(line, soft_wrap=True)
        else:
            print(f"{label}: {text}", file=sys.stderr, flush=True)
    except OSError:
        pass


def _console(stream: Any, file: Any) -> Console:
    """A console that writes to `file` what suits `stream`."""
    from rich.console import Console

    terminal = stream.isatty()
    width = None if terminal else PIPED_WIDTH
    return Console(file=file, force_terminal=terminal, width=width, highlight=False, emoji=False)


def _write_stdout(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        _stop_writing()


def _stop_writing() -> NoReturn:
    """The reader of stdout went away (`| head`): leave as the signal would, quietly at interpreter exit too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(SIGPIPE_EXIT)
