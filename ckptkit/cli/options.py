"""Options that several commands share, each declared once."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckptkit.cli.choices import (
    CASTS,
    CORE_0_16,
    EXPERTS,
    FULL,
    GPT,
    HEADS,
    LAYOUTS,
    MEGATRON_MODELS,
    RELEASES,
    TEXT,
)
from ckptkit.cli.exits import arguments_of_command
from ckptkit.cli.output import Output
from ckptkit.errors import UsageError
from ckptkit.io.world import World
from ckptkit.sharding.grid import Parallelism, StatedGrid
from ckptkit.sizes import parse_size

if TYPE_CHECKING:
    from ckptkit.conversion.options import Options

FORMAT, GRID, SOURCE, EXECUTION, OUTPUT = "Format", "Parallel grid", "Source", "Execution", "Output"
"""Headings in the help."""


def choice(
    name: str, values: Sequence[str], help: str, *, panel: str | None = None, hints: Mapping[str, str] | None = None
) -> Any:
    """An option that takes one of some words.

    Args:
        name: The option, for example `--to`.
        values: The words.
        help: Its help text.
        panel: Its heading in the help.
        hints: Wrong words -> the hint that the error gives.
    """

    def parse(text: str) -> str:
        if text in values:
            return text
        close = difflib.get_close_matches(text, values, 1)
        hint = (hints or {}).get(text) or (f"did you mean {close[0]}?" if close else f"choose {alternatives(values)}")
        raise UsageError(f"there is no {text!r}", where=name, hint=hint)

    return typer.Option(
        name,
        parser=parse,
        metavar="|".join(values),
        autocompletion=lambda incomplete: [value for value in values if value.startswith(incomplete)],
        help=help,
        rich_help_panel=panel,
    )


def alternatives(values: Sequence[str]) -> str:
    """Words as a list in a sentence: `a, b or c`."""
    *others, last = values
    return f"{', '.join(others)} or {last}" if others else last


OUT_HELP = "Directory to create, which appears complete or not at all; or s3://BUCKET/PREFIX."
Out = Annotated[str, typer.Option("-o", "--out", metavar="OUT", help=OUT_HELP)]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print the result, or the error, as JSON on stdout.", rich_help_panel=OUTPUT),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        metavar="N",
        help="Threads that read. Default: one for each core.",
        rich_help_panel=EXECUTION,
    ),
]
Spec = Annotated[
    str,
    typer.Option(
        "--spec",
        metavar="te|local|...",
        help="Whose Megatron names to write: the Transformer Engine spec's, the local spec's, or for some families"
        " another writer's (mbridge, slime, verl).",
        rich_help_panel=FORMAT,
    ),
]
VocabDivisibility = Annotated[
    int | None,
    typer.Option(
        "--make-vocab-size-divisible-by",
        metavar="N",
        help="Pad the vocabulary to a multiple of N times TP, as Megatron-LM does. Default: 128 (--to packed: 1).",
        rich_help_panel=FORMAT,
    ),
]
ShardSize = Annotated[
    str | None,
    typer.Option(
        "--shard-size",
        metavar="SIZE",
        help="Largest safetensors file, e.g. 5GB. Default: the source's own files, or 5GB if it has none.",
        rich_help_panel=FORMAT,
    ),
]

Experts = Annotated[
    str | None,
    choice(
        "--experts",
        EXPERTS,
        "Naming of experts: one module for all, or one each. The default goes with the spec.",
        panel=FORMAT,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help=f"Cast floating-point tensors: {alternatives(CASTS)}. The default keeps every bit.",
        rich_help_panel=FORMAT,
    ),
]


@dataclass(frozen=True)
class Form:
    """What is written of a model, beside its format and grid."""

    spec: Spec = "te"
    experts: Experts = None
    layout: Annotated[
        str,
        choice(
            "--layout",
            LAYOUTS,
            "The full model; the text part of a multimodal model, under the names of a text model; or the published"
            " layout of a split Llama.",
            panel=FORMAT,
        ),
    ] = FULL
    text_only: Annotated[
        bool, typer.Option("--text-only", help="The same as --layout text.", rich_help_panel=FORMAT)
    ] = False
    head: Annotated[
        str | None,
        choice(
            "--head",
            HEADS,
            "Put a value head (one output per token) in place of a language model's head.",
            panel=FORMAT,
        ),
    ] = None
    head_init: Annotated[
        str | None,
        typer.Option(
            metavar="zeros|normal|file:PATH",
            help="Weights of the new head: zeros (the default), normal with the standard deviation in config.json, or"
            " those in a safetensors file.",
            rich_help_panel=FORMAT,
        ),
    ] = None
    megatron_model: Annotated[
        str,
        choice(
            "--megatron-model",
            MEGATRON_MODELS,
            "The model class whose names and arguments Megatron formats get: GPTModel, or its successor since"
            " megatron-core 0.19, HybridModel. Reading recognises both.",
            panel=FORMAT,
        ),
    ] = GPT
    megatron_core: Annotated[
        str,
        choice(
            "--megatron-core",
            RELEASES,
            "The release of megatron-core whose names files of ranks get. Since 0.19 layers of multi-token prediction"
            " have others. Reading recognises both.",
            panel=FORMAT,
        ),
    ] = CORE_0_16
    dtype: Dtype = None
    shard_size: ShardSize = None
    make_vocab_size_divisible_by: VocabDivisibility = None
    strict_config: Annotated[
        bool,
        typer.Option(
            "--strict-config",
            help="Refuse config features that Megatron's arguments cannot express.",
            rich_help_panel=FORMAT,
        ),
    ] = False

    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of `convert`.

        Raises:
            UsageError: A size is none, or two options exclude each other.
        """
        if self.text_only and self.layout not in (FULL, TEXT):
            raise UsageError(f"--text-only and --layout {self.layout} exclude each other", hint="pass one of them")
        given = {name: value for name, value in vars(self).items() if name != "text_only"}
        given["layout"] = TEXT if self.text_only else self.layout
        given["shard_size"] = None if self.shard_size is None else parse_size(self.shard_size)
        return given

    def options(self, grid: Parallelism) -> Options:
        """The same as `Options`.

        Raises:
            UsageError: As `keywords`; or no type has the name.
        """
        from ckptkit.conversion.options import Options, dtype_called

        return Options(grid=grid, **{**self.keywords(), "dtype": dtype_called(self.dtype)})


