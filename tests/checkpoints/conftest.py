"""Models in Megatron's formats, whose stored `args` a test may change."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptkit import Parallelism, convert
from tests.checkpoints.args_files import set_args
from tests.models import save_llama, save_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")

    def get(kind: str) -> Path:
        if not (folder / kind).exists():
            (save_llama if kind in ("gqa", "llama3") else save_model)(folder / kind, kind)
        return folder / kind

    return get


@pytest.fixture(scope="module")
def stored(models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A copy of a model in a Megatron format, whose `args` may be changed."""
    made: dict[tuple[str, str, Parallelism], Path] = {}
    folder = tmp_path_factory.mktemp("stored")

    def get(
        to: str, kind: str = "gqa", grid: Parallelism | None = None, *, sidecar: bool = True, **changes: object
    ) -> Path:
        grid = grid or Parallelism()
        key = (to, kind, grid)
        if key not in made:
            made[key] = folder / str(len(made))
            convert(models(kind), made[key], to=to, grid=grid)
        path = shutil.copytree(made[key], tmp_path_factory.mktemp("copy") / "model")
        if not sidecar:
            shutil.rmtree(path / "ckptkit")
        return set_args(path, **changes)

    return get
