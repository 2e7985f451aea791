"""Values that share parts, as pickles and YAML make them: small as stored, and endless for whoever walks them.

Sixty lists that each hold the next one four times take 900 bytes, and comparing or printing them visits 4^60 values.
Callers walk what they get, so it is measured here once, each part only once.
"""

from __future__ import annotations

from typing import Any

from ckptkit.errors import InputError
from ckptkit.formats.torch_file.torch_types import Namespace, Record

_MAX_DEPTH = 200
_ALLOWANCE, _PER_BYTE = 1_000_000, 16
_UNIT = 64  # bytes of text that count as one value

_Container = dict[Any, Any] | list[Any] | tuple[Any, ...] | Namespace | Record
_CONTAINERS = (dict, list, tuple, Namespace, Record)


def check_tree(root: object, stored: int, what: str, where: object) -> None:
    """Whether a value may be walked part by part, shared parts as often as they are met.

    Args:
        root: The value.
        stored: Bytes that it was read from: the more, the more it may hold.
        what: What it was read from, as the start of a sentence.
        where: For messages.

    Raises:
        InputError: A container holds itself, is nested too deep, or unfolds to too many values.
    """
    heights: dict[int, int] = {}
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()
    pending: list[tuple[_Container, bool]] = [(root, False)] if isinstance(root, _CONTAINERS) else []
    while pending:
        node, expanded = pending.pop()
        key = id(node)
        if expanded:
            open_nodes.discard(key)
            inner, leaves = _parts(node)
            heights[key] = 1 + max((heights[id(part)] for part in inner), default=0)
            sizes[key] = 1 + leaves + sum(sizes[id(part)] for part in inner)
            if heights[key] > _MAX_DEPTH:
                raise InputError(f"{what} nests more than {_MAX_DEPTH} containers", where=where)
            if sizes[key] > _ALLOWANCE + _PER_BYTE * stored:
                raise InputError(f"{what} unfolds to more values than a file of its size has use for", where=where)
        elif key in open_nodes:
            raise InputError(f"{what} has a container that contains itself", where=where)
        elif key not in heights:
            open_nodes.add(key)
            pending.append((node, True))
            pending.extend((part, False) for part in _parts(node)[0])


def _parts(node: _Container) -> tuple[list[_Container], int]:
    """The containers directly inside one, and how much else there is."""
    if isinstance(node, Namespace):
        node = node.fields
    if isinstance(node, Record):
        values: list[object] = [*node.args, node.state]
    else:
        values = [*node, *node.values()] if isinstance(node, dict) else [*node]
    inner = [value for value in values if isinstance(value, _CONTAINERS)]
    return inner, len(values) - len(inner) + sum(len(v) // _UNIT for v in values if isinstance(v, str | bytes))
