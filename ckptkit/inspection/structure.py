"""In what two models differ before any weight is read."""

from __future__ import annotations

from dataclasses import fields

from ckptkit.tables.model_config import LayerConfig, ModelConfig

_NOT_THE_MODEL = {"dtype", "init_std", "max_position_embeddings", "layers"}
"""Fields of a `ModelConfig` that change no logit."""


def config_differences(left: ModelConfig, right: ModelConfig, sides: tuple[str, str]) -> list[str]:
    """Fields in which two descriptions of a model differ, as sentences; of the layers, the first that differs.

    Args:
        left: One model.
        right: The other.
        sides: What to call the two.
    """

    def sentence(name: str, one: object, other: object) -> str:
        return f"{name} is {one!r} in {sides[0]}, {other!r} in {sides[1]}"

    found = [
        sentence(name, getattr(left, name), getattr(right, name))
        for name in (f.name for f in fields(ModelConfig) if f.name not in _NOT_THE_MODEL)
        if getattr(left, name) != getattr(right, name)
    ]
    if left.num_layers != right.num_layers:
        return [*found, f"{left.num_layers} layers in {sides[0]}, {right.num_layers} in {sides[1]}"]
    for index, (one, other) in enumerate(zip(left.layers, right.layers, strict=True)):
        names = [f.name for f in fields(LayerConfig) if getattr(one, f.name) != getattr(other, f.name)]
        if names:
            where = f"layer {index}: {names[0]}"
            return [*found, sentence(where, getattr(one, names[0]), getattr(other, names[0]))]
    return found
