"""`--log-file FILE`: what a command was, said and ended with, appended to a file, with the time of every line.

The option may stand anywhere in the command line, since it is the same for all commands. `CKPTKIT_LOG_FILE` is its
default, for jobs whose command lines nobody wants to change.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from ckptkit.errors import StorageError, UsageError
from ckptkit.printable import printable
from ckptkit.version import __version__

OPTION, VARIABLE = "--log-file", "CKPTKIT_LOG_FILE"


class LogFile:
    """A file that lines are appended to.

    A file that cannot be opened is an error before anything else is done. One that takes no more lines later is no
    reason to fail: it ends.

    Args:
        path: The file.

    Raises:
        StorageError: It cannot be opened.
    """

    def __init__(self, path: str) -> None:
        try:
            self._stream = Path(path).open("a", encoding="utf-8", buffering=1)  # noqa: SIM115  closed by `end`
        except OSError as error:
            raise StorageError(f"cannot be written: {error.strerror}", where=path) from error
        self._began = time.monotonic()

    def line(self, text: str) -> None:
        """Appends the lines of a text."""
        now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        with suppress(OSError, ValueError):
            for part in text.rstrip("\n").split("\n"):
                self._stream.write(f"{now} {os.getpid()} {printable(part)}\n")

    def begin(self, arguments: Sequence[str]) -> None:
        """A command begins."""
        self.line(f"ckptkit {__version__} in {Path.cwd()}: {shlex.join(['ckptkit', *arguments])}")

    def end(self, code: int) -> None:
        """It has ended."""
        self.line(f"exit code {code} after {time.monotonic() - self._began:.1f} s")
        with suppress(OSError, ValueError):
            self._stream.close()


def taken(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """The arguments without the option, and the file that it names.

    Raises:
        UsageError: The option has no file.
    """
    own = arguments.index("--") if "--" in arguments else len(arguments)
    rest, file = [], os.environ.get(VARIABLE) or None
    words = iter(arguments[:own])
    for word in words:
        if word == OPTION:
            file = next(words, "")
        elif word.startswith(f"{OPTION}="):
            file = word.removeprefix(f"{OPTION}=")
        else:
            rest.append(word)
    if file is not None and (not file or file.startswith("-")):
        raise UsageError("it needs a file", where=OPTION, hint=f"{OPTION} FILE")
    return [*rest, *arguments[own:]], file


_current: list[LogFile] = []


def log(text: str) -> None:
    """Appends to the log file of the command, if it has one."""
    for file in _current:
        file.line(text)


def logged(path: str, arguments: Sequence[str]) -> Callable[[int], None]:
    """Begins the log file of a command.

    Args:
        path: The file.
        arguments: The arguments of the command.

    Returns:
        Ends it, with the exit code.

    Raises:
        StorageError: It cannot be opened.
    """
    file = LogFile(path)
    file.begin(arguments)
    _current.append(file)

    def end(code: int) -> None:
        _current.remove(file)
        file.end(code)

    return end


def is_on() -> bool:
    """Whether the command has a log file."""
    return bool(_current)
