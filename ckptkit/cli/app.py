"""The command `ckptkit`, with all its subcommands.

The options of a subcommand are declared when somebody asks for it, and its implementation is imported when it runs:
declaring the options of all takes longer than `inspect` takes for a small checkpoint.
"""

from __future__ import annotations

from collections import UserDict
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.main import get_command

from ckptkit.cli.exits import EXIT_CODES, Commands
from ckptkit.cli.help import GroupedCommand
from ckptkit.cli.log_file import OPTION, VARIABLE
from ckptkit.cli.records import with_records
from ckptkit.version import __version__

_MODULES = {
    "convert": "convert",
    **dict.fromkeys(("inspect", "diff", "validate", "hash"), "looking"),
    "verify": "verify",
    "watch": "watch",
    "families": "families",
    "doctor": "doctor",
    "delta": "delta",
    "adapter": "adapter",
    "surgery": "surgery",
    "split-llama": "split_llama",
}
"""Subcommand -> the module that declares it, in the order of the help.

`COMMANDS` of a module has functions and examples by name. The commands of a module with a `GROUP`, which is its help,
are subcommands of the subcommand.
"""


class _OnDemand(UserDict[str, Any]):
    """Subcommands by name, each declared when somebody first asks for it. Until then its module's name is here."""

    def __getitem__(self, name: str) -> Any:
        if isinstance(found := self.data[name], str):
            found = self.data[name] = _declared(name, import_module(f"ckptkit.cli.{found}"))
        return found


class _Root(Commands):
    """The command `ckptkit` itself."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = _OnDemand(_MODULES)

    def list_commands(self, ctx: Any) -> list[str]:
        """The names alone: a list of all commands need not declare them."""
        return list(self.commands)


def commands_called(name: str) -> list[str]:
    """The commands of groups that have a name."""
    found = []
    for group, place in _MODULES.items():
        module = import_module(f"ckptkit.cli.{place}")
        if hasattr(module, "GROUP") and name in module.COMMANDS:
            found.append(f"ckptkit {group} {name}")
    return found


def _declared(name: str, module: Any) -> Any:
    """A subcommand with its options, or a group of subcommands."""
    group = getattr(module, "GROUP", None)
    place = typer.Typer(name=name, help=group, no_args_is_help=True, rich_markup_mode=None, add_completion=False)
    if group is not None:
        place.callback()(lambda: None)  # with a callback it is a group, however many commands it has
    for own, (function, examples) in module.COMMANDS.items():
        if group is not None or own == name:
            place.command(own, cls=GroupedCommand, epilog=examples)(with_records(function))
    return get_command(place)


app = typer.Typer(
    cls=_Root,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXIT_CODES,
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
    log_file: Annotated[
        str | None,
        typer.Option(
            OPTION,
            metavar="FILE",
            help="Append what the command was, said and ended with, with times. Anywhere in the line of any command.",
            envvar=VARIABLE,
        ),
    ] = None,
) -> None:
    """Convert model checkpoints between Hugging Face and Megatron layouts, byte for byte, and verify the result."""
    if version:
        typer.echo(f"ckptkit {__version__}")
        raise typer.Exit
