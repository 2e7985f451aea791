"""`ckptkit watch`: converts the iterations of a run when they are finished."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ckptkit.cli.choices import FORMATS
from ckptkit.cli.convert import HINTS
from ckptkit.cli.options import FORMAT, Form, Grid, Json, Source, Threads, choice
from ckptkit.cli.output import Output, say
from ckptkit.errors import UsageError

LEVELS = ("structure", "weights", "logits", "gradients", "training")
"""A test compares them with their source."""
ITERATIONS = "Iterations"

EXAMPLES = """\b
Examples:
  ckptkit watch checkpoints --to hf -o served --hf-reference Llama-3.1-8B
  ckptkit watch checkpoints --to hf -o served --hf-reference Llama-3.1-8B --verify weights --keep 3
  ckptkit watch verl-run --to hf -o served --until 500
  ckptkit watch checkpoints --to torch_dist --tp 4 -o resharded --once --json"""


def watch(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="Folder with the iterations of a run; it may appear later.")
    ],
    out: Annotated[
        str,
        typer.Option("-o", "--out", metavar="OUT", help="Folder that gets a folder for each iteration, of its name."),
    ],
    to: Annotated[str, choice("--to", FORMATS, "Format to write, as for convert.", panel=FORMAT, hints=HINTS)],
    grid: Grid,
    source: Source,
    form: Form,
    verify: Annotated[
        str | None,
        choice("--verify", LEVELS, "Also verify each output, up to this level.", panel=ITERATIONS),
    ] = None,
    keep: Annotated[
        int | None,
        typer.Option(
            "--keep",
            min=1,
            metavar="N",
            help="Outputs that stay, the newest. Older ones are removed when a newer one is there (and verified).",
            rich_help_panel=ITERATIONS,
        ),
    ] = None,
    first: Annotated[
        int,
        typer.Option("--first", min=0, metavar="N", help="Leave out earlier iterations.", rich_help_panel=ITERATIONS),
    ] = 0,
    until: Annotated[
        int | None,
        typer.Option(
            "--until",
            min=0,
            metavar="N",
            help="End when iteration N, or a later one, was dealt with. Default: run until stopped.",
            rich_help_panel=ITERATIONS,
        ),
    ] = None,
    once: Annotated[
        bool,
        typer.Option("--once", help="Deal with what is finished now, and end.", rich_help_panel=ITERATIONS),
    ] = False,
    every: Annotated[
        float,
        typer.Option("--every", min=0.1, metavar="SECONDS", help="Time between two looks.", rich_help_panel=ITERATIONS),
    ] = 30.0,
    settle: Annotated[
        float,
        typer.Option(
            "--settle",
            min=0.0,
            metavar="SECONDS",
            help="Without a tracker file, an iteration is finished when nothing has changed for so long.",
            rich_help_panel=ITERATIONS,
        ),
    ] = 60.0,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Convert each iteration of a training run when it is finished.

    One after another, the oldest first. An iteration is finished when the tracker file names it or a later one. OUT has
    a record of what was done (watch.json): after a kill, the same command goes on. An iteration that cannot be
    converted is said and recorded, and the next one follows.

    The exit code is 0 if all went well, 1 if a verification showed a difference, and otherwise that of the first
    iteration that failed.
    """
    from ckptkit.checkpoints.source_options import SourceOptions
    from ckptkit.cli import rendering
    from ckptkit.io.stores.address import refuse_address
    from ckptkit.runs.watch import Wanted
    from ckptkit.runs.watch import watch as watch_run

    refuse_address(out, "a record of the run is kept beside the outputs")
    if once and until is not None:
        raise UsageError("--once and --until exclude each other", hint="pass one of them")
    wanted = Wanted(
        run=Path(run),
        out=Path(out),
        to=to,
        options={"grid": grid.parallelism(), "threads": threads, **form.keywords()},
        source=SourceOptions(**source.keywords()),
        verify=verify,
        keep=keep,
        first=first,
    )
    found = watch_run(wanted, once=once, until=until, every=every, settle=settle, tell=say)
    Output("-" if json else None).result(found, rendering.watched)
    if found.exit_code:
        raise typer.Exit(found.exit_code)


COMMANDS = {"watch": (watch, EXAMPLES)}
