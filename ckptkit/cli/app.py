"""The command `ckptkit`, with all its subcommands. A subcommand imports its implementation only when it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from ckptkit.cli import adapter, convert, delta, families, looking, split_llama, surgery, verify
from ckptkit.cli.exits import EXIT_CODES, Commands
from ckptkit.cli.help import GroupedCommand
from ckptkit.cli.records import with_records
from ckptkit.version import __version__

app = typer.Typer(
    cls=Commands,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXIT_CODES,
)
_adapter = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Merge LoRA adapters into their model, take one out of a Megatron checkpoint, or make one of two models.",
)
_split_llama = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Join the first layers of a narrow Llama and the last layers of a wide Llama, with an adapter between them.",
)
_surgery = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Make models of models: averages, other layers, other vocabularies, merges by recipe.",
)
_delta = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Publish new weights of a model as the difference from the old ones.",
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    """Convert model checkpoints between Hugging Face and Megatron layouts, byte for byte, and verify the result."""
    if version:
        typer.echo(f"ckptkit {__version__}")
        raise typer.Exit


def _add(group: typer.Typer, name: str, function: Callable[..., None], examples: str) -> None:
    group.command(name, cls=GroupedCommand, epilog=examples)(with_records(function))


_add(app, "convert", convert.convert, convert.EXAMPLES)
_add(app, "inspect", looking.inspect, looking.INSPECT_EXAMPLES)
_add(app, "diff", looking.diff, looking.DIFF_EXAMPLES)
_add(app, "validate", looking.validate, looking.VALIDATE_EXAMPLES)
_add(app, "hash", looking.hash_, looking.HASH_EXAMPLES)
_add(app, "verify", verify.verify, verify.EXAMPLES)
_add(app, "families", families.families, families.EXAMPLES)
_add(_adapter, "merge", adapter.merge, adapter.MERGE_EXAMPLES)
_add(_adapter, "export", adapter.export, adapter.EXPORT_EXAMPLES)
_add(_adapter, "extract", adapter.extract, adapter.EXTRACT_EXAMPLES)
_add(_split_llama, "build", split_llama.build, split_llama.BUILD_EXAMPLES)
_add(_split_llama, "fit", split_llama.fit, split_llama.FIT_EXAMPLES)
_add(_surgery, "average", surgery.average, surgery.AVERAGE_EXAMPLES)
_add(_surgery, "slice", surgery.slice_, surgery.SLICE_EXAMPLES)
_add(_surgery, "stack", surgery.stack, surgery.STACK_EXAMPLES)
_add(_delta, "make", delta.make, delta.MAKE_EXAMPLES)
_add(_delta, "apply", delta.apply, delta.APPLY_EXAMPLES)
app.add_typer(_delta, name="delta")
app.add_typer(_adapter, name="adapter")
app.add_typer(_surgery, name="surgery")
app.add_typer(_split_llama, name="split-llama")
