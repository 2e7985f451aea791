"""Commands in processes in which some packages cannot be imported, as where they are not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "megatron", "safetensors", "huggingface_hub", "peft", "accelerate", "tokenizers")
"""Everything that the small installation does not have."""


def ckptkit(
    *arguments: object, without: Iterable[str] = HEAVY, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command."""
    paths = [str(ROOT / "tests" / "programs" / "without"), str(ROOT)]
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "CKPTKIT_TEST_WITHOUT": ",".join(without),
        **environment,
    }
    command = [sys.executable, "-m", "ckptkit", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)
