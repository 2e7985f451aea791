"""Attributes of other packages that are others for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def replaced(stand_ins: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Puts stand-ins in the places of attributes, and the originals back at the end.

    Args:
        stand_ins: (module or class, name of the attribute, stand-in).
    """
    originals = [getattr(thing, name) for thing, name, _ in stand_ins]
    for thing, name, stand_in in stand_ins:
        setattr(thing, name, stand_in)
    try:
        yield
    finally:
        for (thing, name, _), original in zip(stand_ins, originals, strict=True):
            setattr(thing, name, original)
