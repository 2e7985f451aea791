"""What trainers and wrappers put before and between the names of a module's parameters, and taking it off again.

`torch.compile`, FSDP and activation checkpointing put a word of theirs wherever they wrap a module. Trainers, DDP and
modules around the model put one word, or several, before all names. A model's own names may begin with such a word, so
names alone do not tell where they start: that start counts after which a model knows most of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ckptkit.errors import InputError
from ckptkit.tensors import Tensor

_WORDS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
_BETWEEN = re.compile(rf"(?<![^.])({'|'.join(_WORDS)})\.")

Fit = Callable[[set[str]], int]
"""How many of some names a model has."""


@dataclass(frozen=True)
class Wrapping:
    """What stands before and between the names of tensors.

    Attributes:
        start: What all names begin with; empty, or with a dot at its end.
        between: The words of wrappers that are inside of names.
    """

    start: str = ""
    between: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.start or self.between)

    @property
    def note(self) -> str:
        """What a user should know, if there is any."""
        if not self.start:
            return f"{' and '.join(self.between)} in names of tensors are the words of a wrapper: they are left out"
        words = self.start + (f", with {' and '.join(self.between)} in some" if self.between else "")
        return f"all names of tensors begin with {words}: the model's own begin behind it"

    def name(self, stored: str) -> str:
        """The model's name of a stored one."""
        return (_BETWEEN.sub("", stored) if self.between else stored).removeprefix(self.start)

    def removed(self, tensors: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
        """Tensors under the names that the model gives them.

        Raises:
            InputError: Two stored names are one of the model's.
        """
        found: dict[str, Tensor] = {}
        for stored, tensor in tensors.items():
            name = self.name(stored)
            if name in found:
                raise InputError(f"{name} is stored twice (once as {stored})", where=where)
            found[name] = tensor
        return found


def find_wrapping(names: Iterable[str], fit: Fit) -> Wrapping:
    """What stands before and between names.

    Args:
        names: All names that are stored.
        fit: How many of these names the model has. The start that fits most counts; of equals, the longest name.
    """
    stored = list(names)
    between: tuple[str, ...] = ()
    if any(word in text for text in ["\n".join(stored)] for word in _WORDS):  # most have none, and this is soon seen
        between = tuple(sorted({word for name in stored for word in _BETWEEN.findall(name)}))
    bare = [_BETWEEN.sub("", name) for name in stored] if between else stored
    common = _common_start(bare)
    starts = [common[:end] for end in (0, *(match.end() for match in re.finditer(r"\.", common)))]
    if len(starts) == 1:
        return Wrapping("", between)
    best = max(starts, key=lambda start: fit({name.removeprefix(start) for name in bare}))
    return Wrapping(best, between)


def _common_start(names: Iterable[str]) -> str:
    """The characters that all names begin with: the first and the last in order have no fewer in common than any."""
    ends = list(names)
    first, last = min(ends, default=""), max(ends, default="")
    count = next((index for index, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    return first[:count]


_MEGATRON = re.compile(r"(?:language_model\.)?(?:decoder|embedding|output_layer)\.")


def fit_of_megatron(names: set[str]) -> int:
    """How many names are Megatron's, whichever model they belong to."""
    return sum(_MEGATRON.match(name) is not None for name in names)
