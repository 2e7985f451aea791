"""One tiny model in every layout, and ways to change a copy of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptkit import Parallelism, convert
from tests.models import save_llama, save_model

GRIDS = {"packed": Parallelism(), "torch": Parallelism(2, 2), "torch_dist": Parallelism(2, 2)}
LAYOUTS = ("hf", *GRIDS)
EXPERT_GRIDS = {"packed": Parallelism(), "torch": Parallelism(2, ep=2), "torch_dist": Parallelism(2, 2, ep=2)}


def _in_every_layout(source: Path, grids: dict[str, Parallelism]) -> dict[str, Path]:
    found = {"hf": source}
    for layout, grid in grids.items():
        found[layout] = source.parent / layout
        convert(source, found[layout], to=layout, grid=grid)
    return found


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tied Llama in several shards, by layout."""
    return _in_every_layout(save_llama(tmp_path_factory.mktemp("tied") / "hf", "tied", shard="300KB"), GRIDS)


@pytest.fixture(scope="session")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model with experts in bfloat16, by layout."""
    source = save_model(tmp_path_factory.mktemp("moe") / "hf", "qwen3_moe", dtype="bfloat16")
    return _in_every_layout(source, EXPERT_GRIDS)


@pytest.fixture
def changed(tied: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the tied model in a layout, to be damaged."""

    def copy(layout: str) -> Path:
        return Path(shutil.copytree(tied[layout], tmp_path / "copy" / layout))

    return copy
