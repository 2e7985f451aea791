"""The commands of `ckptkit split-llama`. What they do is done elsewhere, and imported only when they run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from ckptkit.cli.options import Execution, Json, ShardSize
from ckptkit.cli.output import Output
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
    """What an adapter is fitted to, and where."""

    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="What an adapter is fitted to: a text, or lists of token ids in a .json file.",
            rich_help_panel=ADAPTER,
        ),
    ] = None
    calibration_tokens: Annotated[
        int | None,
        typer.Option(
            "--calibration-tokens",
            min=2,
            metavar="N",
            help="How many tokens of it; 32768 by default.",
            rich_help_panel=ADAPTER,
        ),
    ] = None
    calibration_length: Annotated[
        int | None,
        typer.Option(
            "--calibration-length",
            min=2,
            metavar="N",
            help="Tokens of a sequence; 512 by default.",
            rich_help_panel=ADAPTER,
        ),
    ] = None
    device: Annotated[
        str,
        typer.Option(
            metavar="cpu|cuda",
            help="Where the models run that an adapter is fitted to, layer by layer.",
            rich_help_panel=ADAPTER,
        ),
    ] = "cpu"

    def options(self) -> dict[str, object]:
        """What fitted initialisations take."""
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
    out: Annotated[
        str, typer.Option("-o", "--out", metavar="OUT", help="Directory to create. It appears complete or not at all.")
    ] = ...,  # type: ignore[assignment]  # typer's mark of an option without a default
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
            help="In place of FIRST, LAST, both numbers and --adapter: a JSON file with path8b, path70b, num_layers_8,"
            " num_layers_70 and mlp.",
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
            help="How the adapter starts: kaiming, orthogonal, identity-pad, file:PATH of a safetensors file, or"
            " fitted to --calibration: lstsq, ridge[:STRENGTH], procrustes.",
            rich_help_panel=ADAPTER,
        ),
    ] = "kaiming",
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, metavar="N", help="Of a random adapter.")] = 0,
    accept_differences: Annotated[
        bool,
        typer.Option(
            "--accept-differences", help="Build it although rope, caches, dtypes or tokenizers of the two differ."
        ),
    ] = False,
    legacy: Annotated[
        bool,
        typer.Option("--legacy", help="Write the published layout, which cannot be loaded without FIRST and LAST."),
    ] = False,
    shard_size: ShardSize = None,
    json: Json = False,
) -> None:
    """Build a split Llama: embedding and first layers of FIRST, an adapter, last layers, norm and head of LAST.

    A plan of byte copies: nothing is loaded, only the adapter is made. OUT loads by itself with trust_remote_code.
    """
    from ckptkit.cli import rendering
    from ckptkit.surgery import build as building

    if config is not None:
        if any(value is not None for value in (first, last, num_layers_8, num_layers_70, adapter)):
            raise UsageError("--config stands in place of FIRST, LAST, --num-layers-* and --adapter", hint="drop them")
        recipe = building.read_schema(config)
    elif first is None or last is None or num_layers_8 is None or num_layers_70 is None:
        raise UsageError("it takes FIRST, LAST, --num-layers-8 and --num-layers-70, or --config FILE")
    else:
        recipe = building.SplitRecipe(first, last, num_layers_8, num_layers_70, adapter or "linear")
    output = Output("-" if json else None)
    with output.progress("building") as progress:
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
            progress=progress,
            **vars(execution),
        )
    output.result(result, rendering.conversion)


def fit(
    execution: Execution,
    calibration: Calibration,
    hybrid: Annotated[str, typer.Argument(metavar="HYBRID", help="A split Llama of any format, or org/model.")],
    out: Annotated[
        str, typer.Option("-o", "--out", metavar="OUT", help="Directory to create. It appears complete or not at all.")
    ],
    last: Annotated[
        str, typer.Option("--last", metavar="LAST", help="The wide Llama that HYBRID has its last layers of.")
    ],
    first: Annotated[
        str | None,
        typer.Option(
            "--first", metavar="FIRST", help="The narrow Llama; without it, the first layers of HYBRID itself count."
        ),
    ] = None,
    adapter_init: Annotated[
        str,
        typer.Option(metavar="NAME[:ARGUMENT]", help="lstsq, ridge[:STRENGTH] or procrustes.", rich_help_panel=ADAPTER),
    ] = "lstsq",
    shard_size: ShardSize = None,
    json: Json = False,
) -> None:
    """Fit the adapter of a split Llama to calibration text; all other tensors pass through.

    Both models run over the text, one layer in memory at a time. OUT is a Hugging Face directory.
    """
    from ckptkit.cli import rendering
    from ckptkit.surgery.refit import refit

    output = Output("-" if json else None)
    with output.progress("fitting") as progress:
        result = refit(
            hybrid,
            out,
            last=last,
            first=first,
            init=adapter_init,
            options=calibration.options(),
            shard_size=None if shard_size is None else parse_size(shard_size),
            progress=progress,
            **vars(execution),
        )
    output.result(result, rendering.conversion)
