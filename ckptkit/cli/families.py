"""`ckptkit families`: the supported architectures."""

from __future__ import annotations

from ckptkit.cli.options import Json
from ckptkit.cli.output import Output

EXAMPLES = """\b
Examples:
  ckptkit families
  ckptkit families --json"""


def families(json: Json = False) -> None:
    """List the supported architectures and their formats."""
    from dataclasses import asdict

    from ckptkit.cli import rendering
    from ckptkit.conversion.architectures import supported_architectures

    supported = supported_architectures()
    data = [asdict(architecture) for architecture in supported]
    Output("-" if json else None).result(supported, rendering.architectures, data)


COMMANDS = {"families": (families, EXAMPLES)}
