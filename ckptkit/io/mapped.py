"""Bytes of a file as they lie in the page cache, without a copy of them."""

from __future__ import annotations

import mmap

import numpy as np

from ckptkit.io.system import populate


def mapped(fd: int, start: int, stop: int) -> memoryview | None:
    """Bytes `start:stop` of a file, mapped into memory until the last reference to them goes.

    Every page is brought in here, so a disk that cannot read one is noticed here, too, and not by a signal that kills
    the process. A file that is truncated later still is: so this is for files that only this process writes.

    Returns:
        The bytes, or None where they cannot be mapped; reading them shows the reason.
    """
    if start == stop:  # a mapping of no bytes would be one of the whole file
        return memoryview(b"")
    first = start - start % mmap.ALLOCATIONGRANULARITY
    try:
        whole = np.frombuffer(mmap.mmap(fd, stop - first, mmap.MAP_SHARED, mmap.PROT_READ, offset=first), np.uint8)
        if not populate(whole.ctypes.data, len(whole)):
            return None
    except (OSError, ValueError):  # ValueError: the file is shorter
        return None
    return whole.data[start - first :]
