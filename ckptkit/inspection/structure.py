"""Differences between two models that show before any weight is read."""

from __future__ import annotations

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
