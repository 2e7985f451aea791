"""Double precision in code that asks for single: in this process for a while, or in a rank for good."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.opening import open_checkpoint
from ckptkit.verification.double_precision import double_precision

__all__ = ["double_precision", "opened"]


@functools.cache
def _for_good() -> AbstractContextManager[None]:
    entered = double_precision()
    entered.__enter__()
    return entered  # to be kept: without a reference the context would end


def opened(path: str) -> Checkpoint:
    """Opens a checkpoint in a rank that computes in double precision from now on."""
    _for_good()
    return open_checkpoint(path)
