"""`ckptkit adapter merge` and `export`: their options, and the calls."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ckptkit.cli.choices import CASTS, MODEL_FORMATS, PRECISIONS
from ckptkit.cli.options import (
    FORMAT,
    Execution,
    Experts,
    Grid,
    Json,
    Out,
    ShardSize,
    Source,
    Spec,
    VocabDivisibility,
    alternatives,
    choice,
)
from ckptkit.errors import UsageError
from ckptkit.sizes import parse_size

MERGE_EXAMPLES = """\b
Examples:
  ckptkit adapter merge Llama-3.1-8B adapter -o merged --to hf
  ckptkit adapter merge Llama-3.1-8B adapter -o merged-tp4 --to torch --tp 4
  ckptkit adapter merge Llama-3.1-8B helpful:0.7 terse:0.3 -o merged --to hf --precision float64
  ckptkit adapter merge Llama-3.1-8B checkpoints/iter_0001000 -o merged --to hf"""

EXPORT_EXAMPLES = """\b
Examples:
  ckptkit adapter export checkpoints/iter_0001000 -o adapter --hf-reference Llama-3.1-8B
  ckptkit adapter export checkpoints/iter_0001000 -o adapter --hf-reference Llama-3.1-8B --lora-alpha 32"""

EXTRACT_EXAMPLES = """\b
Examples:
  ckptkit adapter extract Llama-3.1-8B Llama-3.1-8B-tuned -o adapter --rank 64
  ckptkit adapter extract Llama-3.1-8B tuned-tp4 -o adapter --energy 0.99 --dtype bfloat16"""

Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help=f"Element type of the output: {alternatives(CASTS)}. The default is that of the source.",
        rich_help_panel=FORMAT,
    ),
]


def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model: a checkpoint of any format.")],
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER[:WEIGHT]...",
            help="Adapters of any format, each with the factor that it is added with. Default: 1.",
        ),
    ],
    out: Out,
    to: Annotated[str, choice("--to", MODEL_FORMATS, "Format to write, as for convert.", panel=FORMAT)],
    grid: Grid,
    source: Source,
    execution: Execution,
    precision: Annotated[
        str, choice("--precision", PRECISIONS, "Type of the sums, before they are rounded once.", panel=FORMAT)
    ] = PRECISIONS[0],
    spec: Spec = "te",
    experts: Experts = None,
    dtype: Dtype = None,
    shard_size: ShardSize = None,
    make_vocab_size_divisible_by: VocabDivisibility = None,
    json: Json = False,
) -> None:
    """Write a model with LoRA adapters in its weights: W + scale * B A.

    The sums are made in float32, tile by tile, and rounded once. Tensors without an adapter are copied. No model is
    loaded.
    """
    from ckptkit.adapters.commands import merge_adapters
    from ckptkit.cli import rendering

    given = source.keywords()
    reference, alpha = given.pop("hf_reference"), given.pop("lora_alpha")
    output = execution.output(json)
    parallelism = grid.parallelism()
    with output.progress("merging") as progress:
        result = merge_adapters(
            base,
            [weighted(text) for text in adapters],
            out,
            to=to,
            precision=precision,
            grid=parallelism,
            dtype=dtype,
            shard_size=None if shard_size is None else parse_size(shard_size),
            spec=spec,
            experts=experts,
            make_vocab_size_divisible_by=make_vocab_size_divisible_by,
            hf_reference=reference,
            lora_alpha=alpha,
            source=given,
            progress=progress,
            **execution.keywords(),
        )
    output.result(result, rendering.conversion)


def weighted(text: str) -> tuple[str, float]:
    """The path and the weight in `ADAPTER[:WEIGHT]`.

    Raises:
        UsageError: The weight is no number.
    """
    path, colon, weight = text.rpartition(":")
    if not colon or "/" in weight or Path(text).exists():  # a colon in a path, as in s3://
        return text, 1.0
    try:
        return path, float(weight)
    except ValueError:
        raise UsageError(
            f"{weight!r} is no weight", where=text, hint="give ADAPTER:WEIGHT, as in helpful:0.7"
        ) from None


def export(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Megatron checkpoint, with or without the model's weights.")
    ],
    out: Out,
    source: Source,
    execution: Execution,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Take the adapter out of a Megatron checkpoint, as a directory of PEFT.

    Only the adapter's bytes are read. --hf-reference names the model that it is for.
    """
    from ckptkit.adapters.commands import export_adapter
    from ckptkit.cli import rendering

    given = source.keywords()
    reference, alpha = given.pop("hf_reference"), given.pop("lora_alpha")
    output = execution.output(json)
    with output.progress("exporting") as progress:
        result = export_adapter(
            checkpoint,
            out,
            hf_reference=reference,
            lora_alpha=alpha,
            dtype=dtype,
            source=given,
            progress=progress,
            **execution.keywords(),
        )
    output.result(result, rendering.conversion)


def extract(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model before tuning: a checkpoint of any format.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The model after tuning, of any format.")],
    out: Out,
    source: Source,
    execution: Execution,
    rank: Annotated[
        int | None, typer.Option(min=1, metavar="R", help="Rank of all layers.", rich_help_panel=FORMAT)
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            metavar="E",
            help="Part of each difference that is kept, as a sum of squares: every layer gets the rank for it.",
            rich_help_panel=FORMAT,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            help=f"Type of the factors: {alternatives(CASTS)}. Default: float32.",
            rich_help_panel=FORMAT,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Make a LoRA adapter of the difference of two models.

    Every linear layer that differs gets the factors that are nearest to its difference. Embeddings, norms and routers
    that differ are kept whole. --json lists the kept energy of each module.
    """
    from ckptkit.adapters.extraction import extract_adapter
    from ckptkit.cli import rendering

    given = source.keywords()
    reference = given.pop("hf_reference")
    if given.pop("lora_alpha") is not None:
        raise UsageError("--lora-alpha is about adapters, and the sources are models", hint="drop it")
    output = execution.output(json)
    with output.progress("extracting") as progress:
        result = extract_adapter(
            base,
            tuned,
            out,
            rank=rank,
            energy=energy,
            dtype=dtype,
            hf_reference=reference,
            source=given,
            progress=progress,
            **execution.keywords(),
        )
    output.result(result, rendering.conversion)


GROUP = "Merge LoRA adapters into their model, take one out of a Megatron checkpoint, or make one of two models."
COMMANDS = {
    "merge": (merge, MERGE_EXAMPLES),
    "export": (export, EXPORT_EXAMPLES),
    "extract": (extract, EXTRACT_EXAMPLES),
}
