"""Pauses the garbage collector while headers are read and plans are made.

Both make millions of small objects without cycles, and the search for cycles among them doubles the time.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """Stops the search for cycles inside the context, and restores the previous state at its end."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
