"""The optimizer of both sides. What it does to an element depends on that element alone, so shards need no other."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ckptkit.verification.run_options import RunOptions

CLASSES: dict[str, type[torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def make_optimizer(options: RunOptions, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that the options name, with torch's defaults but for the learning rate."""
    return CLASSES[options.optimizer](list(parameters), lr=options.rate)  # type: ignore[call-arg]
