"""`ckptkit verify`: its options, the call, and the reports."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ckptkit.cli.exits import EXIT_DIFFERS
from ckptkit.cli.options import OUTPUT, Source, choice
from ckptkit.cli.output import Output
from ckptkit.cli.records import Prefix
from ckptkit.errors import UsageError
from ckptkit.megatron import DDP, DP_KINDS
from ckptkit.verification.run_options import DEVICES, DTYPES, LEVELS, TIMEOUT, TOLERANCE

EXAMPLES = """\b
Examples:
  ckptkit verify Llama-3.1-8B llama-tp4pp2
  ckptkit verify Llama-3.1-8B llama-tp4pp2 --level weights
  ckptkit verify Llama-3.1-8B llama-tp4pp2 --device cuda --dtype bfloat16
  ckptkit verify Llama-3.1-8B llama-tp4pp2 --prompt "The capital of France is" --json report.json
  ckptkit verify Llama-3.1-8B llama-tp4pp2 --junit report.xml --html report.html
  ckptkit verify Llama-3.1-8B llama-tp4pp2 --packed --sequence-parallel --dp 2
  ckptkit verify Llama-3.1-8B adapter-tp4 --adapter adapter
  ckptkit verify Llama-3.1-8B llama-tp4pp2 --tokens tokens.json --save-logits logits.safetensors"""

QUESTION, RUN = "Question", "How the models run"


def _grid_size(option: str, what: str) -> Any:
    """An option for a size of the grid for a candidate without a grid of its own."""
    return typer.Option(
        option,
        min=1,
        metavar="N",
        help=f"{what} parallel size for a candidate without a grid of its own (formats hf and packed).",
        rich_help_panel=RUN,
    )


@dataclass(frozen=True)
class Run:
    """How the models run: the fields of `RunOptions`."""

    device: Annotated[str, choice("--device", DEVICES, "Device that runs both models.", panel=RUN)] = "cpu"
    dtype: Annotated[str, choice("--dtype", DTYPES, "Type that the candidate computes in.", panel=RUN)] = "float32"
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            metavar="X",
            help="Largest float32 difference of two logits that passes, relative to the largest logit."
            f" Default: {TOLERANCE:g}.",
            rich_help_panel=RUN,
        ),
    ] = None
    replay: Annotated[
        bool,
        typer.Option(
            "--replay/--no-replay",
            help="Send the candidate's tokens to the experts that the reference chose, and judge routers separately.",
            rich_help_panel=RUN,
        ),
    ] = True
    tp: Annotated[int | None, _grid_size("--tp", "Tensor")] = None
    pp: Annotated[int | None, _grid_size("--pp", "Pipeline")] = None
    ep: Annotated[int | None, _grid_size("--ep", "Expert")] = None
    packed: Annotated[
        bool,
        typer.Option(
            "--packed",
            help="Run the candidate on packed inputs: sequences joined in one row without padding, as in training.",
            rich_help_panel=RUN,
        ),
    ] = False
    sequence_parallel: Annotated[
        bool,
        typer.Option(
            "--sequence-parallel",
            help="Split the candidate's sequence over its tensor parallel ranks.",
            rich_help_panel=RUN,
        ),
    ] = False
    dp: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Run N replicas of the candidate's grid. All must compute the same.",
            rich_help_panel=RUN,
        ),
    ] = 1
    dp_kind: Annotated[
        str,
        choice(
            "--dp-kind",
            DP_KINDS,
            "Wrapper of the replicas: megatron-core's DistributedDataParallel, or FSDP2.",
            panel=RUN,
        ),
    ] = DDP
    save_logits: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Keep both sides' logits (safetensors: reference, candidate).",
            rich_help_panel=OUTPUT,
        ),
    ] = None
    timeout: Annotated[
        float | None,
        typer.Option(
            min=1.0,
            metavar="SECONDS",
            help=f"Time limit for a side on Megatron ranks, loading included. Default: {TIMEOUT:g}.",
            rich_help_panel=RUN,
        ),
    ] = None


def verify(
    reference: Annotated[str, typer.Argument(metavar="REFERENCE", help="Checkpoint to trust, of any format.")],
    candidate: Annotated[str, typer.Argument(metavar="CANDIDATE", help="Checkpoint to question, of any format.")],
    run: Run,
    reference_source: Annotated[Source, Prefix("ref", "Source of REFERENCE")],
    candidate_source: Annotated[Source, Prefix("cand", "Source of CANDIDATE")],
    level: Annotated[
        str,
        choice(
            "--level",
            LEVELS,
            "Compare names and shapes; also every byte; or also the logits of the loaded models.",
            panel=QUESTION,
        ),
    ] = "logits",
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="PEFT",
            help="LoRA adapter that peft puts on REFERENCE. CANDIDATE is then an adapter of any format, a Megatron"
            " checkpoint that holds one, or a merged model.",
            rich_help_panel=QUESTION,
        ),
    ] = None,
    keep_going: Annotated[
        bool,
        typer.Option(
            "--keep-going",
            help="Run the remaining levels even after one has found a difference.",
            rich_help_panel=QUESTION,
        ),
    ] = False,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="Compare on this text; may be given several times.", rich_help_panel=QUESTION
        ),
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Compare on these token ids: a JSON list of lists.", rich_help_panel=QUESTION
        ),
    ] = None,
    json: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE", help="Write the report as JSON; - is stdout.", rich_help_panel=OUTPUT),
    ] = None,
    junit: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Write the report as JUnit XML, a test case per check.", rich_help_panel=OUTPUT
        ),
    ] = None,
    html: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Write the report as a page with charts and the map of ranks.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
) -> None:
    """Prove that two checkpoints are the same model.

    The exit code is 0 if they are the same, and 1 if they differ.

    The candidate's shards are loaded strictly into megatron-core's own modules, with one process for each rank of its
    grid (or in the ranks of the torchrun that started this command). The logits are compared with those of transformers
    at every position.
    """
    from ckptkit.checkpoints.source_options import SourceOptions
    from ckptkit.cli import rendering
    from ckptkit.verification import levels
    from ckptkit.verification.adapters.verify import verify_adapter
    from ckptkit.verification.reports.writing import check_places, errors_reported, write_reports

    if prompt and tokens:
        raise UsageError("--prompt and --tokens exclude each other", hint="pass one of them")
    output = Output(json)
    check_places(json, junit, html, run.save_logits)
    first_rank = os.environ.get("RANK", "0") == "0"
    with errors_reported(junit if first_rank else None, reference, candidate), output.progress("verifying") as progress:
        ask = levels.verify if adapter is None else partial(verify_adapter, adapter=adapter)
        report = ask(
            reference,
            candidate,
            level=level,
            prompts=prompt or None,
            tokens=_read_tokens(tokens),
            keep_going=keep_going,
            reference_source=SourceOptions(**reference_source.keywords()),
            candidate_source=SourceOptions(**candidate_source.keywords()),
            progress=progress,
            **vars(run),
        )
    if first_rank:
        write_reports(report, junit=junit, html=html)
        output.result(report, rendering.verification)
    if not report.passed:
        raise typer.Exit(EXIT_DIFFERS)


def _read_tokens(path: Path | None) -> list[list[int]] | None:
    if path is None:
        return None
    from ckptkit.verification.tokens import read_rows

    return read_rows(path)