@dataclass(frozen=True)
class Execution:
    """How a plan is carried out."""

    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the complete plan; write nothing.", rich_help_panel=EXECUTION)
    ] = False
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace the destination if it exists, in one step.", rich_help_panel=EXECUTION
        ),
    ] = False
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue where a killed run stopped.", rich_help_panel=EXECUTION)
    ] = False
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            min=1,
            metavar="N",
            help="Threads that move bytes; any number gives the same result. Default: one for each core, 4 to 8.",
            rich_help_panel=EXECUTION,
        ),
    ] = None
    hash: Annotated[
        bool, typer.Option("--hash", help="Also give the SHA-256 of every written file.", rich_help_panel=EXECUTION)
    ] = False
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Share the work among tasks on a Ray cluster: auto, HOST:PORT or ray://HOST:PORT. All nodes need one"
            " file system.",
            rich_help_panel=EXECUTION,
        ),
    ] = None
    ray_processes: Annotated[
        int | None,
        typer.Option(
            "--ray-processes",
            min=1,
            metavar="N",
            help="Processes on the Ray cluster. Default: one for each node.",
            rich_help_panel=EXECUTION,
        ),
    ] = None

    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of everything that carries out a plan; the world is that of the launcher.

        Raises:
            UsageError: The environment describes no world.
        """
        given = {name: value for name, value in vars(self).items() if not name.startswith("ray")}
        return {**given, "world": World.of()}

    def output(self, json: bool) -> Output:
        """The output of a command that carries out a plan: rank 0 speaks for all.

        With `--ray`, and unless it is one of the ranks already, this process becomes their launcher here.

        Raises:
            UsageError: The environment describes no world; or there is no Ray cluster.
            StorageError: Tasks on a Ray cluster were lost time and again.
            typer.Exit: The ranks on a Ray cluster have ended.
        """
        self._launch()
        return Output("-" if json else None, shown=World.of().first)

    def _launch(self) -> None:
        if self.ray is None:
            if self.ray_processes is not None:
                raise UsageError("it needs --ray ADDRESS", where="--ray-processes")
            return
        from ckptkit.cli.on_ray import LAUNCHED, run_on_ray

        if self.dry_run or LAUNCHED in os.environ:
            return
        if World.of().size > 1:
            raise UsageError("another launcher has started this process", where="--ray", hint="use one of them")
        raise typer.Exit(run_on_ray(self.ray, self.ray_processes, arguments_of_command()))


def _size(option: str, what: str) -> Any:
    """An option for a size of the stored grid."""
    return typer.Option(
        option,
        min=1,
        metavar="N",
        help=f"{what} of mp_rank files without it in their args.",
        rich_help_panel=SOURCE,
    )


@dataclass(frozen=True)
class Source:
    """Facts that the user states about a checkpoint that does not describe itself in full."""

    hf_reference: Annotated[
        str | None,
        typer.Option(
            "--hf-reference",
            metavar="DIR",
            help="Hugging Face directory that supplies config, tokenizer and shard names to a Megatron checkpoint.",
            rich_help_panel=SOURCE,
        ),
    ] = None
    iteration: Annotated[
        int | None,
        typer.Option(
            "--iteration",
            min=0,
            metavar="N",
            help="Iteration to read. Default: the one in the tracker file.",
            rich_help_panel=SOURCE,
        ),
    ] = None
    vocab_size: Annotated[
        int | None,
        typer.Option(
            "--vocab-size",
            min=1,
            metavar="N",
            help="True size of the vocabulary, for a checkpoint that does not record it beside the padding.",
            rich_help_panel=SOURCE,
        ),
    ] = None
    lora_alpha: Annotated[
        float | None,
        typer.Option(
            "--lora-alpha",
            metavar="ALPHA",
            help="Alpha of a Megatron adapter that does not record it.",
            rich_help_panel=SOURCE,
        ),
    ] = None
    src_tp: Annotated[int | None, _size("--src-tp", "Tensor model parallel size")] = None
    src_pp: Annotated[int | None, _size("--src-pp", "Pipeline model parallel size")] = None
    src_vpp: Annotated[int | None, _size("--src-vpp", "Virtual pipeline size")] = None
    src_ep: Annotated[int | None, _size("--src-ep", "Expert model parallel size")] = None
    src_etp: Annotated[int | None, _size("--src-etp", "Expert tensor parallel size")] = None
    src_first_stage_layers: Annotated[
        int | None, _size("--src-first-stage-layers", "Layers on the first pipeline stage")
    ] = None
    src_last_stage_layers: Annotated[
        int | None, _size("--src-last-stage-layers", "Layers on the last pipeline stage")
    ] = None
    src_pipeline_layout: Annotated[
        str | None,
        typer.Option(
            "--src-pipeline-layout",
            metavar="LAYOUT",
            help="Pipeline layout, such as Et|ttL, where args do not record it.",
            rich_help_panel=SOURCE,
        ),
    ] = None

    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of `open_checkpoint`."""
        return {
            "hf_reference": self.hf_reference,
            "iteration": self.iteration,
            "vocab_size": self.vocab_size,
            "lora_alpha": self.lora_alpha,
            "stored_grid": StatedGrid(
                self.src_tp,
                self.src_pp,
                self.src_vpp,
                self.src_ep,
                self.src_etp,
                self.src_first_stage_layers,
                self.src_last_stage_layers,
                self.src_pipeline_layout,
            ),
        }


