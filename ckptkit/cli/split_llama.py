"""`ckptkit split-llama build` and `fit`: their options, and the calls."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from ckptkit.cli.options import Execution, Json, Out, ShardSize
from ckptkit.cli.output import bytes_of
from ckptkit.errors import UsageError
from ckptkit.sizes import parse_size

BUILD_EXAMPLES = """\b
Examples:
  ckptkit split-llama build Llama-3.1-8B-Instruct Llama-3.3-70B-Instruct -o split --num-layers-8 32 --num-layers-70 8
  ckptkit split-llama build --config split.json -o split --dry-run
  ckptkit split-llama build --config split.json -o split --adapter-init file:adapter.safetensors
  ckptkit split-llama build 8B 70B -o split --num-layers-8 32 --num-layers-70 8 --adapter mlp --seed 1
  ckptkit split-llama build --config split.json -o split --adapter-init lstsq --calibration text.txt"""

FIT_EXAMPLES = """\b
Examples:
  ckptkit split-llama fit split -o fitted --last Llama-3.3-70B-Instruct --calibration text.txt
  ckptkit split-llama fit split -o fitted --last 70B --calibration ids.json --adapter-init ridge:0.1 --device cuda"""

ADAPTER = "Adapter"


@dataclass(frozen=True)
class Calibration:
    """The text that an adapter is fitted to, and the device that runs the models."""

    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="Text to fit the adapter to, or lists of token ids in a .json file.",
            rich_help_panel=ADAPTER,
        ),
    ] = None
    calibration_tokens: Annotated[
        int | None,
        typer.Option(
            "--calibration-tokens",
            min=2,
            metavar="N",
            help="Number of tokens to use. Default: 32768.",
            rich_help_panel=ADAPTER,
        ),
    ] = None
    calibration_length: Annotated[
        int | None,
        typer.Option(
            "--calibration-length",
            min=2,
            metavar="N",
            help="Tokens in a sequence. Default: 512.",
            rich_help_panel=ADAPTER,
        ),
    ] = None
    device: Annotated[
        str,
        typer.Option(
            metavar="cpu|cuda",
            help="Device that runs both models for a fit, layer by layer.",
            rich_help_panel=ADAPTER,
        ),
    ] = "cpu"

    def options(self) -> dict[str, object]:
        """The options of a fitted initialisation."""
        return {
            "calibration": self.calibration,
            "tokens": self.calibration_tokens,
            "length": self.calibration_length,
            "device": self.device,
        }


def build(
    execution: Execution,
    calibration: Calibration,
    first: Annotated[
        str | None, typer.Argument(metavar="FIRST", help="The narrow Llama: a checkpoint of any format, or org/model.")
    ] = None,
    last: Annotated[str | None, typer.Argument(metavar="LAST", help="The wide Llama.")] = None,
    out: Out = ...,  # type: ignore[assignment]  # typer's mark of an option without a default
    num_layers_8: Annotated[
        int | None, typer.Option("--num-layers-8", metavar="N", help="Layers from the front of FIRST.")
    ] = None,
    num_layers_70: Annotated[
        int | None, typer.Option("--num-layers-70", metavar="M", help="Layers from the end of LAST.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSON file with path8b, path70b, num_layers_8, num_layers_70 and mlp. It replaces FIRST, LAST, both"
            " numbers and --adapter.",
        ),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="linear|two-linear|mlp",
            rich_help_panel=ADAPTER,
            help="One matrix (the default), two, or two with a ReLU between them.",
        ),
    ] = None,
    adapter_init: Annotated[
        str,
        typer.Option(
            metavar="NAME[:ARGUMENT]",
            help="Initial adapter: kaiming, orthogonal, identity-pad, file:PATH of a safetensors file, or fitted to"
            " --calibration: lstsq, ridge[:STRENGTH], procrustes.",
            rich_help_panel=ADAPTER,
        ),
    ] = "kaiming",
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, metavar="N", help="Seed of a random adapter.")] = 0,
    accept_differences: Annotated[
        bool,
        typer.Option(
            "--accept-differences", help="Build even if rope, caches, dtypes or tokenizers of the two models differ."
        ),
    ] = False,
    legacy: Annotated[
        bool,
        typer.Option("--legacy", help="Write the published layout. Loading it needs FIRST and LAST."),
    ] = False,
    shard_size: ShardSize = None,
    json: Json = False,
) -> None:
    """Build a split Llama: embedding and first layers of FIRST, an adapter, last layers, norm and head of LAST.

    Bytes are copied and only the adapter is computed: no model is loaded. transformers loads OUT with
    trust_remote_code.
    """
    from ckptkit.cli import rendering
    from ckptkit.surgery import build as building

    if config is not None:
        if any(value is not None for value in (first, last, num_layers_8, num_layers_70, adapter)):
            raise UsageError("--config replaces FIRST, LAST, --num-layers-* and --adapter", hint="drop them")
        recipe = building.read_schema(config)
    elif first is None or last is None or num_layers_8 is None or num_layers_70 is None:
        raise UsageError("build needs FIRST, LAST, --num-layers-8 and --num-layers-70, or --config FILE")
    else:
        recipe = building.SplitRecipe(first, last, num_layers_8, num_layers_70, adapter or "linear")
    output = execution.output(json)
    with output.steps() as tell:
        result = building.build(
            replace(
                recipe,
                init=adapter_init,
                seed=seed,
                options=calibration.options(),
            ),
            out,
            accept_differences=accept_differences,
            layout="legacy" if legacy else "full",
            shard_size=None if shard_size is None else parse_size(shard_size),
            progress=bytes_of("writing", tell),
            tell=tell,
            **execution.keywords(),
        )
    output.result(result, rendering.conversion)


def fit(
    execution: Execution,
    calibration: Calibration,
    split: Annotated[str, typer.Argument(metavar="SPLIT", help="A split Llama of any format, or org/model.")],
    out: Annotated[
        str,
        typer.Option(
            "-o",
            "--out",
            metavar="OUT",
            help="Directory to create, which appears complete or not at all; or s3://BUCKET/PREFIX.",
        ),
    ],
    last: Annotated[
        str, typer.Option("--last", metavar="LAST", help="The wide Llama that the last layers of SPLIT come from.")
    ],
    first: Annotated[
        str | None,
        typer.Option("--first", metavar="FIRST", help="The narrow Llama. Default: the first layers of SPLIT itself."),
    ] = None,
    adapter_init: Annotated[
        str,
        typer.Option(metavar="NAME[:ARGUMENT]", help="lstsq, ridge[:STRENGTH] or procrustes.", rich_help_panel=ADAPTER),
    ] = "lstsq",
    shard_size: ShardSize = None,
    json: Json = False,
) -> None:
    """Fit the adapter of a split Llama to calibration text. All other tensors are copied.

    Both models run over the text, one layer in memory at a time. OUT is a Hugging Face directory.
    """
    from ckptkit.cli import rendering
    from ckptkit.surgery.refit import refit

    output = execution.output(json)
    with output.steps() as tell:
        result = refit(
            split,
            out,
            last=last,
            first=first,
            init=adapter_init,
            options=calibration.options(),
            shard_size=None if shard_size is None else parse_size(shard_size),
            progress=bytes_of("writing", tell),
            tell=tell,
            **execution.keywords(),
        )
    output.result(result, rendering.conversion)


GROUP = "Join the first layers of a narrow Llama and the last layers of a wide Llama, with an adapter between them."
COMMANDS = {"build": (build, BUILD_EXAMPLES), "fit": (fit, FIT_EXAMPLES)}
