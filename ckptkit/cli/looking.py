"""The commands that look at checkpoints: their options, and where the work is done."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from typing import Annotated

import typer

from ckptkit.cli.arguments import (
    HfReference,
    Iteration,
    Json,
    SrcEp,
    SrcEtp,
    SrcFirst,
    SrcLast,
    SrcPp,
    SrcTp,
    SrcVpp,
    Threads,
    VocabSize,
    stated_grid,
)
from ckptkit.cli.exits import EXIT_DIFFERS
from ckptkit.cli.output import Output
from ckptkit.errors import InputError

CheckpointPath = Annotated[
    str,
    typer.Argument(
        metavar="PATH", help="Checkpoint of any format: its directory, an iteration, or verl's actor folder."
    ),
]


class Part(StrEnum):
    """What of a checkpoint is hashed."""

    TENSORS = "tensors"
    FILES = "files"


INSPECT_EXAMPLES = """\b
Examples:
  ckptkit inspect Llama-3.1-8B
  ckptkit inspect checkpoints --iteration 2000
  ckptkit inspect llama-tp4pp2 --json"""


def inspect(
    path: CheckpointPath,
    hf_reference: HfReference = None,
    iteration: Iteration = None,
    vocab_size: VocabSize = None,
    src_tp: SrcTp = None,
    src_pp: SrcPp = None,
    src_vpp: SrcVpp = None,
    src_ep: SrcEp = None,
    src_etp: SrcEtp = None,
    src_first_stage_layers: SrcFirst = None,
    src_last_stage_layers: SrcLast = None,
    json: Json = False,
) -> None:
    """Show the format, grid, sizes and dtypes of a checkpoint.

    Reads headers only, so it answers at once at any size.
    """
    from ckptkit.cli import rendering
    from ckptkit.inspection import summary

    grid = stated_grid(src_tp, src_pp, src_vpp, src_ep, src_etp, src_first_stage_layers, src_last_stage_layers)
    result = summary.inspect(
        path, hf_reference=hf_reference, iteration=iteration, stored_grid=grid, vocab_size=vocab_size
    ).to_dict()
    Output("-" if json else None).result(result, partial(rendering.inspection, result))


DIFF_EXAMPLES = """\b
Examples:
  ckptkit diff Llama-3.1-8B llama-tp4pp2
  ckptkit diff checkpoints/iter_0001000 checkpoints/iter_0002000 --hf-reference Llama-3.1-8B
  ckptkit diff Llama-3.1-8B Llama-3.1-8B-Instruct --structure-only
  ckptkit diff model model-bf16 --json"""


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Checkpoint of any format.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one, of any format and grid.")],
    structure_only: Annotated[
        bool, typer.Option("--structure-only", help="Compare config, names, shapes and dtypes; read no weights.")
    ] = False,
    hf_reference: HfReference = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Show where two checkpoints differ, whatever their layouts.

    First config, names, shapes and dtypes, then values: how many elements differ and by how much at most, and how many
    are NaN or infinite. Both sides are streamed. The exit code is 0 if nothing differs, and 1 if anything does.
    """
    from ckptkit.cli import rendering
    from ckptkit.inspection import differences

    output = Output("-" if json else None)
    with output.progress("comparing") as progress:
        found = differences.diff(
            a, b, values=not structure_only, hf_reference=hf_reference, threads=threads, progress=progress
        )
    result = found.to_dict()
    output.result(result, partial(rendering.differences, result))
    if not found.same:
        raise typer.Exit(EXIT_DIFFERS)


VALIDATE_EXAMPLES = """\b
Examples:
  ckptkit validate Llama-3.1-8B
  ckptkit validate llama-tp4pp2 --values
  ckptkit validate checkpoints --iteration 2000 --hf-reference Llama-3.1-8B --json"""


def validate(
    path: CheckpointPath,
    values: Annotated[
        bool,
        typer.Option(
            "--values", help="Read every weight: none may be NaN or infinite, no matrix all zero, copies must be equal."
        ),
    ] = False,
    headers_only: Annotated[
        bool, typer.Option("--headers-only", help="Do not read data, not even for torch's checksums.")
    ] = False,
    hf_reference: HfReference = None,
    iteration: Iteration = None,
    vocab_size: VocabSize = None,
    src_tp: SrcTp = None,
    src_pp: SrcPp = None,
    src_vpp: SrcVpp = None,
    src_ep: SrcEp = None,
    src_etp: SrcEtp = None,
    src_first_stage_layers: SrcFirst = None,
    src_last_stage_layers: SrcLast = None,
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
    grid = stated_grid(src_tp, src_pp, src_vpp, src_ep, src_etp, src_first_stage_layers, src_last_stage_layers)
    output = Output("-" if json else None)
    with output.progress("reading") as progress:
        found = validation.validate(
            path,
            checksums=not headers_only,
            values=values,
            threads=threads,
            progress=progress,
            hf_reference=hf_reference,
            iteration=iteration,
            stored_grid=grid,
            vocab_size=vocab_size,
        )
    result = found.to_dict()
    output.result(result, partial(rendering.validation, result))
    if not found.passed:
        raise typer.Exit(InputError.exit_code)


HASH_EXAMPLES = """\b
Examples:
  ckptkit hash Llama-3.1-8B
  ckptkit hash llama-tp4pp2 --only tensors
  ckptkit hash Llama-3.1-8B --json > hashes.json"""


def hash_(
    path: CheckpointPath,
    only: Annotated[Part | None, typer.Option(help="Hash only tensors, or only files. The default is both.")] = None,
    hf_reference: HfReference = None,
    iteration: Iteration = None,
    vocab_size: VocabSize = None,
    src_tp: SrcTp = None,
    src_pp: SrcPp = None,
    src_vpp: SrcVpp = None,
    src_ep: SrcEp = None,
    src_etp: SrcEtp = None,
    src_first_stage_layers: SrcFirst = None,
    src_last_stage_layers: SrcLast = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Print the SHA-256 of every tensor and of every file.

    Tensors are hashed under their Hugging Face names as safetensors stores them: a Hugging Face directory and any
    Megatron conversion of it give the same lines, and the same hash of the model.
    """
    from ckptkit.cli import rendering
    from ckptkit.inspection import hashing

    grid = stated_grid(src_tp, src_pp, src_vpp, src_ep, src_etp, src_first_stage_layers, src_last_stage_layers)
    output = Output("-" if json else None)
    with output.progress("hashing") as progress:
        result = hashing.hash_checkpoint(
            path,
            only=None if only is None else only.value,
            threads=threads,
            progress=progress,
            hf_reference=hf_reference,
            iteration=iteration,
            stored_grid=grid,
            vocab_size=vocab_size,
        ).to_dict()
    output.result(result, partial(rendering.hashes, result))
