"""Commands in processes in which some packages cannot be imported, as where they are not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "megatron", "safetensors", "huggingface_hub", "peft", "accelerate", "tokenizers")
"""Everything that the small installation does not have."""
_SEVERAL = """
import contextlib, io, json, sys
from ckptkit.cli.app import app
answers = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = app(arguments, prog_name="ckptkit", standalone_mode=False)
    answers.append([code, out.getvalue(), err.getvalue()])
json.dump(answers, sys.stdout)
"""


@dataclass(frozen=True)
class Answer:
    """What a command said, and its exit code."""

    returncode: int
    stdout: str
    stderr: str


def _run(command: Sequence[str], without: Iterable[str], cwd: Path | None) -> Any:
    paths = [str(ROOT / "tests" / "programs" / "without"), str(ROOT)]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CKPTKIT_TEST_WITHOUT": ",".join(without)}
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)


def ckptkit(*arguments: object, without: Iterable[str] = HEAVY, cwd: Path | None = None) -> Answer:
    """Runs a command."""
    done = _run([sys.executable, "-m", "ckptkit", *map(str, arguments)], without, cwd)
    return Answer(done.returncode, done.stdout, done.stderr)


def several(commands: Sequence[Sequence[object]], *, without: Iterable[str] = HEAVY, cwd: Path) -> list[Answer]:
    """Runs commands, one after another, in one process."""
    lines = json.dumps([[str(word) for word in command] for command in commands])
    done = _run([sys.executable, "-c", _SEVERAL, lines], without, cwd)
    assert done.returncode == 0, done.stderr
    return [Answer(*answer) for answer in json.loads(done.stdout)]
