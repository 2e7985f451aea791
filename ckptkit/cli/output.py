"""The one place that writes to the terminal: results on stdout, messages on stderr, and JSON on request."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from ckptkit.cli.github import MOST, error_line, in_actions, inert
from ckptkit.cli.log_file import is_on, log
from ckptkit.cli.streams import encodes_everything, silence
from ckptkit.errors import CkptkitError, StorageError
from ckptkit.io.system import write_text
from ckptkit.printable import printable, printable_json
from ckptkit.steps import Step, Tell, nobody

if TYPE_CHECKING:
    from rich.console import Console

SIGPIPE_EXIT = 141
PIPED_WIDTH = 100
"""Columns of tables when stdout is no terminal."""

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

_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
"""What colours text on a terminal."""

Progress = Callable[[int, int], None]
T = TypeVar("T")


@runtime_checkable
class _Result(Protocol):
    """A result that can be JSON."""

    def to_dict(self) -> dict[str, Any]: ...


class Output:
    """The output of a command.

    Attributes:
        json_file: The file for JSON. `-` is stdout; None means no JSON.
        text: Whether stdout may carry text for people.
        shown: Whether this process shows results and progress; other ranks of one command leave that to the first.
    """

    def __init__(self, json_file: str | None = None, *, text: bool = True, shown: bool = True) -> None:
        self.json_file, self.text, self.shown = json_file, text, shown

    @property
    def json_only(self) -> bool:
        """Whether stdout carries JSON and therefore nothing else."""
        return self.json_file == "-"

    def result(self, result: T, render: Callable[[T, Console], None], data: object = None) -> None:
        """Writes the result of a command: as JSON on request, and as text unless stdout carries the JSON.

        Args:
            result: The result.
            render: Prints it as text.
            data: Content of the JSON; `result.to_dict()` by default.

        Raises:
            StorageError: The JSON file cannot be written.
        """
        if not self.shown:
            return
        if self.json_file is not None:
            self.json(result.to_dict() if isinstance(result, _Result) else data)
        if self.text and not self.json_only:
            with self.console() as console:
                render(result, console)

    def document(self, text: str, file: str) -> None:
        """Writes a document to a file, or to stdout if that is `-`.

        Raises:
            StorageError: It cannot be written.
        """
        if file == "-":
            _write_stdout(text if encodes_everything(sys.stdout) else text.encode("ascii", "backslashreplace").decode())
        else:
            write_text(file, text)

    def json(self, data: object) -> None:
        """Writes one JSON document to stdout or to the JSON file.

        Raises:
            StorageError: The file cannot be written.
        """
        to_stdout = self.json_only or self.json_file is None
        escaped = to_stdout and not encodes_everything(sys.stdout)
        text = json.dumps(printable_json(data), indent=2, ensure_ascii=escaped) + "\n"
        log("JSON on stdout" if to_stdout else f"JSON in {self.json_file}")
        if to_stdout:
            _write_stdout(text)
        else:
            write_text(str(self.json_file), text)

    @contextmanager
    def console(self) -> Iterator[Console]:
        """A rich console whose text goes to stdout in one write, coloured only if that is a terminal."""
        buffer = _Buffer(sys.stdout)
        yield _console(sys.stdout, buffer)
        log(_ESCAPES.sub("", buffer.getvalue()))
        _write_stdout(inert(buffer.getvalue()))

    def error(self, error: CkptkitError | None, message: str, exit_code: int) -> None:
        """One line on stderr; with JSON asked for, an object `{"error": ...}` there too."""
        line = printable(" ".join(message.split("\n")))
        say(line, label="error", style="bold red")
        annotate([line], "ckptkit")
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
        if not (self.shown and sys.stderr.isatty()):
            yield None
            return
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Bar(*columns, console=_console(sys.stderr, sys.stderr), transient=True) as bar:
            task = bar.add_task(what, total=None)
            # A full bar disappears: the work after it (syncing, starting ranks) is not measured in bytes.
            yield lambda done, total: bar.update(task, completed=done, total=total, visible=done < total)

    @contextmanager
    def steps(self, *, shown: bool = True) -> Iterator[Tell]:
        """What runs, on stderr: a moving line on a terminal, otherwise a line now and then.

        Args:
            shown: Whether this process is the one that shows it.

        Yields:
            A callable that takes steps, from any thread.
        """
        from ckptkit.cli import watching

        if not (shown and self.shown):
            yield nobody
            return
        terminal = sys.stderr.isatty()
        with ExitStack() as stack:
            shown_at = watching.moving_line(_console(sys.stderr, sys.stderr)) if terminal else watching.plain_lines(say)
            tell = stack.enter_context(shown_at)
            if not (terminal and is_on()):
                yield tell
                return
            kept = stack.enter_context(watching.plain_lines(log))  # a moving line leaves nothing behind

            def both(step: Step) -> None:
                tell(step)
                kept(step)

            yield both


def bytes_of(what: str, tell: Tell) -> Progress:
    """Passes (bytes done, bytes in all) on as a step."""
    return lambda done, total: tell(Step(what, done, total, "bytes"))


def say(text: str, *, label: str = "", style: str = "") -> None:
    """Prints a message on stderr, each line made printable. A closed stderr or a full disk is no reason to fail."""
    text = "\n".join(map(printable, text.split("\n")))
    text = text if label else inert(text)
    log(f"{label}: {text}" if label else text)
    try:
        if label and sys.stderr.isatty():
            from rich.text import Text

            line = Text.assemble((f"{label}: ", style), text)
            _console(sys.stderr, sys.stderr).print(line, soft_wrap=True)
        else:
            print(f"{label}: {text}" if label else text, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        silence(sys.stderr)


def annotate(messages: Sequence[str], title: str) -> None:
    """Makes messages annotations where GitHub Actions runs this process: commands on stderr, which it reads, too."""
    if not in_actions():
        return
    with suppress(OSError, ValueError):
        for message in messages[:MOST]:
            text = "\n".join(map(printable, message.split("\n")))
            print(error_line(text, printable(title)), file=sys.stderr, flush=True)


class _Buffer(io.StringIO):
    """A buffer with the encoding of a stream, so that rich draws tables in ASCII if the stream needs it."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._encoding = "utf-8" if encodes_everything(stream) else "ascii"

    @property
    def encoding(self) -> str:  # type: ignore[override]  # the base declares an attribute
        return self._encoding


def _console(stream: Any, file: Any) -> Console:
    """A console that writes to `file`, formatted for `stream`."""
    from rich.console import Console

    terminal = stream.isatty()
    width = None if terminal else PIPED_WIDTH
    return Console(file=file, force_terminal=terminal, width=width, highlight=False, emoji=False)


def _write_stdout(text: str) -> None:
    """Writes to stdout.

    Raises:
        StorageError: It is full, or was closed.
        SystemExit: Its reader has ended (`| head`). The exit code is that of SIGPIPE.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        silence(sys.stdout)
        raise SystemExit(SIGPIPE_EXIT) from None
    except OSError as error:
        silence(sys.stdout)
        raise StorageError(f"cannot write: {error.strerror or error}", where="stdout") from error
