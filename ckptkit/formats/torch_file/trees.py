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
_NUMBERS = {int, float, bool, type(None)}
_Parts = tuple[list[_Container], int]


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
    most = _ALLOWANCE + _PER_BYTE * stored
    open_nodes: set[int] = set()
    pending: list[tuple[_Container, _Parts | None]] = [(root, None)] if isinstance(root, _CONTAINERS) else []
    while pending:
        node, parts = pending.pop()
        key = id(node)
        if parts is None:
            if key in open_nodes:
                raise InputError(f"{what} has a container that contains itself", where=where)
            if key in heights:
                continue
            parts = _parts(node)
            if parts[0]:
                open_nodes.add(key)
                pending.append((node, parts))
                pending.extend([(part, None) for part in parts[0]])
                continue
        open_nodes.discard(key)
        inner, leaves = parts
        heights[key] = 1 + max([heights[id(part)] for part in inner], default=0)
        sizes[key] = 1 + leaves + sum([sizes[id(part)] for part in inner])
        if heights[key] > _MAX_DEPTH:
            raise InputError(f"{what} nests more than {_MAX_DEPTH} containers", where=where)
        if sizes[key] > most:
            raise InputError(f"{what} unfolds to more values than a file of its size has use for", where=where)


def _parts(node: _Container) -> _Parts:
    """The containers directly inside one, and how much else there is."""
    if isinstance(node, Namespace):
        node = node.fields
    if isinstance(node, Record):
        values: list[object] = [*node.args, node.state]
    else:
        values = [*node, *node.values()] if isinstance(node, dict) else [*node]
    inner: list[_Container] = []
    leaves = 0
    for value in values:
        if type(value) in _NUMBERS:
            leaves += 1
        elif isinstance(value, _CONTAINERS):
            inner.append(value)
        else:
            leaves += 1 + (len(value) // _UNIT if isinstance(value, str | bytes) else 0)
    return inner, leaves
