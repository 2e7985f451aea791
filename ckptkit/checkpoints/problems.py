"""Collects everything that is wrong with the tensors of a checkpoint, and reports it at once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ckptkit.errors import InputError
from ckptkit.tensors import Tensor

UNTIED_HEAD = (
    "if the head was trained apart from the embedding, set tie_word_embeddings to false in config.json (and"
    " untie_embeddings_and_output_weights in args); else the checkpoint is inconsistent"
)
"""Hint for a tied model whose head is not the embedding."""


class Problems:
    """Everything wrong with the tensors of a checkpoint, said in one line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.missing: list[str] = []
        self.wrong: list[str] = []
        self.extra: list[str] = []

    def take(
        self, tensors: dict[str, Tensor], name: str, shape: tuple[int, ...] | None, where: str = ""
    ) -> Tensor | None:
        """Removes and returns a tensor of `shape` (None: any), or records a problem with it."""
        tensor = tensors.pop(name, None)
        if tensor is None:
            self.missing.append(name + where)
        elif shape is not None and tensor.shape != shape:
            self.wrong.append(f"{name} is {list(tensor.shape)}, the config says {list(shape)}")
        else:
            return tensor
        return None

    def unknown(self, names: Iterable[str]) -> None:
        """Notes tensors that nothing asked for."""
        self.extra.extend(sorted(names))

    def check(self) -> None:
        """Raises the recorded problems as one error.

        Raises:
            InputError: Anything was.
        """
        parts = [
            f"{len(names)} {label}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            for names, label in (
                (self.missing, "missing"),
                (self.wrong, "of the wrong shape"),
                (self.extra, "unknown to this family"),
            )
            if names
        ]
        if parts:
            raise InputError(f"tensors and config disagree: {'; '.join(parts)}", where=self.path, hint=self._hint())

    def _hint(self) -> str | None:
        """That all missing tensors are there under longer names, if these begin alike."""
        first, *_ = self.missing or [""]
        starts = [name.removesuffix(first) for name in self.extra if first and name.endswith(f".{first}")]
        there = set(self.extra)
        start = next((start for start in starts if all(start + name in there for name in self.missing)), None)
        return None if start is None else f"all that is missing is there, behind the prefix {start}"
