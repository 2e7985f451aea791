"""Who moves which bytes: the files of a plan, cut into as many shares of equal size as there are processes.

The files stand in one line, which is cut into equal parts. So a share has whole files, but for its first and its last.
Cuts are moved to the border of a page: two machines that write one page of a file may lose what the other wrote.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NamedTuple

from ckptkit.io.plan import Comparison, OutputFile, Plan

PAGE = 4096
_GRAINS = (1 << 20, 1 << 16, PAGE)
"""Where files are cut: at stripes of parallel file systems, at the largest pages of any processor, or at pages."""
_SHARE = 64
"""A share has at least this many grains, unless a grain is a page: a cut then moves by a hundredth of it."""


class Window(NamedTuple):
    """Bytes `start:stop` of a file."""

    start: int
    stop: int


@dataclass(frozen=True)
class Share:
    """What one process moves.

    Attributes:
        windows: Index of a file of the plan -> the bytes of it to write.
        comparisons: The comparisons to make.
    """

    windows: Mapping[int, Window]
    comparisons: Sequence[Comparison] = field(default=())

    @property
    def nbytes(self) -> int:
        """Bytes to write."""
        return sum(stop - start for start, stop in self.windows.values())


def whole(plan: Plan, live: Sequence[int]) -> Share:
    """The share of a process that does everything.

    Args:
        plan: The plan.
        live: Indices of the files to write.
    """
    return shares(plan, live, 1)[0]


def shares(plan: Plan, live: Sequence[int], count: int) -> list[Share]:
    """The shares of `count` processes. They depend on the arguments alone.

    Args:
        plan: The plan.
        live: Indices of the files to write.
        count: How many shares.
    """
    windows = _windows(plan.files, live, count)
    compared = _spread([comparison.left.nbytes for comparison in plan.comparisons], count)
    return [
        Share(mine, [plan.comparisons[index] for index in indices])
        for mine, indices in zip(windows, compared, strict=True)
    ]


def _windows(files: Sequence[OutputFile], live: Sequence[int], count: int) -> list[dict[int, Window]]:
    ends = list(accumulate((files[index].size for index in live), initial=0))
    grain = next((grain for grain in _GRAINS if grain * _SHARE * count <= ends[-1]), PAGE)
    cuts = [0, *(_cut(ends, ends[-1] * number // count, grain) for number in range(1, count)), ends[-1]]
    found: list[dict[int, Window]] = [{} for _ in range(count)]
    for mine, (first, last) in zip(found, pairwise(cuts), strict=True):
        for place in range(max(bisect_right(ends, first) - 1, 0), len(live)):
            start, stop = max(first, ends[place]), min(last, ends[place + 1])
            if ends[place] >= last:
                break
            if start < stop:
                mine[live[place]] = Window(start - ends[place], stop - ends[place])
    for index in live:
        if not files[index].size:
            found[0][index] = Window(0, 0)
    return found


def _cut(ends: Sequence[int], target: int, grain: int) -> int:
    """The place nearest to `target` in the line of files where a file may be cut."""
    place = bisect_right(ends, target) - 1
    if place + 1 >= len(ends):
        return ends[-1]
    start, stop = ends[place], ends[place + 1]
    near = start + (target - start + grain // 2) // grain * grain
    return stop if near >= stop or stop - target < abs(near - target) else near


def _spread(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Indices, in `count` groups of about equal size, each of neighbours."""
    total = max(sum(sizes), 1)
    found: list[list[int]] = [[] for _ in range(count)]
    done = 0
    for index, size in enumerate(sizes):
        found[min((2 * done + size) * count // (2 * total), count - 1)].append(index)
        done += size
    return found
