"""The hash of a tensor and of a model, whatever the layout they lie in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class TensorHash:
    """A tensor, under its Hugging Face name, and the SHA-256 of its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str


def hash_of_model(tensors: Iterable[TensorHash]) -> str:
    """SHA-256 over the lines `<name> <dtype> <shape> <sha256>` of a model's tensors, sorted by name, in hexadecimal."""
    ordered = sorted(tensors, key=lambda item: item.name)
    lines = "".join(f"{item.name} {item.dtype} {list(item.shape)} {item.sha256}\n" for item in ordered)
    return hashlib.sha256(lines.encode()).hexdigest()
