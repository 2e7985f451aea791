"""Reading headers makes millions of small objects without a cycle, and looking for cycles doubles the time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """In here the garbage collector does not look for cycles, unless somebody had stopped it before."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
