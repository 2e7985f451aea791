"""Models, and what an engine would record of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ckptkit import convert
from ckptkit.sharding.grid import Parallelism
from tests.rollouts import sample, save_recorded, write


class Recorded(NamedTuple):
    """A model, on a grid too, and what was sampled from it.

    Attributes:
        path: Hugging Face directory.
        megatron: The same on a grid.
        file: Rollouts in float32, with routing where there are experts.
        records: The lines of that file.
    """

    path: Path
    megatron: Path
    file: Path
    records: list[dict[str, Any]]


def make(folder: Path, kind: str, grid: Parallelism) -> Recorded:
    path = save_recorded(folder / "hf", kind)
    convert(path, folder / "meg", to="torch", grid=grid)
    records = sample(path, routing=kind != "llama")
    return Recorded(path, folder / "meg", write(folder / "r.jsonl", records), records)


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return make(tmp_path_factory.mktemp("dense"), "llama", Parallelism(1, 3))


@pytest.fixture(scope="session")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return make(tmp_path_factory.mktemp("sparse"), "qwen3_moe", Parallelism(1, ep=2))
