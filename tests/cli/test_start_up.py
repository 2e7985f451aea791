"""Looking at headers takes no longer than it must: what is heavy is not imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fixtures.make_damaged import SOUND

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "megatron", "safetensors", "huggingface_hub", "numpy"}
COMMAND = """
import sys
from ckptkit.cli.app import app
try:
    app(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
print(" ".join(sys.modules), file=sys.stderr)
"""


def imported(*arguments: str) -> set[str]:
    """The top-level modules that a command has imported when it ends."""
    return {name.split(".")[0] for name in every_import(*arguments)}


def every_import(*arguments: str) -> set[str]:
    """The modules that a command has imported when it ends."""
    command = [sys.executable, "-c", COMMAND, *arguments]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True, check=True)
    return set(done.stderr.split())


@pytest.mark.parametrize("base", ["hf", "torch", "torch_dist"])
def test_inspect_imports_nothing_heavy(base: str) -> None:
    modules = imported("inspect", str(SOUND / base), "--json")
    assert "ckptkit" in modules and not modules & HEAVY


@pytest.mark.parametrize(
    "arguments, declared",
    [
        (["inspect", str(SOUND / "hf")], {"looking"}),
        (["adapter", "merge", "--help"], {"adapter"}),
        (["--version"], set()),
        (["--help"], {"looking", "convert", "verify", "families", "delta", "adapter", "split_llama"}),
    ],
)
def test_only_the_commands_asked_for_are_declared(arguments: list[str], declared: set[str]) -> None:
    modules = {"looking", "convert", "verify", "families", "delta", "adapter", "split_llama"}
    assert {name for name in modules if f"ckptkit.cli.{name}" in every_import(*arguments)} == declared


def test_help_declares_options_and_nothing_else() -> None:
    assert not {name for name in every_import("--help") if name.startswith(("ckptkit.conversion", "ckptkit.tables"))}


def test_what_moves_bytes_is_seen(tmp_path: Path) -> None:
    modules = imported("convert", str(SOUND / "hf"), str(tmp_path / "out"), "--to", "torch", "--json")
    assert modules & HEAVY == {"numpy"}
