"""Steps that all ranks of a program take together: an error of one is raised by all, so that none waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from ckptkit.io.meeting import Message
from ckptkit.io.team import raised, told

Answer = TypeVar("Answer")


def together(work: Callable[[], Answer]) -> Answer:
    """Does `work` on every rank, and ends when all have.

    Raises:
        CkptkitError: What this rank raised, or else what the first one that failed did.
    """
    error: BaseException | None = None
    try:
        answer = work()
    except Exception as caught:
        error = caught
    problems: list[Message | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, None if error is None else told(error))
    if error is not None:
        raise error
    for rank, problem in enumerate(problems):
        if problem is not None:
            raise raised(problem, f"rank {rank}")
    return answer
