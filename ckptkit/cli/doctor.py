"""`ckptkit doctor`: what works here."""

from __future__ import annotations

from typing import Annotated

import typer

from ckptkit.cli.options import Json, choice
from ckptkit.cli.output import Output
from ckptkit.errors import VerificationError
from ckptkit.sizes import parse_size

QUESTIONS = (
    *("bytes", "hub", "structure", "weights", "logits", "gradients", "training"),
    *("rollouts", "trainability", "adapter", "cuda"),
)
"""What can be asked; a test compares them with their source."""

EXAMPLES = """\b
Examples:
  ckptkit doctor
  ckptkit doctor /scratch/checkpoints
  ckptkit doctor --for gradients
  ckptkit doctor --json"""


def doctor(
    folder: Annotated[
        str | None,
        typer.Argument(
            metavar="[FOLDER]",
            help="Also measure the disk of this folder: a file without a name is written and read there.",
            show_default=False,
        ),
    ] = None,
    wanted: Annotated[
        str | None,
        choice("--for", QUESTIONS, "Exit with code 6 unless this works here."),
    ] = None,
    size: Annotated[
        str,
        typer.Option("--size", metavar="SIZE", help="Bytes to write in FOLDER, half of the free space at most."),
    ] = "256MB",
    json: Json = False,
) -> None:
    """Show versions, devices, launchers and disk speed, and what `verify` can run here.

    What is missing comes with the line that installs it. The exit code is 0 if the commands that move bytes work, and
    70 if they do not. With --for it is 6 if that does not work.
    """
    from ckptkit.cli import rendering
    from ckptkit.cli.exits import EXIT_INTERNAL
    from ckptkit.verification.environment import summary

    output = Output("-" if json else None)
    found = summary.environment(folder, size=parse_size(size, "--size"))
    output.result(found, rendering.environment)
    if not found.works(summary.BYTES):
        raise typer.Exit(EXIT_INTERNAL)
    if wanted is not None and not found.works(wanted):
        raise typer.Exit(VerificationError.exit_code)


COMMANDS = {"doctor": (doctor, EXAMPLES)}
