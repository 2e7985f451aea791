"""What a long computation is at, for whoever watches it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """A part of a long computation, and how far it is.

    Attributes:
        what: The part, e.g. `the candidate on 4 ranks: running`.
        done: Units done.
        total: Units in all; 0 where they are not counted.
        unit: Name of the units in the plural: `tokens`, `layers`, or `bytes`.
    """

    what: str
    done: int = 0
    total: int = 0
    unit: str = ""


Tell = Callable[[Step], None]
"""Takes a step whenever one begins or goes on, from any thread."""


def nobody(step: Step) -> None:
    """Is told, and says nothing."""


class Counted:
    """A step whose units are counted while it runs.

    Args:
        what: The part.
        total: Units in all.
        unit: Name of the units.
        tell: Who is told, at once and after every `add`.
    """

    def __init__(self, what: str, total: int, unit: str, tell: Tell) -> None:
        self._what, self._total, self._unit, self._tell, self._done = what, total, unit, tell, 0
        self.add(0)

    def add(self, count: int) -> None:
        """`count` more are done."""
        self._done += count
        self._tell(Step(self._what, self._done, self._total, self._unit))
