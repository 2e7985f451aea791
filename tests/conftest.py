"""What holds for every test: no network, no thread pools that fight over a small machine, one pool of ranks.

Hypothesis draws the same examples every time, so that a failure is of the change at hand; with
`HYPOTHESIS_PROFILE=explore` (as `make test-all` sets it) it draws new ones. A slow machine fails nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

try:
    from hypothesis import settings
except ImportError:  # the tests of vLLM run in an environment without it
    pass
else:
    settings.register_profile("repeatable", derandomize=True, deadline=None)
    settings.register_profile("explore", deadline=None)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    from ckptkit.verification.ranks.pool import RankPool


SLOW_CASES = Path(__file__).with_name("slow_cases.txt")


def slow_cases() -> list[str]:
    """The ids of `slow_cases.txt`."""
    lines = SLOW_CASES.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Marks the cases of the list, before pytest chooses by marks."""
    listed = set(slow_cases())
    for item in items:
        if item.nodeid in listed or item.nodeid.partition("[")[0] in listed:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Four ranks that all tests share: importing megatron-core takes longer than any of them."""
    from ckptkit.verification.ranks.pool import RankPool

    with RankPool(4) as ranks:
        yield ranks
