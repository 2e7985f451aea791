"""One tiny pair, and its split Llamas, for all tests here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.formats.rank_pool import RankProcesses
from tests.surgery.pairs import KINDS, build_split, save_pair


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="session")
def wide_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The pair in float32."""
    return save_pair(tmp_path_factory.mktemp("pair32"), dtype="float32")


@pytest.fixture(scope="session")
def splits(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind of the adapter -> bfloat16 split Llama."""
    folder = tmp_path_factory.mktemp("splits")
    return {kind: build_split(folder / kind, pair, kind) for kind in KINDS}


@pytest.fixture(scope="session")
def wide_splits(wide_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind of the adapter -> float32 split Llama."""
    folder = tmp_path_factory.mktemp("splits32")
    return {kind: build_split(folder / kind, wide_pair, kind) for kind in KINDS}


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankProcesses]:
    """Two ranks that train."""
    with RankProcesses(2, "tests.surgery.stage_training") as ranks:
        yield ranks
