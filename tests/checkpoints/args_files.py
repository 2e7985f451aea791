"""Stored `args` of a checkpoint, changed in place, and a command run on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from ckptkit.cli.app import app
from ckptkit.formats.packed import ARGS


def set_args(path: Path, **changes: object) -> Path:
    """Changes the stored arguments of a checkpoint; `...` takes one away."""
    import torch

    def change(args: dict[str, Any]) -> None:
        args.update(changes)
        for name in [name for name, value in changes.items() if value is ...]:
            del args[name]

    if (path / ARGS).is_file():
        args = json.loads((path / ARGS).read_text())
        change(args)
        (path / ARGS).write_text(json.dumps(args))
        return path
    for file in (*path.glob("release/mp_rank_*/*.pt"), *path.glob("release/common.pt")):
        content = torch.load(file, weights_only=False)
        change(vars(content["args"]))
        torch.save(content, file)
    return path


def code_of(*words: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code of a command and what it says."""
    capsys.readouterr()  # whatever wrote the model may have drawn a progress bar
    code = get_command(app).main([str(word) for word in words], "ckptkit", standalone_mode=False)
    return code, capsys.readouterr().err
