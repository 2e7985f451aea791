"""The iterations of a run, and which of them are finished.

Trainers write the tracker file last: what it names is finished, and so is every earlier iteration. A run without one
has finished an iteration when its files have not changed for a while.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

from ckptkit.errors import InputError
from ckptkit.formats.torch_legacy import TRACKER, iterations
from ckptkit.io.regular import read_bounded

_NUMBER = re.compile(r"[a-z_]+_(\d{1,18})")
_LONGEST_TRACKER = 1 << 16
_MOST_FILES = 100_000

Look = tuple[tuple[str, int, int], ...]
"""Path, size and time of change of each file of an iteration."""


class Iterations:
    """Looks again and again at the iterations of a run.

    Args:
        run: The folder with the iterations.
        settle: Seconds without a change after which an iteration of a run without a tracker file is finished.
        clock: Gives seconds.
    """

    def __init__(self, run: Path, settle: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._run, self._settle, self._clock = run, settle, clock
        self._seen: dict[int, tuple[Look, float]] = {}

    def finished(self) -> dict[int, Path]:
        """Number -> folder of the iterations that are finished now, in order.

        Raises:
            InputError: The tracker file is none.
        """
        if not self._run.is_dir():
            return {}
        there = {int(match[1]): path for path in iterations(self._run) if (match := _NUMBER.fullmatch(path.name))}
        newest = self._tracked()
        if newest is not None:
            return {number: path for number, path in there.items() if number <= newest}
        return {number: path for number, path in there.items() if self._quiet(number, path)}

    def _tracked(self) -> int | None:
        """The iteration in the tracker file; None without one. `release` is no number, and before all of them."""
        tracker = self._run / TRACKER
        try:
            text = read_bounded(tracker, _LONGEST_TRACKER).decode("utf-8", "replace").strip()
        except InputError:
            if tracker.exists():
                raise
            return None
        if text in ("", "release"):  # empty for a moment, while Megatron-LM writes it
            return -1
        if not re.fullmatch(r"[0-9]{1,18}", text):
            raise InputError(f"expected an iteration or `release`, found {text[:40]!r}", where=tracker)
        return int(text)

    def _quiet(self, number: int, path: Path) -> bool:
        """Whether an iteration has had the same files for long enough."""
        look, now = _look(path), self._clock()
        before, since = self._seen.get(number, (None, now))
        if look != before:
            since = now
        self._seen[number] = (look, since)
        return bool(look) and now - since >= self._settle


def _look(path: Path) -> Look:
    """What an iteration looks like; files that go away meanwhile are not there."""
    found = []
    for file in sorted(path.rglob("*"))[:_MOST_FILES]:
        try:
            state = file.stat()
        except OSError:
            continue
        found.append((str(file.relative_to(path)), state.st_size, state.st_mtime_ns))
    return tuple(found)
