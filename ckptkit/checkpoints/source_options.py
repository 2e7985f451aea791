"""Facts that a user states about a checkpoint that does not describe itself in full, as one record."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ckptkit.errors import CkptkitError
from ckptkit.sharding.grid import StatedGrid

_OPTION = re.compile(r"--(?=(?:hf-reference|iteration|vocab-size|lora-alpha|src)\b)")


@dataclass(frozen=True)
class SourceOptions:
    """Options of `open_checkpoint`, which documents them.

    Attributes:
        hf_reference: Hugging Face directory, or hub reference, that describes the model.
        iteration: Number of the iteration.
        stored_grid: Sizes of the stored grid that `args` do not record.
        vocab_size: The true size of the vocabulary.
        lora_alpha: Alpha of a Megatron adapter.
    """

    hf_reference: str | None = None
    iteration: int | None = None
    stored_grid: StatedGrid = StatedGrid()  # noqa: RUF009  frozen
    vocab_size: int | None = None
    lora_alpha: float | None = None

    def keywords(self) -> dict[str, Any]:
        """Those that are given, as arguments of `open_checkpoint`."""
        found = {
            "hf_reference": self.hf_reference,
            "iteration": self.iteration,
            "vocab_size": self.vocab_size,
            "lora_alpha": self.lora_alpha,
        }
        given: dict[str, Any] = {name: value for name, value in found.items() if value is not None}
        return given | ({"stored_grid": self.stored_grid} if self.stored_grid.sizes() else {})

    def words(self, prefix: str) -> list[str]:
        """Those that are given, as words of a command line whose options begin with `prefix`, if there is one."""
        found = {
            "hf-reference": self.hf_reference,
            "iteration": self.iteration,
            "vocab-size": self.vocab_size,
            "lora-alpha": self.lora_alpha,
        }
        sizes = {f"src-{name.replace('_', '-')}": size for name, size in self.stored_grid.sizes().items()}
        return [
            word
            for name, value in {**found, **sizes}.items()
            if value is not None
            for word in (f"--{prefix}-{name}" if prefix else f"--{name}", str(value))
        ]

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> SourceOptions:
        """The record that `dataclasses.asdict` made JSON types of."""
        return cls(**{**raw, "stored_grid": StatedGrid(**raw["stored_grid"])})


@contextmanager
def options_called(prefix: str) -> Iterator[None]:
    """Errors in here name the options of one side, as `--ref-iteration` for `--iteration`."""
    try:
        yield
    except CkptkitError as error:
        what, hint = (None if text is None else _OPTION.sub(f"--{prefix}-", text) for text in (error.what, error.hint))
        raise type(error)(what or "", where=error.where, hint=hint) from None
