"""Options that are declared once: records, prefixes, choices, and their headings in the help."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from ckptkit.cli import app as cli
from ckptkit.cli import choices
from ckptkit.cli.convert import HINTS
from ckptkit.cli.help import GroupedCommand
from ckptkit.cli.options import Execution, Grid, Source
from ckptkit.cli.records import Prefix, with_records
from ckptkit.cli.verify import Run
from ckptkit.errors import UsageError
from ckptkit.sharding.grid import Parallelism, StatedGrid
from ckptkit.verification.run_options import RunOptions


@dataclass(frozen=True)
class Pot:
    size: Annotated[int, typer.Option("--size", "--how-large", help="Its size.", rich_help_panel="Pot")] = 1
    lid: Annotated[bool, typer.Option("--lid", help="With a lid.", rich_help_panel="Pot")] = False


def kitchen() -> tuple[typer.Typer, list[Any]]:
    seen: list[Any] = []
    app = typer.Typer(rich_markup_mode=None)

    def cook(
        dish: Annotated[str, typer.Argument(help="What to cook.")],
        mine: Pot,
        yours: Annotated[Pot, Prefix("your", "Your pot")],
        loud: Annotated[bool, typer.Option("--loud", help="Say it.")] = False,
    ) -> None:
        """Cook."""
        seen.append((dish, mine, yours, loud))

    app.command(cls=GroupedCommand)(with_records(cook))
    return app, seen


def test_records_and_prefixes() -> None:
    app, seen = kitchen()
    line = ["soup", "--how-large", "3", "--your-lid", "--your-size", "2", "--loud"]
    assert CliRunner().invoke(app, line).exit_code == 0
    assert CliRunner().invoke(app, ["stew"]).exit_code == 0
    assert CliRunner().invoke(app, ["--your-how-large", "4", "tea"]).exit_code == 0
    assert seen == [
        ("soup", Pot(3, False), Pot(2, True), True),
        ("stew", Pot(), Pot(), False),
        ("tea", Pot(), Pot(4), False),
    ]
    assert CliRunner().invoke(app, ["soup", "--your-loud"]).exit_code == 2


def test_help_has_headings() -> None:
    text = CliRunner().invoke(kitchen()[0], ["--help"]).stdout
    order = [
        "Arguments:",
        "What to cook",
        "Pot:",
        "--size, --how-large",
        "Your pot:",
        "--your-size",
        "Options:",
        "--loud",
    ]
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)


@pytest.mark.parametrize(
    ("command", "headings"),
    [
        ("convert", ["Format", "Parallel grid", "Source", "Execution", "Output"]),
        ("inspect", ["Source", "Output"]),
        ("verify", ["Question", "How the models run", "Output"]),
    ],
)
def test_options_of_a_command_stand_under_headings(command: str, headings: list[str]) -> None:
    text = CliRunner().invoke(cli.app, [command, "--help"]).stdout
    for heading in headings:
        assert f"\n{heading}:\n" in text
    loose = text.split("\nOptions:\n")[1].split("\n\n")[0]
    assert "--help" in loose and loose.count("  --") <= 1


def test_choices_are_those_of_the_modules_that_use_them() -> None:
    from ckptkit.adapters.commands import PRECISIONS
    from ckptkit.checkpoints.lora.megatron import ADAPTER, MODEL
    from ckptkit.conversion import options
    from ckptkit.conversion.targets import ADAPTER_NAMES, NAMES
    from ckptkit.inspection.hashing import PARTS
    from ckptkit.tables import hybrid_names, lora, prediction
    from ckptkit.tables.spelling import GROUPED, SEQUENTIAL

    assert (choices.MODEL_FORMATS, choices.HASHED) == (NAMES, PARTS)
    assert (*NAMES, *ADAPTER_NAMES) == choices.FORMATS and choices.PRECISIONS == PRECISIONS
    assert set(choices.EXPERTS) == {GROUPED, SEQUENTIAL} and choices.PARTS == (MODEL, ADAPTER)
    assert (choices.CASTS, choices.LAYOUTS, choices.HEADS) == (options.CASTS, options.LAYOUTS, (options.VALUE,))
    assert (choices.ADAPTER_LAYOUTS, choices.MEGATRON_MODELS) == (lora.LAYOUTS, hybrid_names.MODELS)
    assert choices.RELEASES == prediction.RELEASES


def test_options_of_verify_are_the_fields_of_run_options() -> None:
    assert {field.name for field in fields(Run)} == {field.name for field in fields(RunOptions)}
    assert RunOptions.of(**vars(Run())) == RunOptions()


def test_options_of_execution_are_those_of_the_conversion() -> None:
    from ckptkit.conversion.execution import Execution as Carried

    launching, ours_alone = {"ray", "ray_processes"}, {"progress", "tell", "world"}
    assert {field.name for field in fields(Execution)} - launching == {
        field.name for field in fields(Carried)
    } - ours_alone


def test_grids_and_sources_keep_every_size() -> None:
    assert Grid().parallelism() == Parallelism()
    assert {field.name for field in fields(Grid)} == {field.name for field in fields(Parallelism)}
    source = Source(
        src_tp=1, src_pp=2, src_vpp=3, src_ep=4, src_etp=5, src_first_stage_layers=6, src_last_stage_layers=7
    )
    assert source.keywords()["stored_grid"] == StatedGrid(1, 2, 3, 4, 5, 6, 7)


@pytest.mark.parametrize("word", [*HINTS, "torch_dst", "nonsense"])
def test_a_wrong_format_names_the_right_ones(word: str) -> None:
    result = CliRunner().invoke(cli.app, ["convert", "a", "b", "--to", word])
    assert result.exit_code == UsageError.exit_code
    named = result.stderr.split("; ")[1]
    assert any(name in named.replace(",", " ").replace("?", " ").split() for name in choices.FORMATS)


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("ckptkit conv", ["convert"]),
        ("ckptkit convert a b --to tor", ["torch", "torch_dist"]),
        ("ckptkit verify a b --le", ["--level"]),
        ("ckptkit families glm4", ["glm4_moe", "glm4_moe_lite"]),
        ("ckptkit watch run --verify we", ["weights"]),
        ("ckptkit doctor --for gra", ["gradients"]),
        ("ckptkit wat", ["watch"]),
        ("ckptkit inspect a --src-first", ["--src-first-stage-layers"]),
    ],
)
def test_completion(words: str, offered: list[str]) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "_CKPTKIT_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    command = [sys.executable, "-m", "ckptkit"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert [line.split(",")[-1].split("\t")[0] for line in done.stdout.split()] == offered


def test_a_shell_gets_its_script() -> None:
    text = CliRunner().invoke(cli.app, ["--help"], prog_name="ckptkit").stdout
    assert "--install-completion" in text and "--show-completion" in text
