"""Options that several commands share, as typer reads them."""

from __future__ import annotations

from typing import Annotated

import typer

from ckptkit.sharding.grid import StatedGrid

Json = Annotated[bool, typer.Option("--json", help="Print the result, or the error, as JSON on stdout.")]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, metavar="N", help="Threads that read. Default: one for each core.")
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
