"""Tensors that distributed checkpoints of Megatron-Core hold part by part, each under a name of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ckptkit.errors import InputError
from ckptkit.families import families
from ckptkit.tensors import Tensor, vstack


def join_parts(tensors: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """Parts under names such as `in_proj.weight.query` -> the whole tensors, whose parts stand one after another.

    Args:
        tensors: Name with layer numbers -> tensor, for every tensor of the checkpoint.
        where: For messages.

    Raises:
        InputError: A part is missing, or parts do not fit together.
    """
    rows = [row for family in families() for row in family.rows if row.layout.keys]
    keys_of = {"." + row.megatron.rpartition("{i}.")[2]: row.layout.keys for row in rows}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition(".")
        keys = next((keys for ending, keys in keys_of.items() if stem.endswith(ending) and last in keys), ())
        if not keys:
            found[name] = tensor
        elif stem not in found:
            found[stem] = _joined(tensors, stem, keys, where)
    if twice := sorted(found.keys() & tensors.keys() & {name.rpartition(".")[0] for name in tensors}):
        raise InputError(f"{twice[0]} is stored both whole and in parts", where=where)
    return found


def _joined(tensors: Mapping[str, Tensor], stem: str, keys: tuple[str, ...], where: Path) -> Tensor:
    if missing := [key for key in keys if f"{stem}.{key}" not in tensors]:
        raise InputError(f"{stem} lacks its parts {', '.join(missing)}", where=where)
    try:
        return vstack([tensors[f"{stem}.{key}"] for key in keys])
    except ValueError as error:
        raise InputError(f"the parts of {stem} do not fit together ({error})", where=where) from None
