"""The same tensors under another table of a model, whose rows are others in fewer Megatron tensors, or in more."""

from __future__ import annotations

from collections.abc import Mapping

from ckptkit.tables.family import Family
from ckptkit.tables.items import Item
from ckptkit.tables.model_config import ModelConfig
from ckptkit.tensors import Tensor


def as_table(
    table: Family, config: ModelConfig, items: Mapping[str, Item], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Item], dict[str, Tensor]]:
    """The items and tensors of a model by a table.

    Args:
        table: The table.
        config: The model.
        items: Its items by another table with the same Hugging Face tensors.
        tensors: Their tensors.
    """
    found = {item.key: item for item in table.items(config)}
    apart = {
        name: part for key in items.keys() - found.keys() for name, part in items[key].unpack(tensors[key]).items()
    }
    moved = {
        key: tensors[key] if key in tensors else item.pack([apart[name] for name in item.hf])
        for key, item in found.items()
    }
    return found, moved
