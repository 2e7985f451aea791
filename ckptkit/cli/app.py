"""Commands and their options. What a command does is done elsewhere, and imported only when it runs."""

from __future__ import annotations

import os
from dataclasses import asdict
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ckptkit.cli import looking
from ckptkit.cli.arguments import (
    DryRun,
    FileHashes,
    HfReference,
    Iteration,
    Json,
    MovingThreads,
    Overwrite,
    Resume,
    ShardSize,
    SrcEp,
    SrcEtp,
    SrcFirst,
    SrcLast,
    SrcPp,
    SrcTp,
    SrcVpp,
    VocabSize,
    stated_grid,
)
from ckptkit.cli.exits import EXIT_CODES, EXIT_DIFFERS, Commands
from ckptkit.cli.output import Output
from ckptkit.cli.sizes import parse_size
from ckptkit.cli.split_llama import split_llama
from ckptkit.errors import UsageError
from ckptkit.version import __version__

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXIT_CODES,
)
app.add_typer(split_llama, name="split-llama")


class Target(StrEnum):
    """Formats that can be written."""

    HF = "hf"
    PACKED = "packed"
    TORCH = "torch"
    TORCH_DIST = "torch_dist"


class Experts(StrEnum):
    """Namings of experts in Megatron checkpoints."""

    GROUPED = "grouped"
    SEQUENTIAL = "sequential"


class MegatronModel(StrEnum):
    """Models of Megatron-Core that the same tensors can be written for."""

    GPT = "gpt"
    HYBRID = "hybrid"


class ModelPart(StrEnum):
    """Parts of a multimodal model, and older layouts."""

    FULL = "full"
    TEXT = "text"
    LEGACY = "legacy"


class Head(StrEnum):
    """Heads that can take the place of a language model's."""

    VALUE = "value"


class Level(StrEnum):
    """How far a verification goes."""

    STRUCTURE = "structure"
    WEIGHTS = "weights"
    LOGITS = "logits"


class Device(StrEnum):
    """Where the models run."""

    CPU = "cpu"
    CUDA = "cuda"