@dataclass(frozen=True)
class Grid:
    """The parallel grid that is written."""

    tp: Annotated[
        int,
        typer.Option(
            "--tp",
            "--tensor-model-parallel-size",
            metavar="N",
            help="Tensor model parallel size.",
            rich_help_panel=GRID,
        ),
    ] = 1
    pp: Annotated[
        int,
        typer.Option(
            "--pp",
            "--pipeline-model-parallel-size",
            metavar="N",
            help="Pipeline model parallel size.",
            rich_help_panel=GRID,
        ),
    ] = 1
    vpp: Annotated[
        int,
        typer.Option(
            "--vpp",
            "--virtual-pipeline-model-parallel-size",
            metavar="N",
            help="Virtual pipeline size: model chunks on each pipeline rank.",
            rich_help_panel=GRID,
        ),
    ] = 1
    ep: Annotated[
        int,
        typer.Option(
            "--ep",
            "--expert-model-parallel-size",
            metavar="N",
            help="Expert model parallel size.",
            rich_help_panel=GRID,
        ),
    ] = 1
    etp: Annotated[
        int | None,
        typer.Option(
            "--etp",
            "--expert-tensor-parallel-size",
            metavar="N",
            help="Tensor parallel size of experts. Default: the value of --tp.",
            rich_help_panel=GRID,
        ),
    ] = None
    first_stage_layers: Annotated[
        int | None,
        typer.Option(
            "--decoder-first-pipeline-num-layers",
            "--num-layers-in-first-pipeline-stage",
            metavar="N",
            help="Layers on the first pipeline stage, where the split is uneven.",
            rich_help_panel=GRID,
        ),
    ] = None
    last_stage_layers: Annotated[
        int | None,
        typer.Option(
            "--decoder-last-pipeline-num-layers",
            "--num-layers-in-last-pipeline-stage",
            metavar="N",
            help="Layers on the last pipeline stage, where the split is uneven.",
            rich_help_panel=GRID,
        ),
    ] = None
    embedding_in_split: Annotated[
        bool,
        typer.Option(
            "--account-for-embedding-in-pipeline-split",
            help="Count the embedding as a layer when splitting.",
            rich_help_panel=GRID,
        ),
    ] = False
    loss_in_split: Annotated[
        bool,
        typer.Option(
            "--account-for-loss-in-pipeline-split",
            help="Count the loss as a layer when splitting.",
            rich_help_panel=GRID,
        ),
    ] = False
    pipeline_layout: Annotated[
        str | None,
        typer.Option(
            "--pipeline-model-parallel-layout",
            metavar="LAYOUT",
            help="What each pipeline stage holds, such as Et*3|(tt|)*2tL: the embedding (E), layers (t), the loss (L).",
            rich_help_panel=GRID,
        ),
    ] = None
    adapter_first: Annotated[
        bool,
        typer.Option(
            "--adapter-first",
            help="Where two stages meet at a split Llama's adapter, put it at the end of the earlier stage. By default"
            " it begins the later stage, and the narrow stream is sent.",
            rich_help_panel=GRID,
        ),
    ] = False

    def parallelism(self) -> Parallelism:
        """The grid.

        Raises:
            UsageError: There is no such grid.
        """
        return Parallelism(**vars(self))
