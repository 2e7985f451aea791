"""The fields in which two descriptions of a model differ."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields

from ckptkit.tables.model_config import LayerConfig, ModelConfig

NUM_LAYERS = "num_layers"
"""The name under which different numbers of layers are listed."""


@dataclass(frozen=True)
class FieldDifference:
    """A field, and what either description says.

    Attributes:
        name: Its name in `ModelConfig`, or in `LayerConfig` if it is of a layer.
        left: What one says.
        right: What the other says.
        layer: Number of the layer, or None.
    """

    name: str
    left: object
    right: object
    layer: int | None = None


def differing_fields(left: ModelConfig, right: ModelConfig, ignored: Collection[str] = ()) -> list[FieldDifference]:
    """The fields in which two descriptions differ; of the layers, those of the first that differs.

    Args:
        left: One description.
        right: The other.
        ignored: Fields of `ModelConfig` that are not compared.
    """
    names = [field.name for field in fields(ModelConfig) if field.name not in {*ignored, "layers"}]
    found = [
        FieldDifference(name, getattr(left, name), getattr(right, name))
        for name in names
        if getattr(left, name) != getattr(right, name)
    ]
    if left.num_layers != right.num_layers:
        return [*found, FieldDifference(NUM_LAYERS, left.num_layers, right.num_layers)]
    for number, (one, other) in enumerate(zip(left.layers, right.layers, strict=True)):
        if one != other:
            of_layer = [
                FieldDifference(field.name, getattr(one, field.name), getattr(other, field.name), number)
                for field in fields(LayerConfig)
                if getattr(one, field.name) != getattr(other, field.name)
            ]
            return [*found, *of_layer]
    return found
