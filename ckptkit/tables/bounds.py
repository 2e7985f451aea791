"""Upper bounds for the numbers in a description of a model.

ckptkit makes an object for each layer and expert. So a config.json with a huge number would take endless time and
memory before the comparison with the stored tensors could refuse it. These bounds refuse it first.
"""

from __future__ import annotations

from collections.abc import Collection

from ckptkit.errors import InputError
from ckptkit.tables.model_config import ModelConfig
from ckptkit.tensors import Tensor

MAX_LAYERS = 10_000
MAX_EXPERTS = 10_000
MAX_EXPERTS_IN_ALL = 1_000_000
"""Of a model that an adapter is for: its few tensors say nothing about the size of the model."""
MAX_SIZE = 1 << 53
"""The largest size of anything else, in elements; up to here a number has the same value as a float."""


def check_adapted(config: ModelConfig, where: object) -> None:
    """Checks that the model of an adapter can be listed in bounded time.

    Raises:
        InputError: It has more experts than any model.
    """
    experts = config.num_experts * sum(layer.moe for layer in config.layers)
    if experts > MAX_EXPERTS_IN_ALL:
        raise InputError(
            f"the config has {experts:,} experts in all, at most {MAX_EXPERTS_IN_ALL:,} are read", where=where
        )


def check_counts(config: ModelConfig, tensors: Collection[Tensor], where: object) -> None:
    """Checks that there are enough stored tensors for the layers and experts that a config states.

    Args:
        config: The model.
        tensors: The stored tensors. One with three axes may hold an expert at each index of the first axis.
        where: For messages.

    Raises:
        InputError: There are fewer tensors than layers, or too few for the experts.
    """
    if config.num_layers > len(tensors):
        raise InputError(
            f"the config has {config.num_layers:,} layers, but there are only {len(tensors):,} tensors",
            where=where,
        )
    experts = config.num_experts * sum(layer.moe for layer in config.layers)
    held = sum(tensor.shape[0] if len(tensor.shape) == 3 else 1 for tensor in tensors) if experts else 0
    if experts > held:
        raise InputError(f"the config has {experts:,} experts in all, the tensors hold at most {held:,}", where=where)
