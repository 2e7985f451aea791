"""What the tests that start ranks share.

They run on the CPU. `CKPTKIT_TEST_DEVICE=cuda` moves both libraries' models to the GPUs; with fewer GPUs than ranks,
the ranks share them over gloo.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.models import save_llama

DEVICE = os.environ.get("CKPTKIT_TEST_DEVICE", "cpu")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny Llama of a kind, saved once."""
    saved: dict[str, Path] = {}

    def get(kind: str, **changes: Any) -> Path:
        key = f"{kind}-{sorted(changes.items())}"
        if key not in saved:
            saved[key] = save_llama(tmp_path_factory.mktemp("hf") / kind, kind, **changes)
        return saved[key]

    return get
