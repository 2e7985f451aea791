"""The facts about an adapter that its tensors do not hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ckptkit.errors import InputError
from ckptkit.formats.peft_config import AdapterConfig
from ckptkit.tables.family import Family
from ckptkit.tables.lora import Linear, linears
from ckptkit.tables.model_config import ModelConfig


@dataclass(frozen=True)
class Lora:
    """An adapter of LoRA.

    Attributes:
        config: PEFT's description of it. A Megatron adapter without one gets one.
        linears: Hugging Face name of a module -> the linear layer, for the layers that have factors.
        scales: Hugging Face name of a module -> the factor of B A.
        names: Names and shapes in the file of the original PEFT adapter, empty if that is not known.
        layout: How the Megatron names of the source were laid out, or an empty string for a PEFT directory.
    """

    config: AdapterConfig
    linears: Mapping[str, Linear]
    scales: Mapping[str, float]
    names: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    layout: str = ""

    def check_fits(self, family: Family, config: ModelConfig, where: object) -> None:
        """Whether a model has all the linear layers.

        Args:
            family: The model's family.
            config: The model.
            where: The adapter, for messages.

        Raises:
            InputError: It lacks one, or has it in another shape.
        """
        known = linears(family, config)
        for module, linear in self.linears.items():
            if module not in known or known[module].shape != linear.shape:
                raise InputError(f"{module} is not in the model, or has another shape there", where=where)
