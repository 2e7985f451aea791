"""Sections that are made of the code: commands with their options, families, formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ckptkit.cli.app import app
from ckptkit.conversion.architectures import supported_architectures
from ckptkit.conversion.targets import ADAPTER_NAMES, NAMES
from ckptkit.formats.registry import FORMATS

_PLAIN = str.maketrans({"<": "&lt;", "*": "&#42;", "|": "&#124;", "[": "&#91;", "_": "&#95;"})
"""Characters that Markdown would take for its own."""


def families() -> str:
    """A row for each family."""
    found: dict[str, list[str]] = {}
    for architecture in supported_architectures():
        found.setdefault(architecture.family, []).append(f"`{architecture.architecture}`")
    lines = [f"| `{family}` | {', '.join(names)} |" for family, names in found.items()]
    return "\n".join(["| family | architectures |", "|---|---|", *lines])


def formats() -> str:
    """A row for each format."""
    written = {*NAMES, *ADAPTER_NAMES}
    names = dict.fromkeys([*NAMES, *ADAPTER_NAMES, *(format.name for format in FORMATS)])
    lines = [f"| `{name}` | yes | {'yes' if name in written else 'no'} |" for name in names]
    return "\n".join(["| format | read | written |", "|---|---|---|", *lines])


def cli() -> str:
    """Every command with its help, arguments and options."""
    from typer.main import get_command

    root = get_command(app)
    return "\n".join(_command(root, "ckptkit"))


def _command(command: Any, name: str) -> Iterator[str]:
    """A command, and those below it."""
    import click

    context = (
        command.context_class(command, info_name=name) if hasattr(command, "context_class") else click.Context(command)
    )
    subcommands = command.list_commands(context) if hasattr(command, "list_commands") else []
    if not subcommands:
        yield f"## {name}\n"
        yield f"```console\n$ {_usage(command, context, name)}\n```\n"
    else:
        yield "" if name == "ckptkit" else f"## {name}\n"
    yield _paragraphs(command.help) + "\n"
    if not subcommands:
        yield from _options(command, context)
        if command.epilog:
            yield "```text\n" + str(command.epilog).replace("\b\n", "").strip("\n") + "\n```\n"
    for sub in subcommands:
        yield from _command(command.get_command(context, sub), f"{name} {sub}")


def _usage(command: Any, context: Any, name: str) -> str:
    """The usage line."""
    return f"{name} {' '.join(command.collect_usage_pieces(context))}"


def _options(command: Any, context: Any) -> Iterator[str]:
    """Tables of arguments and options, one for each heading."""
    groups: dict[str, list[str]] = {}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is None:
            continue
        argument = parameter.param_type_name == "argument"
        heading = "Arguments" if argument else getattr(parameter, "rich_help_panel", None) or "Options"
        name, text = (" ".join(str(part).split()) for part in record)
        groups.setdefault(heading, []).append(f"| `{name}` | {text.translate(_PLAIN)} |")
    for heading, lines in groups.items():
        yield "\n".join([f"| {heading} | |", "|---|---|", *lines]) + "\n"


def _paragraphs(text: str | None) -> str:
    return "\n\n".join(" ".join(part.split()) for part in (text or "").split("\n\n"))


SECTIONS: dict[str, Callable[[], str]] = {"cli": cli, "families": families, "formats": formats}
"""Marker in a page -> what stands there."""
