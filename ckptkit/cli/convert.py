"""`ckptkit convert`: its options, and the call."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from ckptkit.cli.choices import ADAPTER_LAYOUTS, FORMATS, PARTS
from ckptkit.cli.options import FORMAT, OUT_HELP, SOURCE, Execution, Form, Grid, Json, Source, choice
from ckptkit.cli.output import Output
from ckptkit.errors import UsageError

_MEGATRON = "Megatron's formats are torch (mp_rank files of Megatron-LM) and torch_dist (distributed checkpoints)"
HINTS = {
    **dict.fromkeys(("megatron", "Megatron", "mcore", "megatron-core", "megatron-lm", "meg"), _MEGATRON),
    **dict.fromkeys(("huggingface", "hugging-face", "transformers", "safetensors"), "Hugging Face's format is hf"),
    **dict.fromkeys(("dist", "torch-dist", "dcp", "torchdist"), "distributed checkpoints are torch_dist"),
}
"""Words that users try for `--to`, and the hint they get."""

EXAMPLES = """\b
Examples:
  ckptkit convert Llama-3.1-8B
  ckptkit convert Llama-3.1-8B llama-tp4pp2 --to torch --tp 4 --pp 2
  ckptkit convert Llama-3.1-8B llama-tp4pp2 --to torch --tp 4 --pp 2 --dry-run
  ckptkit convert llama-tp4pp2 llama-pp3 --to torch --pp 3
  ckptkit convert checkpoints/iter_0001000 trained-hf --to hf --hf-reference Llama-3.1-8B
  ckptkit convert model model-bf16 --to hf --dtype bfloat16 --shard-size 5GB --json
  ckptkit convert adapter adapter-tp4 --to torch_dist --tp 4 --hf-reference Llama-3.1-8B
  ckptkit convert Llama-3.1-8B both-tp4 --to torch_dist --tp 4 --adapter adapter"""


def convert(
    src: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="Checkpoint directory of any format, org/model@revision on the hub, or s3://bucket/prefix.",
        ),
    ],
    grid: Grid,
    source: Source,
    execution: Execution,
    form: Form,
    dst: Annotated[
        str | None,
        typer.Argument(
            metavar="DST",
            help=OUT_HELP,
            show_default=False,
        ),
    ] = None,
    to: Annotated[
        str | None,
        choice(
            "--to",
            FORMATS,
            "Format to write: Hugging Face; packed, Megatron's names in unsharded safetensors files; Megatron-LM's"
            " mp_rank files; Megatron-Core's distributed checkpoint; or for an adapter a directory of PEFT. Without it"
            " the command says what SRC is and can become.",
            panel=FORMAT,
            hints=HINTS,
        ),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            "--adapter",
            metavar="ADAPTER",
            help="Write this adapter, of any format, beside the weights, as training with an adapter saves both.",
            rich_help_panel=FORMAT,
        ),
    ] = None,
    part: Annotated[
        str | None,
        choice(
            "--part",
            PARTS,
            "The part to take of a checkpoint that holds an adapter beside the weights.",
            panel=SOURCE,
        ),
    ] = None,
    adapter_layout: Annotated[
        str | None,
        choice(
            "--adapter-layout",
            ADAPTER_LAYOUTS,
            "How an adapter of q, k and v (or gate and up) is named in Megatron: as one (LoRA of Megatron-Bridge, the"
            " default), each for itself (its CanonicalLoRA), or as one under PEFT's names (ms-swift).",
            panel=FORMAT,
        ),
    ] = None,
    lossy: Annotated[
        bool,
        typer.Option(
            "--lossy",
            help="Round the factors of an adapter where Megatron's one scale for all layers asks for it.",
            rich_help_panel=FORMAT,
        ),
    ] = False,
    quantise: Annotated[
        str | None,
        typer.Option(
            "--quantise",
            metavar="fp8-block|fp8-block-ue8m0|mxfp4|int4|original|like:REFERENCE",
            help="Quantise the weights of a Hugging Face output. With original as they were before Megatron, by the"
            " scales that the sidecar keeps, and with like:REFERENCE as a quantised directory has them: what was not"
            " changed keeps its codes and scales.",
            rich_help_panel=FORMAT,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Convert a checkpoint to another format or parallel grid.

    The headers alone decide which byte goes where. The plan is checked, and then the bytes are copied: no model is
    loaded.

    Without --to, nothing is written: the command says what SRC is, and gives a line for each format that it can become.
    The exit code is then 0, or 2 if there is a DST.
    """
    if to is None or dst is None:
        _explain(src, dst, to, source, json)
        return
    from ckptkit.cli import rendering
    from ckptkit.conversion import convert as conversion

    output = execution.output(json)
    parallelism, wanted = grid.parallelism(), form.keywords()
    with output.progress("converting") as progress:
        result = conversion.convert(
            src,
            dst,
            to=to,
            grid=parallelism,
            adapter=adapter,
            adapter_layout=adapter_layout,
            part=part,
            lossy=lossy,
            quantise=quantise,
            progress=progress,
            **wanted,
            **source.keywords(),
            **execution.keywords(),
        )
    output.result(result, rendering.conversion)


def _explain(src: str, dst: str | None, to: str | None, source: Source, json: bool) -> None:
    """Says what a source can become. Where a destination was named, something should have been written there.

    Raises:
        UsageError: Only one of DST and --to is given.
    """
    if to is not None:
        raise UsageError("DST is missing", hint=f"ckptkit convert SRC DST --to {to}")
    if dst is not None:
        what = "--to is missing, nothing was converted"
        raise UsageError(what, hint=f"{shlex.join(['ckptkit', 'convert', src])} says what it can become")
    from ckptkit.cli import rendering
    from ckptkit.conversion.choosing import choices_of

    Output("-" if json else None).result(choices_of(src, **source.keywords()), rendering.choices)


COMMANDS = {"convert": (convert, EXAMPLES)}
