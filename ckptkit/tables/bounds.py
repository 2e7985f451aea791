"""The largest numbers that a description of a model may state: what it says is believed only as far as tensors go.

Layers and experts are counted out into one object each, so a stated number takes time and memory before it is compared
with what is stored.
"""

from __future__ import annotations

from collections.abc import Collection

from ckptkit.errors import InputError
from ckptkit.tables.model_config import ModelConfig
from ckptkit.tensors import Tensor

MAX_LAYERS = 10_000
MAX_EXPERTS = 10_000
MAX_SIZE = 1 << 53
"""The largest size of anything else, in elements; up to here a number has the same value as a float."""


def check_counts(config: ModelConfig, tensors: Collection[Tensor], where: object) -> None:
    """Whether stored tensors can make up the layers and experts that a config states, asked before these are counted.

    Args:
        config: The model.
        tensors: What is stored; those with a leading axis of three may hold an expert in each of its indices.
        where: For messages.

    Raises:
        InputError: There are more layers than tensors, or more experts than tensors and their leading indices.
    """
    if config.num_layers > len(tensors):
        raise InputError(
            f"the config has {config.num_layers:,} layers, and there are no more than {len(tensors):,} tensors",
            where=where,
        )
    experts = config.num_experts * sum(layer.moe for layer in config.layers)
    held = sum(tensor.shape[0] if len(tensor.shape) == 3 else 1 for tensor in tensors) if experts else 0
    if experts > held:
        raise InputError(f"the config has {experts:,} experts in all, the tensors hold at most {held:,}", where=where)
