"""How many layers of multi-token prediction a checkpoint holds: its tensors say so, whatever its config.json counts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from ckptkit.errors import UnsupportedError
from ckptkit.tables.family import Family
from ckptkit.tables.model_config import ModelConfig
from ckptkit.tables.prediction import count_in_megatron
from ckptkit.tables.rows import Raw

COUNT = "num_nextn_predict_layers"
COUNTS = (COUNT, "mtp_num_hidden_layers")
"""Keys of config.json, or of the text model's in it, that count them."""


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
        UnsupportedError: There are more than archives of the family hold, or the last layer has no attention.
    """
    found = count(names, config.num_layers) if family.predicts else 0
    if found > family.prediction.most:
        raise UnsupportedError(f"{found} layers of multi-token prediction, of which {family.name} has at most one")
    if found and config.layers[-1].delta is not None:
        raise UnsupportedError("multi-token prediction behind a DeltaNet: Megatron-Core makes it like the last layer")
    return replace(config, mtp_layers=found)


def in_megatron(names: Collection[str], num_layers: int) -> int:
    """`count` of `with_prediction` for Megatron names."""
    return count_in_megatron(names)


def notes_of_prediction(family: Family, config: ModelConfig, raw: Raw) -> list[str]:
    """Notes that name the layers of multi-token prediction, those that are there and those that are not."""
    if not family.predicts:
        return []
    text = raw.get("text_config")
    places = (raw, text) if isinstance(text, Mapping) else (raw,)
    key, stated = next(((key, place[key]) for place in places for key in COUNTS if key in place), (COUNT, None))
    if config.mtp_layers:
        count = config.mtp_layers
        return [f"{count} layer{'s' * (count > 1)} of multi-token prediction beside the {config.num_layers} layers"]
    if isinstance(stated, int) and stated > 0:
        return [f"config.json counts {stated} of multi-token prediction (as {key}), and there are no tensors of it"]
    return []