class Precision(StrEnum):
    """Element types that the models run in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Replication(StrEnum):
    """Ways to make replicas of a model."""

    DDP = "ddp"
    FSDP2 = "fsdp2"


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    """Model checkpoints between Hugging Face and Megatron layouts: converted byte for byte, and verified."""
    if version:
        typer.echo(f"ckptkit {__version__}")
        raise typer.Exit


CONVERT_EXAMPLES = """\b
Examples:
  ckptkit convert Llama-3.1-8B llama-tp4pp2 --to torch --tp 4 --pp 2
  ckptkit convert Llama-3.1-8B llama-tp4pp2 --to torch --tp 4 --pp 2 --dry-run
  ckptkit convert llama-tp4pp2 llama-pp3 --to torch --pp 3
  ckptkit convert checkpoints/iter_0001000 trained-hf --to hf --hf-reference Llama-3.1-8B
  ckptkit convert model model-bf16 --to hf --dtype bfloat16 --shard-size 5GB --json"""


@app.command(epilog=CONVERT_EXAMPLES)
def convert(
    src: Annotated[
        str, typer.Argument(metavar="SRC", help="Checkpoint directory of any format, or org/model@revision on the hub.")
    ],
    dst: Annotated[str, typer.Argument(metavar="DST", help="Directory to create. It appears complete or not at all.")],
    to: Annotated[
        Target,
        typer.Option(
            help="Format to write: Hugging Face, unsharded Megatron names in safetensors, Megatron-LM's mp_rank"
            " files, or Megatron-Core's distributed checkpoint."
        ),
    ],
    tp: Annotated[
        int,
        typer.Option("--tp", "--tensor-model-parallel-size", metavar="N", help="Tensor model parallel size."),
    ] = 1,
    pp: Annotated[
        int,
        typer.Option("--pp", "--pipeline-model-parallel-size", metavar="N", help="Pipeline model parallel size."),
    ] = 1,
    vpp: Annotated[
        int,
        typer.Option(
            "--vpp",
            "--virtual-pipeline-model-parallel-size",
            metavar="N",
            help="Virtual pipeline size: model chunks on each pipeline rank.",
        ),
    ] = 1,
    ep: Annotated[
        int,
        typer.Option("--ep", "--expert-model-parallel-size", metavar="N", help="Expert model parallel size."),
    ] = 1,
    etp: Annotated[
        int | None,
        typer.Option(
            "--etp",
            "--expert-tensor-parallel-size",
            metavar="N",
            help="Tensor parallel size of experts. Default: that of everything else.",
        ),
    ] = None,
    first_stage_layers: Annotated[
        int | None,
        typer.Option(
            "--decoder-first-pipeline-num-layers",
            "--num-layers-in-first-pipeline-stage",
            metavar="N",
            help="Layers on the first pipeline stage, where the split is uneven.",
        ),
    ] = None,
    last_stage_layers: Annotated[
        int | None,
        typer.Option(
            "--decoder-last-pipeline-num-layers",
            "--num-layers-in-last-pipeline-stage",
            metavar="N",
            help="Layers on the last pipeline stage, where the split is uneven.",
        ),
    ] = None,
    embedding_in_split: Annotated[
        bool,
        typer.Option(
            "--account-for-embedding-in-pipeline-split",
            help="Count the embedding as a layer when splitting.",
        ),
    ] = False,
    loss_in_split: Annotated[
        bool,
        typer.Option(
            "--account-for-loss-in-pipeline-split",
            help="Count the loss as a layer when splitting.",
        ),
    ] = False,
    adapter_first: Annotated[
        bool,
        typer.Option(
            "--adapter-first",
            help="Where two stages part at a split Llama's adapter, it ends the first one; it begins the second by"
            " default, and the narrower stream is sent.",
        ),
    ] = False,
    spec: Annotated[
        str,
        typer.Option(
            metavar="te|local|...",
            help="Whose Megatron names to write: the Transformer Engine spec's, the local spec's, or for some families"
            " another writer's (mbridge, slime, verl).",
        ),
    ] = "te",
    experts: Annotated[
        Experts | None,
        typer.Option(help="Naming of experts: one module for all, or one each. The default goes with the spec."),
    ] = None,
    layout: Annotated[
        ModelPart,
        typer.Option(
            help="All of a multimodal model, or its text part under a text model's names; legacy: the published layout"
            " of a split Llama."
        ),
    ] = ModelPart.FULL,
    text_only: Annotated[bool, typer.Option("--text-only", help="The same as --layout text.")] = False,
    head: Annotated[
        Head | None, typer.Option(help="Put a value head (one output per token) in place of a language model's head.")
    ] = None,
    head_init: Annotated[
        str | None,
        typer.Option(
            metavar="zeros|normal|file:PATH",
            help="What a new head holds: zeros (the default), normal with the deviation that the model was initialised"
            " with, or the head in a safetensors file.",
        ),
    ] = None,
    megatron_model: Annotated[
        MegatronModel,
        typer.Option(
            help="Whose names and arguments Megatron's formats get: GPTModel's, or HybridModel's, which succeeds it in"
            " megatron-core 0.19. Either is recognised on reading."
        ),
    ] = MegatronModel.GPT,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            help="Cast floating-point tensors: float32, bfloat16 or float16. The default keeps every bit.",
        ),
    ] = None,
    shard_size: ShardSize = None,
    make_vocab_size_divisible_by: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Pad the vocabulary to a multiple of this times TP, as Megatron-LM does. Default: 128 (packed: 1).",
        ),
    ] = None,
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
    strict_config: Annotated[
        bool, typer.Option("--strict-config", help="Refuse config features that Megatron's arguments cannot express.")
    ] = False,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
    threads: MovingThreads = None,
    hash: FileHashes = False,
    json: Json = False,
) -> None:
    """Convert a checkpoint to another format or parallel grid.

    Nothing is loaded: the headers say which byte goes where, the plan is checked, and the bytes are copied.
    """
    from ckptkit.cli import rendering
    from ckptkit.conversion import convert as conversion
    from ckptkit.sharding.grid import Parallelism

    if text_only and layout not in (ModelPart.FULL, ModelPart.TEXT):
        raise UsageError(f"--text-only and --layout {layout.value} exclude each other", hint="pass one of them")
    output = Output("-" if json else None)
    stored = stated_grid(src_tp, src_pp, src_vpp, src_ep, src_etp, src_first_stage_layers, src_last_stage_layers)
    grid = Parallelism(
        tp, pp, vpp, first_stage_layers, last_stage_layers, embedding_in_split, loss_in_split, ep, etp, adapter_first
    )
    with output.progress("converting") as progress:
        result = conversion.convert(
            src,
            dst,
            to=to.value,
            grid=grid,
            spec=spec,
            experts=None if experts is None else experts.value,
            layout=ModelPart.TEXT.value if text_only else layout.value,
            head=None if head is None else head.value,
            head_init=head_init,
            megatron_model=megatron_model.value,
            dtype=dtype,
            shard_size=None if shard_size is None else parse_size(shard_size),
            make_vocab_size_divisible_by=make_vocab_size_divisible_by,
            hf_reference=hf_reference,
            iteration=iteration,
            stored_grid=stored,
            vocab_size=vocab_size,
            strict_config=strict_config,
            dry_run=dry_run,
            overwrite=overwrite,
            resume=resume,
            threads=threads,
            hash=hash,
            progress=progress,
        ).to_dict()
    output.result(result, partial(rendering.conversion, result))


app.command(epilog=looking.INSPECT_EXAMPLES)(looking.inspect)
app.command(epilog=looking.DIFF_EXAMPLES)(looking.diff)
app.command(epilog=looking.VALIDATE_EXAMPLES)(looking.validate)
app.command("hash", epilog=looking.HASH_EXAMPLES)(looking.hash_)


VERIFY_EXAMPLES = """\b
Examples:
  ckptkit verify Llama-3.1-8B llama-tp4pp2
  ckptkit verify Llama-3.1-8B llama-tp4pp2 --level weights
  ckptkit verify Llama-3.1-8B llama-tp4pp2 --device cuda --dtype bfloat16
  ckptkit verify Llama-3.1-8B llama-tp4pp2 --prompt "The capital of France is" --json report.json
  ckptkit verify Llama-3.1-8B llama-tp4pp2 --junit report.xml --html report.html
  ckptkit verify Llama-3.1-8B llama-tp4pp2 --packed --sequence-parallel --dp 2
  ckptkit verify Llama-3.1-8B llama-tp4pp2 --tokens tokens.json --save-logits logits.safetensors"""


@app.command(epilog=VERIFY_EXAMPLES)
def verify(
    reference: Annotated[str, typer.Argument(metavar="REFERENCE", help="Checkpoint to trust, of any format.")],
    candidate: Annotated[str, typer.Argument(metavar="CANDIDATE", help="Checkpoint to question, of any format.")],
    level: Annotated[
        Level, typer.Option(help="Names and shapes; or also every byte; or also what the loaded models compute.")
    ] = Level.LOGITS,
    device: Annotated[Device, typer.Option(help="Where both models run.")] = Device.CPU,
    dtype: Annotated[Precision, typer.Option(help="What the candidate runs in.")] = Precision.FLOAT32,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Compare on this text; may be given several times.")
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Compare on these token ids: a JSON list of lists.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0.0, metavar="X", help="Largest float32 difference of two logits that passes, over the largest logit."
        ),
    ] = None,
    packed: Annotated[
        bool, typer.Option("--packed", help="Run the candidate on rows packed together, as models are trained.")
    ] = False,
    sequence_parallel: Annotated[
        bool,
        typer.Option("--sequence-parallel", help="Split the candidate's sequence over its tensor parallel ranks."),
    ] = False,
    dp: Annotated[
        int, typer.Option(metavar="N", help="Run N replicas of the candidate's grid, which must compute the same.")
    ] = 1,
    dp_kind: Annotated[
        Replication, typer.Option(help="What makes replicas: megatron-core's DistributedDataParallel, or FSDP2.")
    ] = Replication.DDP,
    replay: Annotated[
        bool,
        typer.Option(
            "--replay/--no-replay",
            help="Send the candidate's tokens to the experts that the reference chose, and judge routers apart.",
        ),
    ] = True,
    timeout: Annotated[
        float | None,
        typer.Option(
            min=1.0, metavar="SECONDS", help="Longest that a side may run on Megatron ranks, loading included: 3600."
        ),
    ] = None,
    save_logits: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Keep both sides' logits (safetensors: reference, candidate)."),
    ] = None,
    json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON; - is stdout.")
    ] = None,
    junit: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the report as JUnit XML, a test case per check.")
    ] = None,
    html: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the report as a page with charts and the map of ranks.")
    ] = None,
) -> None:
    """Prove that two checkpoints are the same model.

    The exit code is 0 if they are and 1 if they differ.

    The candidate's shards are loaded strictly into megatron-core's own modules, one process for each rank of its
    grid (or in the ranks of the torchrun that started this), and compared with transformers at every position.
    """
    from ckptkit import verification
    from ckptkit.verification.ranks.jobs import TIMEOUT
    from ckptkit.verification.reports.writing import check_places, errors_reported, write_reports

    if prompt and tokens:
        raise UsageError("--prompt and --tokens exclude each other", hint="pass one of them")
    output = Output(json)
    check_places(json, junit, html, save_logits)
    speaks = os.environ.get("RANK", "0") == "0"
    with errors_reported(junit if speaks else None, reference, candidate), output.progress("verifying") as progress:
        report = verification.verify(
            reference,
            candidate,
            level=level.value,
            device=device.value,
            dtype=dtype.value,
            prompts=prompt or None,
            tokens=_read_tokens(tokens),
            tolerance=tolerance,
            replay=replay,
            packed=packed,
            sequence_parallel=sequence_parallel,
            dp=dp,
            dp_kind=dp_kind.value,
            save_logits=save_logits,
            timeout=TIMEOUT if timeout is None else timeout,
            progress=progress,
        )
    if speaks:
        from ckptkit.verification.reports.report import render

        write_reports(report, junit=junit, html=html)
        output.result(report.to_dict(), lambda console: console.print(render(report)))
    if not report.passed:
        raise typer.Exit(EXIT_DIFFERS)


@app.command(
    epilog="""\b
Examples:
  ckptkit families
  ckptkit families --json"""
)
def families(json: Json = False) -> None:
    """List the supported architectures and their formats."""
    from ckptkit.cli import rendering
    from ckptkit.conversion.architectures import supported_architectures

    supported = [asdict(architecture) for architecture in supported_architectures()]
    Output("-" if json else None).result(supported, partial(rendering.architectures, supported))


def _read_tokens(path: Path | None) -> list[list[int]] | None:
    if path is None:
        return None
    from ckptkit.verification.tokens import read_rows

    return read_rows(path)
