"""How many layers of multi-token prediction a checkpoint holds: its tensors say so, whatever its config.json counts."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from ckptkit.errors import UnsupportedError
from ckptkit.tables.family import Family
from ckptkit.tables.model_config import ModelConfig
from ckptkit.tables.prediction import count_in_megatron
from ckptkit.tables.rows import Raw

COUNT = "num_nextn_predict_layers"


def with_prediction(
    family: Family, config: ModelConfig, count: Callable[[Collection[str], int], int], names: Collection[str]
) -> ModelConfig:
    """`config` with the layers of multi-token prediction that there are tensors for.

    Args:
        family: The model's family.
        config: The model without them.
        count: (names, number of decoder layers) -> how many there are.
        names: Names of the tensors.

    Raises:
        UnsupportedError: The head of the model is its embedding, of which these layers would need two copies.
    """
    found = count(names, config.num_layers) if family.predicts else 0
    if found and config.tied:
        raise UnsupportedError("multi-token prediction in a model whose head is its embedding")
    return replace(config, mtp_layers=found)


def in_megatron(names: Collection[str], num_layers: int) -> int:
    """`count` of `with_prediction` for Megatron names."""
    return count_in_megatron(names)


def notes_of_prediction(family: Family, config: ModelConfig, raw: Raw) -> list[str]:
    """Notes that name the layers of multi-token prediction, those that are there and those that are not."""
    if not family.predicts:
        return []
    stated = raw.get(COUNT)
    if config.mtp_layers:
        count = config.mtp_layers
        return [f"{count} layer{'s' * (count > 1)} of multi-token prediction beside the {config.num_layers} layers"]
    if isinstance(stated, int) and stated > 0:
        return [f"config.json counts {stated} of multi-token prediction (as {COUNT}), and there are no tensors of it"]
    return []
