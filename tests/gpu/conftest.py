"""Four CUDA ranks for all tests of a process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ckptkit.verification.ranks.pool import RankPool


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with RankPool(4, start_timeout=300.0) as ranks:
        yield ranks
