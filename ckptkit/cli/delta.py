"""`ckptkit delta make` and `ckptkit delta apply`: their options, and the calls."""

from __future__ import annotations

from typing import Annotated

import typer

from ckptkit.cli.choices import FORMATS
from ckptkit.cli.convert import HINTS
from ckptkit.cli.options import FORMAT, Execution, Grid, Json, ShardSize, Source, Spec, VocabDivisibility, choice
from ckptkit.cli.records import Prefix
from ckptkit.sizes import parse_size

Out = Annotated[
    str,
    typer.Option("-o", "--out", metavar="OUT", help="Directory to create. It appears complete or not at all."),
]

MAKE_EXAMPLES = """\b
Examples:
  ckptkit delta make step-100 step-200 -o step-200.delta
  ckptkit delta make policy-hf run/iter_0000200 -o step-200.delta --hf-reference policy-hf
  ckptkit delta make step-100 step-200 -o step-200.delta --dry-run"""


def make(
    old: Annotated[str, typer.Argument(metavar="OLD", help="The checkpoint that the receiver has, of any format.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="The new weights of the same model, of any format.")],
    out: Out,
    old_source: Annotated[Source, Prefix("old", "Source of OLD")],
    new_source: Annotated[Source, Prefix("new", "Source of NEW")],
    execution: Execution,
    hf_reference: Annotated[
        str | None,
        typer.Option(
            "--hf-reference",
            metavar="DIR",
            help="Hugging Face directory with the config and tokenizer of the Megatron sides.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Write down how the weights of NEW differ from those of OLD.

    Both are read once. Of each tensor the delta holds nothing, its changes, or all of it, whichever is the smallest.
    """
    from ckptkit.checkpoints.source_options import SourceOptions
    from ckptkit.cli import rendering
    from ckptkit.deltas.make import make_delta

    output = execution.output(json)
    with output.progress("comparing") as progress:
        result = make_delta(
            old,
            new,
            out,
            hf_reference=hf_reference,
            old_source=SourceOptions(**old_source.keywords()),
            new_source=SourceOptions(**new_source.keywords()),
            progress=progress,
            **execution.keywords(),
        )
    output.result(result, rendering.made_delta)


APPLY_EXAMPLES = """\b
Examples:
  ckptkit delta apply step-100 step-200.delta -o step-200
  ckptkit delta apply step-100 step-200.delta -o step-200-tp4 --to torch --tp 4"""


def apply(
    old: Annotated[
        str, typer.Argument(metavar="OLD", help="The checkpoint that the delta was made from, of any format.")
    ],
    delta: Annotated[str, typer.Argument(metavar="DELTA", help="Directory of the delta.")],
    out: Out,
    grid: Grid,
    source: Source,
    execution: Execution,
    to: Annotated[
        str, choice("--to", FORMATS, "Format to write, as for convert. Default: hf.", panel=FORMAT, hints=HINTS)
    ] = "hf",
    spec: Spec = "te",
    shard_size: ShardSize = None,
    make_vocab_size_divisible_by: VocabDivisibility = None,
    json: Json = False,
) -> None:
    """Make the new weights of the old ones and a delta, bit for bit.

    The hash of OLD is checked before anything is written, and that of the result before it is put in place.
    """
    from ckptkit.cli import rendering
    from ckptkit.deltas.apply import apply_delta

    output = execution.output(json)
    parallelism = grid.parallelism()
    with output.progress("applying") as progress:
        result = apply_delta(
            old,
            delta,
            out,
            to=to,
            grid=parallelism,
            spec=spec,
            shard_size=None if shard_size is None else parse_size(shard_size),
            make_vocab_size_divisible_by=make_vocab_size_divisible_by,
            progress=progress,
            **source.keywords(),
            **execution.keywords(),
        )
    output.result(result, rendering.conversion)


GROUP = "Publish new weights of a model as the difference from the old ones."
COMMANDS = {"make": (make, MAKE_EXAMPLES), "apply": (apply, APPLY_EXAMPLES)}
