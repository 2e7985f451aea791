"""Differences between two models that show before any weight is read."""

from __future__ import annotations

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.config_fields import NUM_LAYERS, FieldDifference, differing_fields, in_words
from ckptkit.tables.model_config import ModelConfig

_NOT_THE_MODEL = ("dtype", "init_std", "max_position_embeddings")
"""Fields of a `ModelConfig` that change no logit."""


def config_differences(left: ModelConfig, right: ModelConfig, sides: tuple[str, str]) -> list[str]:
    """Sentences about the fields in which two configs differ. Of all layers, only the first difference is listed.

    Args:
        left: One model.
        right: The other.
        sides: Names for the two.
    """

    def sentence(field: FieldDifference) -> str:
        if field.name == NUM_LAYERS:
            return f"{field.left} layers in {sides[0]}, {field.right} in {sides[1]}"
        where = "" if field.layer is None else f"layer {field.layer}: "
        one, other = in_words(field.left), in_words(field.right)
        return f"{where}{field.name} is {one} in {sides[0]}, {other} in {sides[1]}"

    found = differing_fields(left, right, ignored=_NOT_THE_MODEL)
    layers = [field for field in found if field.layer is not None]
    return [sentence(field) for field in (*(field for field in found if field.layer is None), *layers[:1])]


def adapter_differences(left: Checkpoint, right: Checkpoint, sides: tuple[str, str]) -> list[str]:
    """Sentences about what makes two adapters with equal factors differ: their scales. Only the first is listed.

    Args:
        left: One checkpoint.
        right: The other.
        sides: Names for the two.
    """
    one, other = left.lora, right.lora
    if one is None or other is None:
        kinds = ["a model" if lora is None else "an adapter" for lora in (one, other)]
        return [] if one is other else [f"{sides[0]} is {kinds[0]}, {sides[1]} is {kinds[1]}"]
    differ = [name for name, scale in one.scales.items() if other.scales.get(name, scale) != scale]
    if not differ:
        return []
    name = differ[0]
    values = f"{one.scales[name]:g} in {sides[0]}, {other.scales[name]:g} in {sides[1]}"
    return [f"the scale of {name} is {values} ({len(differ)} such layers)"]
