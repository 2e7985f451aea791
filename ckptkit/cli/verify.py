"""`ckptkit verify`: its options, the call, and the reports."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ckptkit.cli.exits import EXIT_DIFFERS, command_line
from ckptkit.cli.options import OUTPUT, Source, choice
from ckptkit.cli.output import Output, annotate, bytes_of
from ckptkit.cli.records import Prefix
from ckptkit.errors import UsageError
from ckptkit.megatron import DDP, DP_KINDS
from ckptkit.megatron.run_config import CAPACITY
from ckptkit.verification.rollouts.options import ENGINE_DTYPES
from ckptkit.verification.run_options import (
    DEVICES,
    DTYPES,
    LEARNING_RATES,
    LEVELS,
    OPTIMIZERS,
    TIMEOUT,
    TOLERANCE,
)
from ckptkit.verification.trainability.goal import KINDS, STEPS, TARGET

EXAMPLES = """\b
Examples:
  ckptkit verify Llama-3.1-8B llama-tp4pp2
  ckptkit verify Llama-3.1-8B llama-tp4pp2 --level weights
  ckptkit verify Llama-3.1-8B llama-tp4pp2 --device cuda --dtype bfloat16
  ckptkit verify Llama-3.1-8B llama-tp4pp2 --prompt "The capital of France is" --json report.json
  ckptkit verify Llama-3.1-8B llama-tp4pp2 --junit report.xml --html report.html
  ckptkit verify Llama-3.1-8B llama-tp4pp2 --markdown - >> "$GITHUB_STEP_SUMMARY"
  ckptkit verify Llama-3.1-8B llama-tp4pp2 --packed --sequence-parallel --dp 2
  ckptkit verify Llama-3.1-8B llama-tp4pp2 --packed --sequence-parallel --cp 2
  ckptkit verify Llama-3.1-8B llama-tp4pp2 --level gradients --sequence-parallel --recompute
  ckptkit verify split-llama split-tp2 --train-steps 8 --train-only "*adapter*"
  ckptkit verify Llama-3.1-8B adapter-tp4 --adapter adapter
  ckptkit verify Llama-3.1-8B llama-tp4pp2 --tokens tokens.json --save-logits logits.safetensors
  ckptkit verify Llama-3.1-8B llama-tp4pp2 --rollouts rollouts.jsonl --engine-dtype bfloat16
  ckptkit verify llama-tp4pp2 --trainability length --packed --sequence-parallel"""

QUESTION, RUN, TRAIN, ENGINE = "Question", "How the models run", "How they are trained", "What an engine recorded"
LEARN = "Whether it learns"


def _grid_size(option: str, what: str) -> Any:
    """An option for a size of the grid for a candidate without a grid of its own."""
    return typer.Option(
        option,
        min=1,
        metavar="N",
        help=f"{what} parallel size for a candidate without a grid of its own (formats hf and packed).",
        rich_help_panel=RUN,
    )


_RATES = ", ".join(f"{rate:g} ({optimizer})" for optimizer, rate in LEARNING_RATES.items())


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
            help="Largest float32 difference of two logits that passes, relative to the largest logit; of two"
            " gradients, relative to the largest one of their tensor."
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
    cp: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Cut every sequence of the candidate over N context parallel ranks, as Megatron does.",
            rich_help_panel=RUN,
        ),
    ] = 1
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
    recompute: Annotated[
        bool,
        typer.Option(
            "--recompute",
            help="Backwards, let the candidate compute the activations of its layers again (full recompute).",
            rich_help_panel=TRAIN,
        ),
    ] = False
    capacity: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Tokens that go through the candidate at a time; with --packed, in one row.",
            rich_help_panel=RUN,
        ),
    ] = CAPACITY
    train_steps: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Also let both sides take N steps of training, and compare losses and updates (level training).",
            rich_help_panel=TRAIN,
            show_default=False,
        ),
    ] = 0
    optimizer: Annotated[
        str, choice("--optimizer", OPTIMIZERS, "Optimizer of the steps, with torch's defaults.", panel=TRAIN)
    ] = OPTIMIZERS[0]
    lr: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help=f"Learning rate of the steps. Default: {_RATES}.",
            rich_help_panel=TRAIN,
        ),
    ] = None
    train_only: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN",
            help="Train only the parameters whose Hugging Face names match, e.g. '*adapter*'; nothing else may move.",
            rich_help_panel=TRAIN,
        ),
    ] = None
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


@dataclass(frozen=True)
class Rollouts:
    """What an engine recorded, and what is known about it."""

    file: Annotated[
        str | None,
        typer.Option(
            "--rollouts",
            metavar="FILE",
            help="Compare the log-probabilities that an inference engine recorded for its own tokens (JSON lines) with"
            " those of CANDIDATE. REFERENCE may be left out.",
            rich_help_panel=ENGINE,
        ),
    ] = None
    temperature: Annotated[
        float | None,
        typer.Option(
            metavar="T",
            help="Temperature of the recorded log-probabilities. Default: 1, and a message says which one fits best.",
            rich_help_panel=ENGINE,
        ),
    ] = None
    engine_dtype: Annotated[
        str | None,
        choice(
            "--engine-dtype",
            ENGINE_DTYPES,
            "Type that the engine computed in, whose rounding is the unit of the verdict. Default: the config's.",
            panel=ENGINE,
        ),
    ] = None
    max_kl: Annotated[
        float | None,
        typer.Option(metavar="X", help="Largest KL per token (k3) that passes, in nats.", rich_help_panel=ENGINE),
    ] = None

    @property
    def facts(self) -> dict[str, Any]:
        """What is known about the recording."""
        return {name: value for name, value in vars(self).items() if name != "file"}


@dataclass(frozen=True)
class Trainability:
    """What is to be learnt."""

    trainability: Annotated[
        str | None,
        choice(
            "--trainability",
            KINDS,
            "Instead of comparing: let the one checkpoint that is given learn on its grid, by a short run of policy"
            f" gradient. length: completions of {TARGET} tokens. --train-steps N limits the steps (default {STEPS}).",
            panel=LEARN,
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Seed of the prompts and draws of --trainability. Default: 0.",
            rich_help_panel=LEARN,
        ),
    ] = None


def verify(
    run: Run,
    rollouts: Rollouts,
    learning: Trainability,
    reference_source: Annotated[Source, Prefix("ref", "Source of REFERENCE")],
    candidate_source: Annotated[Source, Prefix("cand", "Source of CANDIDATE")],
    reference: Annotated[
        str | None,
        typer.Argument(
            metavar="REFERENCE",
            help="Checkpoint to trust, of any format. With --rollouts or --trainability it may be left out.",
            show_default=False,
        ),
    ] = None,
    candidate: Annotated[
        str | None,
        typer.Argument(metavar="CANDIDATE", help="Checkpoint to question, of any format.", show_default=False),
    ] = None,
    level: Annotated[
        str,
        choice(
            "--level",
            LEVELS,
            "Compare names and shapes; also every byte; also the logits of the loaded models; also the gradients of all"
            " parameters; or also some steps of training.",
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
    markdown: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Write the report as Markdown for the summary of a step in GitHub Actions; - is stdout.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    hash: Annotated[
        bool,
        typer.Option(
            "--hash",
            help="Also give the SHA-256 of both sides' tensors. Both are read once more.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
) -> None:
    """Prove that two checkpoints are the same model, or with --rollouts that an inference engine ran this model.

    The exit code is 0 if they are the same, and 1 if they differ. With --trainability it is 0 if the checkpoint learns
    on its grid, and 1 if it does not.

    The candidate's shards are loaded strictly into megatron-core's own modules, with one process for each rank of its
    grid (or in the ranks of the torchrun that started this command). The logits are compared with those of transformers
    at every position.
    """
    from ckptkit.checkpoints.source_options import SourceOptions
    from ckptkit.cli import rendering
    from ckptkit.verification import levels
    from ckptkit.verification.adapters.verify import verify_adapter
    from ckptkit.verification.reports.writing import Reports, check_places
    from ckptkit.verification.rollouts.verify import verify_engine
    from ckptkit.verification.trainability.level import verify_trainability

    others = {"--prompt": prompt, "--tokens": tokens, "--adapter": adapter, "--hash": hash, "--keep-going": keep_going}
    unused = [*[name for name, given in others.items() if given], *["--level"] * (level != "logits")]
    _check_learning(learning, [*unused, *["--rollouts"] * (rollouts.file is not None)], candidate)
    one_is_enough = rollouts.file is not None or learning.trainability is not None
    if reference is None or (candidate is None and not one_is_enough):
        missing = "CANDIDATE is missing" if reference is not None or one_is_enough else "two checkpoints are missing"
        hint = "ckptkit verify REFERENCE CANDIDATE; with --rollouts FILE or --trainability KIND the latter is enough"
        raise UsageError(missing, hint=hint)
    _check_rollouts(rollouts, unused)
    if prompt and tokens:
        raise UsageError("--prompt and --tokens exclude each other", hint="pass one of them")
    if json == markdown == "-":
        raise UsageError("--json - and --markdown - exclude each other", hint="write one of them to a file")
    output = Output(json, text=markdown != "-")
    check_places(json, junit, html, markdown, run.save_logits)
    first_rank = os.environ.get("RANK", "0") == "0"
    reports = Reports(junit, html, markdown) if first_rank else Reports()
    trusted = reference if candidate is not None else str(rollouts.file or f"--trainability {learning.trainability}")
    questioned = reference if candidate is None else candidate
    with reports.errors(trusted, questioned, output.document), output.steps(shown=first_rank) as tell:
        common: dict[str, Any] = {
            "reference_source": SourceOptions(**reference_source.keywords()),
            "candidate_source": SourceOptions(**candidate_source.keywords()),
            "tell": tell,
            "command": command_line(),
            **vars(run),
        }
        if learning.trainability is not None:
            del common["reference_source"]
            report = verify_trainability(questioned, learning.trainability, seed=learning.seed or 0, **common)
        elif rollouts.file is not None:
            known = None if candidate is None else reference
            report = verify_engine(known, questioned, rollouts.file, **rollouts.facts, **common)
        else:
            ask = levels.verify if adapter is None else partial(verify_adapter, adapter=adapter)
            report = ask(
                reference,
                questioned,
                level=level,
                prompts=prompt or None,
                tokens=_read_tokens(tokens),
                keep_going=keep_going,
                progress=bytes_of("comparing the weights", tell),
                hash=hash,
                **common,
            )
    if first_rank:
        reports.write(report, output.document)
        output.result(report, rendering.verification)
        for answer in report.levels:
            failed = [check.summary for check in answer.checks if not check.passed]
            annotate(["\n".join([summary, *answer.messages]) for summary in failed], f"ckptkit verify: {answer.name}")
    if not report.passed:
        raise typer.Exit(EXIT_DIFFERS)


def _check_learning(learning: Trainability, others: list[str], second: str | None) -> None:
    """What has a meaning together with learning."""
    if learning.trainability is None:
        if learning.seed is not None:
            raise UsageError("--seed without --trainability", hint="give --trainability length")
        return
    if others:
        raise UsageError(f"{', '.join(others)} and --trainability exclude each other", hint="drop one or the other")
    if second is not None:
        raise UsageError(
            "--trainability is about one checkpoint",
            where=second,
            hint="ckptkit verify CHECKPOINT --trainability length",
        )


def _check_rollouts(rollouts: Rollouts, others: list[str]) -> None:
    """Options of one question have no meaning in another one."""
    if rollouts.file is not None and others:
        raise UsageError(f"{', '.join(others)} and --rollouts exclude each other", hint="drop one or the other")
    known = [name for name, value in rollouts.facts.items() if value is not None]
    if rollouts.file is None and known:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in known)
        raise UsageError(f"{names} without --rollouts", hint="give the file of rollouts")


def _read_tokens(path: Path | None) -> list[list[int]] | None:
    if path is None:
        return None
    from ckptkit.verification.tokens import read_rows

    return read_rows(path)


COMMANDS = {"verify": (verify, EXAMPLES)}
