"""`ckptkit surgery`: models made of models; the options of its commands, and the calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from ckptkit.cli.choices import MODEL_FORMATS, NEW_ROWS, PRECISIONS
from ckptkit.cli.convert import HINTS
from ckptkit.cli.options import FORMAT, SOURCE, Execution, Form, Grid, Json, Out, Source, choice
from ckptkit.errors import UsageError

OPERATION = "Operation"
"""Heading in the help."""

AVERAGE_EXAMPLES = """\b
Examples:
  ckptkit surgery average run-a run-b run-c -o mean --weights 0.5,0.3,0.2
  ckptkit surgery average checkpoints --iterations 1000,2000,3000 -o mean --hf-reference Llama-3.1-8B
  ckptkit surgery average checkpoints --last 5 --decay ema:0.9 -o mean --to torch --tp 4"""

SLICE_EXAMPLES = """\b
Examples:
  ckptkit surgery slice Llama-3.1-8B -o pruned --layers 0-15,24-31
  ckptkit surgery slice Llama-3.1-8B -o pruned --drop 20-27 --to torch_dist --tp 2"""

STACK_EXAMPLES = """\b
Examples:
  ckptkit surgery stack Mistral-7B:0-23 Zephyr-7B:8-31 -o upscaled"""

MERGE_EXAMPLES = """\b
Examples:
  ckptkit surgery merge ties.yaml -o merged
  ckptkit surgery merge slerp.yaml -o merged-tp4 --to torch --tp 4 --dtype bfloat16"""

RESIZE_EXAMPLES = """\b
Examples:
  ckptkit surgery resize-vocab Llama-3.1-8B -o larger --tokenizer my-tokenizer --new-rows pieces
  ckptkit surgery resize-vocab Llama-3.1-8B -o larger --size 128320 --to torch --tp 4"""


@dataclass(frozen=True)
class Written:
    """What an operation writes, beside the form of the model."""

    out: Out
    to: Annotated[
        str, choice("--to", MODEL_FORMATS, "Format to write, as for convert. Default: hf.", panel=FORMAT, hints=HINTS)
    ] = "hf"
    hash_inputs: Annotated[
        bool,
        typer.Option(
            "--hash-inputs",
            help="Also record the SHA-256 of every file that weights come from. They are read for it.",
            rich_help_panel=SOURCE,
        ),
    ] = False

    def output(self, form: Form, grid: Grid) -> Any:
        """The `Output` of an operation."""
        from ckptkit.editing.commands import Output as Requested

        return Requested(self.out, self.to, form.options(grid.parallelism()), self.hash_inputs)


AcceptDifferences = Annotated[
    bool,
    typer.Option(
        "--accept-differences",
        help="Go on if settings differ that no stored byte depends on (ropes, epsilons, windows).",
        rich_help_panel=OPERATION,
    ),
]


DropPrediction = Annotated[
    bool,
    typer.Option(
        "--drop-prediction",
        help="Leave out layers of multi-token prediction.",
        rich_help_panel=OPERATION,
    ),
]


def average(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Checkpoints of any formats, or the root of one run.")
    ],
    written: Written,
    form: Form,
    grid: Grid,
    source: Source,
    execution: Execution,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="W,W,...",
            help="A weight for each; divided by their sum. Default: equal.",
            rich_help_panel=OPERATION,
        ),
    ] = None,
    iterations: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Iterations of one Megatron run to average.", rich_help_panel=OPERATION),
    ] = None,
    last: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="The same for its latest N iterations.", rich_help_panel=OPERATION),
    ] = None,
    decay: Annotated[
        str | None,
        typer.Option(
            metavar="uniform|ema:D|linear|sqrt",
            help="Weights by age, the first being the oldest: equal; a moving average that keeps D at each step; k or"
            " its square root for the k-th.",
            rich_help_panel=OPERATION,
        ),
    ] = None,
    precision: Annotated[
        str | None,
        choice(
            "--precision",
            PRECISIONS,
            "Type of the sums, before they are rounded once. Default: float64 for results of 32 bits or more.",
            panel=OPERATION,
        ),
    ] = None,
    accept_differences: AcceptDifferences = False,
    drop_prediction: DropPrediction = False,
    json: Json = False,
) -> None:
    """Average models of any formats, or the iterations of one run.

    The sums are made tile by tile, and rounded once. No model is loaded. Config and tokenizer are those of the first.
    """
    from ckptkit.editing import commands

    _carry_out(
        "averaging",
        commands.average,
        models,
        weights=None if weights is None else _numbers(weights, float, "--weights"),
        iterations=None if iterations is None else _numbers(iterations, int, "--iterations"),
        last=last,
        decay=decay,
        precision=precision,
        accept_differences=accept_differences,
        drop_prediction=drop_prediction,
        output=written.output(form, grid),
        source=source,
        execution=execution,
        json=json,
    )


def slice_(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint of any format.")],
    written: Written,
    form: Form,
    grid: Grid,
    source: Source,
    execution: Execution,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="The new layers in their order, as in 0-15,24-31. A layer may come twice.",
            rich_help_panel=OPERATION,
        ),
    ] = None,
    drop: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="The layers to leave out, instead.", rich_help_panel=OPERATION),
    ] = None,
    drop_prediction: DropPrediction = False,
    json: Json = False,
) -> None:
    """Keep, drop, repeat or reorder layers.

    Every tensor is a copy. config.json follows: windows, types of layers, experts, shared keys and values. Layers that
    it cannot describe are refused.
    """
    from ckptkit.editing import commands

    _carry_out(
        "slicing",
        commands.slice_layers,
        model,
        layers=layers,
        drop=drop,
        drop_prediction=drop_prediction,
        output=written.output(form, grid),
        source=source,
        execution=execution,
        json=json,
    )


def stack(
    parts: Annotated[
        list[str],
        typer.Argument(metavar="MODEL[:LAYERS]...", help="Models of equal sizes, each with the layers to take."),
    ],
    written: Written,
    form: Form,
    grid: Grid,
    source: Source,
    execution: Execution,
    accept_differences: AcceptDifferences = False,
    drop_prediction: DropPrediction = False,
    json: Json = False,
) -> None:
    """Join layers of several models of equal sizes.

    Every tensor is a copy. Embedding, config and tokenizer are those of the first model, last norm and head those of
    the last.
    """
    from ckptkit.editing import commands

    _carry_out(
        "stacking",
        commands.stack_layers,
        parts,
        accept_differences=accept_differences,
        drop_prediction=drop_prediction,
        output=written.output(form, grid),
        source=source,
        execution=execution,
        json=json,
    )


def merge(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A file of mergekit's YAML.")],
    written: Written,
    form: Form,
    grid: Grid,
    source: Source,
    execution: Execution,
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=2**63 - 1, metavar="N", help="Seed of dare_ties and dare_linear.", rich_help_panel=OPERATION
        ),
    ] = 0,
    accept_differences: AcceptDifferences = False,
    drop_prediction: DropPrediction = False,
    json: Json = False,
) -> None:
    """Merge models by a recipe in mergekit's YAML.

    Methods: passthrough, linear, slerp, task_arithmetic, ties, dare_ties, dare_linear. Any other method or key is
    refused by name. Norms and k-th magnitudes take a pass of their own; no tensor is loaded as a whole.
    """
    from ckptkit.editing import commands

    _carry_out(
        "merging",
        commands.merge,
        recipe,
        seed=seed,
        accept_differences=accept_differences,
        drop_prediction=drop_prediction,
        output=written.output(form, grid),
        source=source,
        execution=execution,
        json=json,
    )


def resize_vocab(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint of any format.")],
    written: Written,
    form: Form,
    grid: Grid,
    source: Source,
    execution: Execution,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Folder of the new tokenizer; tokens are matched by text.", rich_help_panel=OPERATION
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Number of rows. Without --tokenizer, the last rows are left out, or new ones follow.",
            rich_help_panel=OPERATION,
        ),
    ] = None,
    new_rows: Annotated[
        str,
        choice(
            "--new-rows",
            NEW_ROWS,
            "Rows of new tokens: the mean of all rows; the mean of the rows of the pieces that the old tokenizer makes"
            " of them; zeros; or random with mean and deviation of each column.",
            panel=OPERATION,
        ),
    ] = NEW_ROWS[0],
    seed: Annotated[
        int,
        typer.Option(min=0, max=2**63 - 1, metavar="N", help="Seed of normal rows.", rich_help_panel=OPERATION),
    ] = 0,
    json: Json = False,
) -> None:
    """Add, drop or renumber tokens: rows of the embedding and of the head.

    The rows of tokens that stay are copies. The ids of special tokens in config.json follow.
    """
    from ckptkit.editing import commands

    _carry_out(
        "resizing",
        commands.resize_vocabulary,
        model,
        tokenizer=tokenizer,
        size=size,
        new_rows=new_rows,
        seed=seed,
        output=written.output(form, grid),
        source=source,
        execution=execution,
        json=json,
    )


def _opening(source: Source) -> dict[str, Any]:
    """Options of `open_checkpoint` for models.

    Raises:
        UsageError: One of them is about adapters.
    """
    given = source.keywords()
    if given.pop("lora_alpha") is not None:
        raise UsageError("--lora-alpha is about adapters, and the sources are models", hint="drop it")
    return given


def _carry_out(
    doing: str,
    operation: Callable[..., Any],
    *inputs: Any,
    output: Any,
    source: Source,
    execution: Execution,
    json: bool,
    **how: Any,
) -> None:
    """Runs an operation of `ckptkit.editing.commands` with progress, and prints its result."""
    from ckptkit.cli import rendering

    console = execution.output(json)
    with console.progress(doing) as progress:
        result = operation(*inputs, output, **how, source=_opening(source), progress=progress, **execution.keywords())
    console.result(result, rendering.conversion)


def _numbers(text: str, kind: type[Any], option: str) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text}", hint="numbers with commas between them") from None


GROUP = "Make models of models: averages, other layers, other vocabularies, merges by recipe."
COMMANDS = {
    "average": (average, AVERAGE_EXAMPLES),
    "slice": (slice_, SLICE_EXAMPLES),
    "stack": (stack, STACK_EXAMPLES),
    "merge": (merge, MERGE_EXAMPLES),
    "resize-vocab": (resize_vocab, RESIZE_EXAMPLES),
}
