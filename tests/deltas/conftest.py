"""A model before and after a step of training, and what a delta between them should give."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ckptkit.formats.safetensors import read_header
from tests.models import save_llama

Edit = Callable[[str, NDArray[np.uint8]], None]
"""Changes the bytes of the tensor of a name in place."""


def edited(source: Path, target: Path, edit: Edit) -> Path:
    """A copy of a Hugging Face directory whose tensors are changed in place."""
    shutil.copytree(source, target)
    for shard in sorted(target.glob("*.safetensors")):
        header, data = read_header(shard), np.fromfile(shard, np.uint8)
        for name, entry in header.entries.items():
            edit(name, data[len(header.raw) + entry.start : len(header.raw) + entry.stop])
        data.tofile(shard)
    return target


def a_step(name: str, data: NDArray[np.uint8]) -> None:
    """Few elements of one kind of tensor by one, all elements of another a little, another kind anew; norms stay."""
    random, bits = np.random.default_rng(len(name)), data.view("<u2")
    if "proj" in name and "down" not in name:
        bits += (random.random(len(bits)) < 0.03).astype("<u2")
    elif "down" in name:
        bits += random.integers(1, 4, len(bits)).astype("<u2")
    elif "lm_head" in name:
        data[:] = random.integers(0, 256, len(data), np.uint8)


@pytest.fixture(scope="session")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in bfloat16, in several shards."""
    return save_llama(tmp_path_factory.mktemp("delta") / "old", dtype="bfloat16", shard="200KB")


@pytest.fixture(scope="session")
def new(old: Path) -> Path:
    """The same after a step."""
    return edited(old, old.parent / "new", a_step)


@pytest.fixture(scope="session")
def delta(old: Path, new: Path) -> Path:
    """The delta between them."""
    from ckptkit.deltas.make import make_delta

    made = make_delta(old, new, old.parent / "delta")
    assert made.codings == {"unchanged": 10, "changed": 28, "whole": 1}
    return old.parent / "delta"
