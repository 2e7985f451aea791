"""`ckptkit inspect`, `diff`, `validate` and `hash`: their options, and the calls."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ckptkit.cli.choices import HASHED
from ckptkit.cli.exits import EXIT_DIFFERS
from ckptkit.cli.options import Json, Source, Threads, choice
from ckptkit.cli.output import Output
from ckptkit.cli.records import Prefix
from ckptkit.errors import InputError, UnsupportedError, UsageError

CheckpointPath = Annotated[
    str,
    typer.Argument(
        metavar="PATH", help="Checkpoint of any format: its directory, an iteration, or verl's actor folder."
    ),
]


INSPECT_EXAMPLES = """\b
Examples:
  ckptkit inspect Llama-3.1-8B
  ckptkit inspect checkpoints --iteration 2000
  ckptkit inspect llama-tp4pp2 --json
  ckptkit inspect step-200.delta
  torchrun pretrain_gpt.py --load llama-tp4pp2 $(ckptkit inspect --megatron-flags llama-tp4pp2) ..."""


def inspect(
    path: CheckpointPath,
    source: Source,
    megatron_flags: Annotated[
        bool,
        typer.Option(
            "--megatron-flags",
            help="Print only the flags with which Megatron-LM builds the model: --use-checkpoint-args and what that"
            " leaves out, or all of them where Megatron-LM cannot load the checkpoint itself.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Show the format, grid, sizes and dtypes of a checkpoint, or what is in a delta.

    Reads headers only, so it answers at once at any size.
    """
    from ckptkit.cli import rendering
    from ckptkit.formats.delta.reading import is_delta
    from ckptkit.inspection import delta_summary, summary

    output = Output("-" if json else None)
    if is_delta(Path(path)):
        if megatron_flags:
            raise UsageError("a delta has no flags of Megatron-LM", where=path, hint="ask for those of the checkpoint")
        output.result(delta_summary.inspect_delta(path), rendering.delta)
        return
    result = summary.inspect(path, **source.keywords())
    if not megatron_flags:
        output.result(result, rendering.inspection)
        return
    if result.megatron_flags is None:
        reasons = "; ".join(result.inexpressible)
        raise UnsupportedError(f"no flags of Megatron-LM build this model: {reasons}", where=path)
    output.result(result.megatron_flags, rendering.megatron_flags, {"megatron_flags": result.megatron_flags})


DIFF_EXAMPLES = """\b
Examples:
  ckptkit diff Llama-3.1-8B llama-tp4pp2
  ckptkit diff checkpoints/iter_0001000 checkpoints/iter_0002000 --hf-reference Llama-3.1-8B
  ckptkit diff Llama-3.1-8B Llama-3.1-8B-Instruct --structure-only
  ckptkit diff model model-bf16 --json"""


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Checkpoint of any format.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one, of any format and grid.")],
    a_source: Annotated[Source, Prefix("a", "Source of A")],
    b_source: Annotated[Source, Prefix("b", "Source of B")],
    structure_only: Annotated[
        bool, typer.Option("--structure-only", help="Compare config, names, shapes and dtypes; read no weights.")
    ] = False,
    hf_reference: Annotated[
        str | None,
        typer.Option(
            "--hf-reference",
            metavar="DIR",
            help="Hugging Face directory with the config and tokenizer of the Megatron sides.",
        ),
    ] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Show where two checkpoints differ, whatever their layouts.

    First config, names, shapes and dtypes, then values: how many elements differ and by how much at most, and how many
    are NaN or infinite. Both sides are streamed. The exit code is 0 if nothing differs, and 1 if anything does.
    """
    from ckptkit.checkpoints.source_options import SourceOptions
    from ckptkit.cli import rendering
    from ckptkit.inspection import differences

    output = Output("-" if json else None)
    with output.progress("comparing") as progress:
        found = differences.diff(
            a,
            b,
            values=not structure_only,
            hf_reference=hf_reference,
            threads=threads,
            progress=progress,
            a_source=SourceOptions(**a_source.keywords()),
            b_source=SourceOptions(**b_source.keywords()),
        )
    output.result(found, rendering.differences)
    if not found.same:
        raise typer.Exit(EXIT_DIFFERS)


VALIDATE_EXAMPLES = """\b
Examples:
  ckptkit validate Llama-3.1-8B
  ckptkit validate llama-tp4pp2 --values
  ckptkit validate checkpoints --iteration 2000 --hf-reference Llama-3.1-8B --json"""


def validate(
    path: CheckpointPath,
    source: Source,
    values: Annotated[
        bool,
        typer.Option(
            "--values", help="Read every weight: none may be NaN or infinite, no matrix all zero, copies must be equal."
        ),
    ] = False,
    headers_only: Annotated[
        bool, typer.Option("--headers-only", help="Do not read data, not even for torch's checksums.")
    ] = False,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Check that a checkpoint is whole and agrees with itself.

    Files, headers, sizes, index, config against tensors, and the checksums of torch's archives (safetensors has none).
    The exit code is 0 if all is well, and 3 if anything is wrong.
    """
    from ckptkit.cli import rendering
    from ckptkit.errors import UsageError
    from ckptkit.inspection import validation

    if values and headers_only:
        raise UsageError("--values and --headers-only exclude each other", hint="pass one of them")
    output = Output("-" if json else None)
    with output.progress("reading") as progress:
        found = validation.validate(
            path,
            checksums=not headers_only,
            values=values,
            threads=threads,
            progress=progress,
            **source.keywords(),
        )
    output.result(found, rendering.validation)
    if not found.passed:
        raise typer.Exit(InputError.exit_code)


HASH_EXAMPLES = """\b
Examples:
  ckptkit hash Llama-3.1-8B
  ckptkit hash llama-tp4pp2 --only tensors
  ckptkit hash Llama-3.1-8B --json > hashes.json"""


def hash_(
    path: CheckpointPath,
    source: Source,
    only: Annotated[
        str | None, choice("--only", HASHED, "Hash only tensors, or only files. The default is both.")
    ] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Print the SHA-256 of every tensor and of every file.

    Tensors are hashed under their Hugging Face names as safetensors stores them: a Hugging Face directory and any
    Megatron conversion of it give the same lines, and the same hash of the model.
    """
    from ckptkit.cli import rendering
    from ckptkit.inspection import hashing

    output = Output("-" if json else None)
    with output.progress("hashing") as progress:
        result = hashing.hash_checkpoint(
            path,
            only=only,
            threads=threads,
            progress=progress,
            **source.keywords(),
        )
    output.result(result, rendering.hashes)


COMMANDS = {
    "inspect": (inspect, INSPECT_EXAMPLES),
    "diff": (diff, DIFF_EXAMPLES),
    "validate": (validate, VALIDATE_EXAMPLES),
    "hash": (hash_, HASH_EXAMPLES),
}
