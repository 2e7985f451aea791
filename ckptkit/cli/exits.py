"""All ways in which a command ends. Signals, errors and bugs become one line and an exit code here."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from typer.core import TyperGroup

from ckptkit.cli import log_file
from ckptkit.cli.output import SIGPIPE_EXIT, Output, say
from ckptkit.cli.streams import prepare
from ckptkit.errors import CkptkitError, UnsupportedError, UsageError, VerificationError
from ckptkit.io.world import World
from ckptkit.requirements import MOVING, Package, missing_line, package_of

EXIT_DIFFERS = 1
EXIT_USAGE = 2
EXIT_STORAGE = 5
EXIT_INTERNAL = 70
_RESUMABLE = {("split-llama", "build"), ("delta", "make"), ("delta", "apply")}
TRACEBACK_VARIABLE = "CKPTKIT_TRACEBACK"

EXIT_CODES = """\b
Exit codes:
  0 ok                          5 no space, or an I/O error
  1 the checkpoints differ      6 the verification could not be run
  2 usage                      70 internal error, a bug in ckptkit
  3 damaged or inconsistent   130 interrupted (SIGINT)
  4 not supported             143 terminated (SIGTERM)"""


_COMMAND: ContextVar[tuple[str, ...]] = ContextVar("command", default=())


def command_line() -> str | None:
    """The command line that is being run, as a shell takes it."""
    arguments = arguments_of_command()
    return shlex.join(["ckptkit", *arguments]) if arguments else None


def arguments_of_command() -> tuple[str, ...]:
    """The arguments of the command line that is being run."""
    return _COMMAND.get()


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived. It is no Exception, so that no handler takes it for a failure and continues."""

    def __init__(self, signum: int) -> None:
        self.exit_code = 128 + signum
        super().__init__(signal.Signals(signum).name)


class Commands(TyperGroup):
    """A command group that ends with one line and a documented exit code, never with a traceback."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Runs the command line and exits."""
        prepare()
        arguments = list(sys.argv[1:] if args is None else args) or ["--help"]
        try:
            with _signals_raise():
                code = self._run(arguments, prog_name, complete_var, **extra)
        except Interrupted as error:  # a signal after the work, before the handlers are restored
            code = error.exit_code
        if standalone_mode:
            sys.exit(code)
        return code

    def _run(self, arguments: list[str], prog_name: str | None, complete_var: str | None, **extra: Any) -> int:
        output = Output(_json_file(arguments) if not _rank() else None)
        try:
            rest, file = log_file.taken(arguments)
            end = log_file.logged(file, rest) if file is not None and not _rank() else None
        except CkptkitError as error:
            return _failed(output, error)
        code = self._ended(output, rest, prog_name, complete_var, **extra)
        if end is not None:
            end(code)
        return code

    def _ended(
        self, output: Output, arguments: list[str], prog_name: str | None, complete_var: str | None, **extra: Any
    ) -> int:
        """Runs a command line. Whatever happens becomes an exit code."""
        _COMMAND.set(tuple(arguments))
        try:
            try:
                return int(super().main(arguments, prog_name, complete_var, standalone_mode=False, **extra) or 0)
            except Exception as error:
                return _failed(output, error)
            except Interrupted as error:
                if _rank():
                    return error.exit_code
                return _fail(
                    output, None, f"stopped by {error}{_state_of_destination(error, arguments)}", error.exit_code
                )
        except SystemExit as end:
            return _own_code(end)
        except Exception:  # the error could not be printed; exit code 1 would mean that checkpoints differ
            return EXIT_INTERNAL


def _rank() -> int:
    """The number of this process among those that a launcher started; the first one speaks for all."""
    try:
        return World.of().rank
    except UsageError:
        return 0


def _own_code(end: SystemExit) -> int:
    """The exit code of a SystemExit that this package raised. Any other SystemExit counts as a bug."""
    return end.code if end.code in (0, SIGPIPE_EXIT) and isinstance(end.code, int) else EXIT_INTERNAL


def _failed(output: Output, error: Exception) -> int:
    """Prints an error as one line and returns its exit code."""
    if isinstance(error, CkptkitError):
        return error.exit_code if error.told else _fail(output, error, str(error), error.exit_code)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return _fail(output, None, f"{where}{error.strerror or error}", EXIT_STORAGE)
    if isinstance(error, ImportError) and (package := package_of(error.name)) is not None and not package.present:
        return _missing(output, package)
    if hasattr(error, "format_message"):
        return _fail(output, None, _usage_message(error), EXIT_USAGE)
    bug = f"internal error: {type(error).__name__}: {error}; set {TRACEBACK_VARIABLE}=1 to see where"
    return _fail(output, None, bug, EXIT_INTERNAL)


def _missing(output: Output, package: Package) -> int:
    """Says which package a command needs; `verify` could not be run then, and others are not supported here."""
    what, hint = missing_line([package])
    if package.purpose == MOVING:
        return _fail(output, None, f"ckptkit is not installed completely: {what}; {hint}", EXIT_INTERNAL)
    kind = VerificationError if arguments_of_command()[:1] == ("verify",) else UnsupportedError
    error = kind(f"this command needs {package.name}: {what}", hint=f"{hint} (ckptkit doctor lists what works here)")
    return _fail(output, error, str(error), error.exit_code)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Turns SIGINT and SIGTERM into `Interrupted`. A second signal acts as usual, in case the clean-up hangs."""

    def interrupt(signum: int, frame: object) -> None:
        restore()
        raise Interrupted(signum)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        restore()


def _fail(output: Output, error: CkptkitError | None, message: str, exit_code: int) -> int:
    if os.environ.get(TRACEBACK_VARIABLE):
        say(traceback.format_exc().rstrip())
    output.error(error, f"rank {rank}: {message}" if (rank := _rank()) else message, exit_code)
    return exit_code


def _state_of_destination(error: Interrupted, arguments: list[str]) -> str:
    """A sentence about the destination after a signal, from the notes of the error. No note: it was not touched."""
    notes = getattr(error, "__notes__", [])
    return f"; {'; '.join(notes)}" if notes else how_to_resume(arguments)


def how_to_resume(arguments: list[str]) -> str:
    """The command that continues a stopped conversion: the same line with --resume."""
    resumable = arguments[0] == "convert" or tuple(arguments[:2]) in _RESUMABLE
    if not resumable or "--dry-run" in arguments:
        return ""
    command = ["ckptkit", *arguments, *(["--resume"] if "--resume" not in arguments else [])]
    return f"; the destination is as it was; continue with: {shlex.join(command)}"


def _usage_message(error: Any) -> str:
    """Typer's message about a command line, with the command whose help explains it."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "ckptkit"
    message = str(error.format_message()).rstrip(".")
    meant = " or ".join(_meant(message)) if path == "ckptkit" else ""
    return f"{message}; {f'did you mean {meant}' if meant else f'see {path} --help'}"


def _meant(message: str) -> list[str]:
    """Commands of groups that have the name which is no command, such as `ckptkit surgery merge` for `merge`."""
    from ckptkit.cli.app import commands_called

    word = re.match(r"No such command '([\w-]+)'", message)
    return commands_called(word[1]) if word else []


def _json_file(arguments: list[str]) -> str | None:
    """The file for JSON, read from the raw command line, because typer may not be able to parse it."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    for index, argument in enumerate(options):
        if argument.startswith("--json="):
            return argument.removeprefix("--json=")
        if argument == "--json":
            takes_file = arguments[0] == "verify"
            return "".join(options[index + 1 : index + 2]) or None if takes_file else "-"
    return None
