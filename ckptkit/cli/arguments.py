"""Options that several commands share, as typer reads them."""

from __future__ import annotations

from typing import Annotated

import typer

from ckptkit.sharding.grid import StatedGrid

Json = Annotated[bool, typer.Option("--json", help="Print the result, or the error, as JSON on stdout.")]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, metavar="N", help="Threads that read. Default: one for each core.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the complete plan; write nothing.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the destination if it exists, in one step.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from where a killed run stopped.")]
MovingThreads = Annotated[
    int | None,
    typer.Option("--threads", min=1, metavar="N", help="Threads that move bytes; any number gives the same result."),
]
FileHashes = Annotated[bool, typer.Option("--hash", help="Also give the SHA-256 of every written file.")]
ShardSize = Annotated[
    str | None,
    typer.Option(
        "--shard-size",
        metavar="SIZE",
        help="Largest safetensors file, e.g. 5GB. The default keeps the files of a source that has some, or is 5GB.",
    ),
]
HfReference = Annotated[
    str | None,
    typer.Option(
        "--hf-reference",
        metavar="DIR",
        help="Hugging Face directory that supplies config, tokenizer and shard names to a Megatron checkpoint.",
    ),
]
Iteration = Annotated[
    int | None,
    typer.Option("--iteration", min=0, metavar="N", help="Iteration to read. Default: what the tracker file names."),
]
VocabSize = Annotated[
    int | None,
    typer.Option(
        "--vocab-size",
        min=1,
        metavar="N",
        help="True size of the vocabulary, where nothing else tells it from its padding.",
    ),
]


def _size(option: str, what: str) -> typer.models.OptionInfo:
    """An option for a size of the stored grid."""
    found: typer.models.OptionInfo = typer.Option(
        option, min=1, metavar="N", help=f"{what} of mp_rank files whose args do not say it."
    )
    return found


SrcTp = Annotated[int | None, _size("--src-tp", "Tensor model parallel size")]
SrcPp = Annotated[int | None, _size("--src-pp", "Pipeline model parallel size")]
SrcVpp = Annotated[int | None, _size("--src-vpp", "Virtual pipeline size")]
SrcEp = Annotated[int | None, _size("--src-ep", "Expert model parallel size")]
SrcEtp = Annotated[int | None, _size("--src-etp", "Expert tensor parallel size")]
SrcFirst = Annotated[int | None, _size("--src-first-stage-layers", "Layers on the first pipeline stage")]
SrcLast = Annotated[int | None, _size("--src-last-stage-layers", "Layers on the last pipeline stage")]


def stated_grid(
    tp: int | None,
    pp: int | None,
    vpp: int | None,
    ep: int | None,
    etp: int | None,
    first_stage_layers: int | None,
    last_stage_layers: int | None,
) -> StatedGrid:
    """What the `--src` options say."""
    return StatedGrid(tp, pp, vpp, ep, etp, first_stage_layers, last_stage_layers)
