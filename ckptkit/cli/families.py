"""`ckptkit families`: the supported architectures."""

from __future__ import annotations

import difflib
from typing import Annotated

import typer

from ckptkit.cli.options import Json, alternatives
from ckptkit.cli.output import Output
from ckptkit.errors import UsageError

EXAMPLES = """\b
Examples:
  ckptkit families
  ckptkit families qwen3
  ckptkit families --json"""


def _families_like(incomplete: str) -> list[str]:
    """The families whose names begin so, for a shell that completes one."""
    from ckptkit.families import families as known

    return [family.name for family in known() if family.name.startswith(incomplete)]


def families(
    family: Annotated[
        str | None,
        typer.Argument(
            metavar="[FAMILY]",
            help="Only this family: its name, or an architecture as in config.json.",
            autocompletion=_families_like,
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """List the supported architectures and their formats."""
    from dataclasses import asdict

    from ckptkit.cli import rendering
    from ckptkit.conversion.architectures import supported_architectures

    every = supported_architectures()
    supported = [one for one in every if family in (None, one.family, one.architecture)]
    if not supported:
        names = dict.fromkeys(one.family for one in every)
        close = difflib.get_close_matches(str(family).lower(), names, 3, 0.4)
        like = f"did you mean {alternatives(close)}? " if close else ""
        raise UsageError(f"no family {family!r}", hint=f"{like}ckptkit families lists all {len(names)}")
    data = [asdict(architecture) for architecture in supported]
    Output("-" if json else None).result(supported, rendering.architectures, data)


COMMANDS = {"families": (families, EXAMPLES)}
