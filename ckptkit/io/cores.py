"""How many threads are worth starting: as many as this process may use cores, up to what was measured to help."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ckptkit.errors import CkptkitError
from ckptkit.io.regular import read_bounded

MOST_READERS = 16
FEWEST_MOVERS, MOST_MOVERS = 4, 8
"""Fewer do not keep the queue of a disk full, and more are not faster in RAM (docs/performance.md)."""

_GROUPS = Path("/proc/self/cgroup")
_TREE = Path("/sys/fs/cgroup")
_LARGEST = 1 << 16


def usable_cores() -> int:
    """The cores that this process may use: those of its affinity, or fewer where its control groups have a quota."""
    return int(max(1, min([len(os.sched_getaffinity(0)), *_quotas()])))


def reading_threads() -> int:
    """Threads that read, unless the user says otherwise."""
    return min(MOST_READERS, usable_cores())


def moving_threads() -> int:
    """Threads that move bytes, unless the user says otherwise."""
    return min(MOST_MOVERS, max(FEWEST_MOVERS, usable_cores()))


def _quotas() -> Iterator[float]:
    """The cores that each control group of this process, and each above it, may use at a time."""
    for line in _read(_GROUPS).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        group = Path(path.lstrip("/"))
        for place in (group, *group.parents):
            yield from _quota(_TREE / controllers / place)


def _quota(group: Path) -> Iterator[float]:
    """The quota of one control group, of version 2 (one file) or 1 (two files), if it has any."""
    numbers = _read(group / "cpu.max").split() or [_read(group / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
    with suppress(ValueError, ZeroDivisionError):  # "max" in version 2
        quota, period = map(int, numbers)
        if quota > 0:  # -1 in version 1
            yield quota / period


def _read(path: Path) -> str:
    """The text of a file of the kernel; empty where there is none."""
    with suppress(CkptkitError):
        return read_bounded(path, _LARGEST).decode(errors="replace")
    return ""
