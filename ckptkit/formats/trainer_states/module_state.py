"""The state of a module, as trainers without Megatron save it: names and tensors, and no description of the model.

The names are those of the module's parameters, with further parts that the trainer and its wrappers put before and
between them. A Hugging Face directory has to describe the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ckptkit.errors import InputError
from ckptkit.formats.torch_legacy import OptimizerState
from ckptkit.io.plan import Comparison
from ckptkit.tensors import Tensor

_BEFORE = re.compile(r"(?:app|model|module|state_dict)\.")
_BETWEEN = re.compile(r"\b(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")


@dataclass(frozen=True)
class ModuleState:
    """An opened state.

    Attributes:
        path: Its folder.
        format: `dcp` or `fsdp`.
        tensors: Stored key -> whole tensor.
        comparisons: Copies that must be equal.
        optimizer: The optimizer's state beside it.
        notes: Notes for the user.
    """

    path: Path
    format: str
    tensors: dict[str, Tensor]
    comparisons: tuple[Comparison, ...] = ()
    optimizer: OptimizerState = field(default_factory=OptimizerState)
    notes: tuple[str, ...] = ()

    def named(self, fit: Callable[[set[str]], int]) -> dict[str, Tensor]:
        """The tensors under the names that the model gives them.

        `model.` may be the trainer's or the model's own, so names alone do not tell where they start.

        Args:
            fit: How many of these names the model has. The start that fits most counts; of equals, the longest name.

        Raises:
            InputError: Two keys name one parameter.
        """
        bare = self._renamed({key: _BETWEEN.sub("", key) for key in self.tensors})
        starts = [""]
        first = next(iter(bare), "")
        while match := _BEFORE.match(first, len(starts[-1])):
            start = starts[-1] + match[0]
            if not all(key.startswith(start) for key in bare):
                break
            starts.append(start)
        best = max(starts, key=lambda start: fit(_after(bare, start)))
        return {key.removeprefix(best): tensor for key, tensor in bare.items()}

    def _renamed(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for key, name in names.items():
            if name in found:
                raise InputError(f"{name} is stored twice (once as {key})", where=self.path)
            found[name] = self.tensors[key]
        return found


def _after(names: Mapping[str, Tensor], start: str) -> set[str]:
    return {name.removeprefix(start) for name in names}
