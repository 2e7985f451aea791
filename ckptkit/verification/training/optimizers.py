"""The optimizer of both sides. What it does to an element depends on that element alone, so shards need no other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ckptkit.verification.run_options import RunOptions

CLASSES: dict[str, type[torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def make_optimizer(options: RunOptions, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that the options name, with torch's defaults but for the learning rate.

    Vectors do not decay, as Megatron trains them: a norm that is stored less one would decay to another weight.
    """
    every = list(parameters)
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in every if parameter.dim() != 1]},
        {"params": [parameter for parameter in every if parameter.dim() == 1], "weight_decay": 0.0},
    ]
    return CLASSES[options.optimizer](groups, lr=options.rate)  # type: ignore[call-arg]


class Masters:
    """AdamW over float32 copies of parameters in half precision, which would not see small steps; of others, itself.

    Args:
        parameters: What is trained; may be empty, on a stage that holds nothing of it.
        rate: The learning rate.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], rate: float) -> None:
        self._parameters = list(parameters)
        half = (torch.bfloat16, torch.float16)
        self._masters = [
            parameter.detach().clone().float() if parameter.dtype in half else parameter for parameter in parameters
        ]
        self._numbers = {id(parameter): number for number, parameter in enumerate(parameters)}
        self._adamw = torch.optim.AdamW(self._masters, lr=rate, weight_decay=0.0) if self._masters else None

    def step(self) -> None:
        """One step by the gradients that megatron-core has reduced (`main_grad`)."""
        if self._adamw is None:
            return
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            master.grad = parameter.main_grad.to(master.dtype)  # type: ignore[attr-defined]
        self._adamw.step()
        self._adamw.zero_grad()
        with torch.no_grad():
            for parameter, master in zip(self._parameters, self._masters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """What is stepped in place of a parameter: its copy, or itself; a tensor that is not trained itself."""
        number = self._numbers.get(id(tensor))
        return tensor if number is None else self._masters[number]
