"""`ckptkit convert`: its options, and the call."""

from __future__ import annotations

from typing import Annotated

import typer

from ckptkit.cli.choices import EXPERTS, FORMATS, PARTS
from ckptkit.cli.options import (
    FORMAT,
    SOURCE,
    Execution,
    Grid,
    Json,
    ShardSize,
    Source,
    Spec,
    VocabDivisibility,
    alternatives,
    choice,
)
from ckptkit.cli.output import Output
from ckptkit.conversion.options import CASTS, FULL, LAYOUTS, TEXT, VALUE
from ckptkit.errors import UsageError
from ckptkit.sizes import parse_size
from ckptkit.tables.hybrid_names import GPT, MODELS
from ckptkit.tables.lora import LAYOUTS as ADAPTER_LAYOUTS

_MEGATRON = "Megatron's formats are torch (mp_rank files of Megatron-LM) and torch_dist (distributed checkpoints)"
HINTS = {
    **dict.fromkeys(("megatron", "Megatron", "mcore", "megatron-core", "megatron-lm", "meg"), _MEGATRON),
    **dict.fromkeys(("huggingface", "hugging-face", "transformers", "safetensors"), "Hugging Face's format is hf"),
    **dict.fromkeys(("dist", "torch-dist", "dcp", "torchdist"), "distributed checkpoints are torch_dist"),
}
"""Words that users try for `--to`, and the hint they get."""

EXAMPLES = """\b
Examples:
  ckptkit convert Llama-3.1-8B llama-tp4pp2 --to torch --tp 4 --pp 2
  ckptkit convert Llama-3.1-8B llama-tp4pp2 --to torch --tp 4 --pp 2 --dry-run
  ckptkit convert llama-tp4pp2 llama-pp3 --to torch --pp 3
  ckptkit convert checkpoints/iter_0001000 trained-hf --to hf --hf-reference Llama-3.1-8B
  ckptkit convert model model-bf16 --to hf --dtype bfloat16 --shard-size 5GB --json
  ckptkit convert adapter adapter-tp4 --to torch_dist --tp 4 --hf-reference Llama-3.1-8B
  ckptkit convert Llama-3.1-8B both-tp4 --to torch_dist --tp 4 --adapter adapter"""


def convert(
    src: Annotated[
        str, typer.Argument(metavar="SRC", help="Checkpoint directory of any format, or org/model@revision on the hub.")
    ],
    dst: Annotated[str, typer.Argument(metavar="DST", help="Directory to create. It appears complete or not at all.")],
    to: Annotated[
        str,
        choice(
            "--to",
            FORMATS,
            "Format to write: Hugging Face; packed, Megatron's names in unsharded safetensors files; Megatron-LM's"
            " mp_rank files; Megatron-Core's distributed checkpoint; or for an adapter a directory of PEFT.",
            panel=FORMAT,
            hints=HINTS,
        ),
    ],
    grid: Grid,
    source: Source,
    execution: Execution,
    spec: Spec = "te",
    experts: Annotated[
        str | None,
        choice(
            "--experts",
            EXPERTS,
            "Naming of experts: one module for all, or one each. The default goes with the spec.",
            panel=FORMAT,
        ),
    ] = None,
    layout: Annotated[
        str,
        choice(
            "--layout",
            LAYOUTS,
            "The full model; the text part of a multimodal model, under the names of a text model; or the published"
            " layout of a split Llama.",
            panel=FORMAT,
        ),
    ] = FULL,
    text_only: Annotated[
        bool, typer.Option("--text-only", help="The same as --layout text.", rich_help_panel=FORMAT)
    ] = False,
    head: Annotated[
        str | None,
        choice(
            "--head",
            (VALUE,),
            "Put a value head (one output per token) in place of a language model's head.",
            panel=FORMAT,
        ),
    ] = None,
    head_init: Annotated[
        str | None,
        typer.Option(
            metavar="zeros|normal|file:PATH",
            help="Weights of the new head: zeros (the default), normal with the standard deviation in config.json, or"
            " those in a safetensors file.",
            rich_help_panel=FORMAT,
        ),
    ] = None,
    megatron_model: Annotated[
        str,
        choice(
            "--megatron-model",
            MODELS,
            "The model class whose names and arguments Megatron formats get: GPTModel, or its successor since"
            " megatron-core 0.19, HybridModel. Reading recognises both.",
            panel=FORMAT,
        ),
    ] = GPT,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            help=f"Cast floating-point tensors: {alternatives(CASTS)}. The default keeps every bit.",
            rich_help_panel=FORMAT,
        ),
    ] = None,
    shard_size: ShardSize = None,
    make_vocab_size_divisible_by: VocabDivisibility = None,
    strict_config: Annotated[
        bool,
        typer.Option(
            "--strict-config",
            help="Refuse config features that Megatron's arguments cannot express.",
            rich_help_panel=FORMAT,
        ),
    ] = False,
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
            "The part to take of a Megatron checkpoint that holds an adapter beside the weights.",
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
    json: Json = False,
) -> None:
    """Convert a checkpoint to another format or parallel grid.

    The headers alone decide which byte goes where. The plan is checked, and then the bytes are copied: no model is
    loaded.
    """
    from ckptkit.cli import rendering
    from ckptkit.conversion import convert as conversion

    if text_only and layout not in (FULL, TEXT):
        raise UsageError(f"--text-only and --layout {layout} exclude each other", hint="pass one of them")
    output = Output("-" if json else None)
    parallelism = grid.parallelism()
    with output.progress("converting") as progress:
        result = conversion.convert(
            src,
            dst,
            to=to,
            grid=parallelism,
            spec=spec,
            experts=experts,
            layout=TEXT if text_only else layout,
            head=head,
            head_init=head_init,
            megatron_model=megatron_model,
            dtype=dtype,
            shard_size=None if shard_size is None else parse_size(shard_size),
            make_vocab_size_divisible_by=make_vocab_size_divisible_by,
            strict_config=strict_config,
            adapter=adapter,
            adapter_layout=adapter_layout,
            part=part,
            lossy=lossy,
            progress=progress,
            **source.keywords(),
            **vars(execution),
        )
    output.result(result, rendering.conversion)
