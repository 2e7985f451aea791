from __future__ import annotations

from collections.abc import Iterator

import pytest

from ckptkit.sharding.grid import Parallelism


@pytest.fixture(scope="session")
def one_rank() -> Iterator[Parallelism]:
    """A process group of this process alone."""
    import torch
    import torch.distributed as dist

    from ckptkit.megatron import compat

    compat.import_megatron()
    from ckptkit.megatron import parallel

    grid = Parallelism()
    parallel.initialize(grid, 0, store=dist.HashStore(), device=torch.device("cpu"))
    yield grid
    parallel.finalize()
