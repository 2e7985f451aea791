"""The fields in which two descriptions of a model differ."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from ckptkit.tables.model_config import LayerConfig, ModelConfig, is_layout

NUM_LAYERS = "num_layers"
"""The name under which different numbers of layers are listed."""


@dataclass(frozen=True)
class FieldDifference:
    """A field in which two descriptions differ.

    Attributes:
        name: Its name in `ModelConfig`, or in `LayerConfig` if it belongs to a layer; a field inside of a field
            follows it, as in `rope theta`.
        left: Value in the first description.
        right: Value in the second.
        layer: Number of the layer, or None.
    """

    name: str
    left: object
    right: object
    layer: int | None = None

    @property
    def is_layout(self) -> bool:
        """Whether stored bytes are cut by it."""
        if self.name == NUM_LAYERS:
            return True
        return is_layout(ModelConfig if self.layer is None else LayerConfig, self.name.split()[0])


def differing_fields(left: ModelConfig, right: ModelConfig, ignored: Collection[str] = ()) -> list[FieldDifference]:
    """The fields in which two descriptions differ; of the layers, those of the first that differs.

    If these are no layout facts, those of the first layer that differs in some follow.

    Args:
        left: One description.
        right: The other.
        ignored: Fields of `ModelConfig` that are not compared.
    """
    found = list(_differing(left, right, ignored={*ignored, "layers"}))
    if left.num_layers != right.num_layers:
        return [*found, FieldDifference(NUM_LAYERS, left.num_layers, right.num_layers)]
    first: list[FieldDifference] = []
    for number, layers in enumerate(zip(left.layers, right.layers, strict=True)):
        of_layer = list(_differing(*layers, layer=number))
        layout = [field for field in of_layer if field.is_layout]
        if layout:
            return [*found, *(first + layout if first else of_layer)]
        first = first or of_layer
    return [*found, *first]


def _differing(
    left: Any, right: Any, *, ignored: Collection[str] = (), layer: int | None = None, within: str = ""
) -> Iterator[FieldDifference]:
    """Fields of two dataclasses of one type; one that is a dataclass itself is taken apart, as `rope theta`."""
    for name in (field.name for field in fields(left) if field.name not in ignored):
        one, other = getattr(left, name), getattr(right, name)
        if one == other:
            continue
        if is_dataclass(one) and type(one) is type(other):
            yield from _differing(one, other, layer=layer, within=f"{within}{name} ")
        else:
            yield FieldDifference(f"{within}{name}", one, other, layer)


def in_words(value: object) -> str:
    """A value as a config.json has it, and a record as its fields: messages show no objects of Python."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if is_dataclass(value):
        return ", ".join(f"{field.name} {in_words(getattr(value, field.name))}" for field in fields(value))
    return repr(value)
