"""One pool of Megatron-Core ranks for all tests of the formats."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.formats.rank_pool import RankProcesses


@pytest.fixture(scope="session")
def megatron_ranks() -> Iterator[RankProcesses]:
    """Four ranks, which start with the first job."""
    from tests.formats.rank_pool import RankProcesses

    with RankProcesses(4, "tests.formats.megatron_ranks") as ranks:
        yield ranks
