"""The state of a module, as trainers without Megatron save it: names and tensors, and no description of the model.

The names are those of the module's parameters, with further parts that the trainer and its wrappers put before and
between them. A Hugging Face directory has to describe the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ckptkit.formats.torch_legacy import OptimizerState
from ckptkit.formats.wrapper_names import Fit, Wrapping, find_wrapping
from ckptkit.io.plan import Comparison
from ckptkit.tensors import Tensor


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

    def named(self, fit: Fit) -> tuple[dict[str, Tensor], Wrapping]:
        """The tensors under the names that the model gives them, and what stood before and between these.

        Args:
            fit: How many of some names the model has.

        Raises:
            InputError: Two keys name one parameter.
        """
        wrapping = find_wrapping(self.tensors, fit)
        return wrapping.removed(self.tensors, self.path), wrapping
