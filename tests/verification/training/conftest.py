"""Tiny models that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptkit import convert
from tests.models import MODELS, save_llama, save_model
from tests.surgery.pairs import build_split, save_pair

VALUE = "-value"
"""What the kind of a value model ends in."""
SPLIT_KINDS = ["split-linear", "split-mlp", "split-two-linear"]


class Sources(dict[str, Path]):
    """Kind -> a model of it, saved once."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, kind: str) -> Path:
        path = self.folder / kind
        if kind.endswith(VALUE):
            convert(self[kind.removesuffix(VALUE)], path, to="hf", head="value", head_init="normal")
        elif kind in MODELS:
            save_model(path, kind)
        elif kind in SPLIT_KINDS:
            pair = save_pair(self.folder / f"{kind}-pair", dtype="float32")
            build_split(path, pair, kind.removeprefix("split-"), num_last=2)
        else:
            save_llama(path, kind)
        self[kind] = path
        return path


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Kind -> a model of it."""
    return Sources(tmp_path_factory.mktemp("training"))
