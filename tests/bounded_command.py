"""Runs the command in a process with limits, forked from one that has imported it already: many runs take no time."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PRELOADED = (
    "ckptkit.cli.app",
    "ckptkit.inspection.summary",
    "httpx",
    "yaml",
    "tqdm",
    "filelock",
    "tests.bounded_command",
)
SECONDS = 10  # of the processor; the system kills what takes more
ADDRESSES = 3 << 30  # bytes; what asks for more gets none


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, what it said on stderr, resident bytes at most."""

    code: int | None
    stderr: str
    memory: int


def run_bounded(folder: Path, *arguments: str, environment: Mapping[str, str | None] | None = None) -> Ended:
    """Runs `ckptkit` with these arguments; `folder` is for what it says.

    `environment` sets variables, or removes those that are None. It counts before huggingface_hub is imported, which
    reads its variables then; what that library is made of is imported beforehand.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    process = context.Process(target=_run, args=(str(folder), arguments, dict(environment or {})))
    process.start()
    process.join()
    memory = folder / "memory"
    said = (folder / "stderr").read_text()
    return Ended(process.exitcode, said, json.loads(memory.read_text()) if memory.exists() else 0)


def _run(folder: str, arguments: tuple[str, ...], environment: dict[str, str | None]) -> None:
    from ckptkit.cli.app import app

    os.environ.update({name: value for name, value in environment.items() if value is not None})
    for name in environment:
        if environment[name] is None:
            os.environ.pop(name, None)

    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    os.dup2(os.open(f"{folder}/stderr", os.O_WRONLY | os.O_CREAT, 0o666), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        app(list(arguments), prog_name="ckptkit")
    finally:
        sys.stderr.flush()
        Path(folder, "memory").write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10))
