"""Who moves which bytes: the files of a plan, cut into as many shares of equal size as there are processes.

The files stand in one line, which is cut into equal parts. So a share has whole files, but for its first and its last.
Cuts are moved to the border of a page: two machines that write one page of a file may lose what the other wrote.

Files that take their bytes from the same tensors (the tensor parallel ranks of a stage) stand side by side in the line.
A cut goes through all of them at one height: whoever reads the rows of a matrix, to give each rank its columns, gives
them to all, and no row is read by two processes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NamedTuple, cast

from ckptkit.io.plan import Comparison, OutputFile, Plan
from ckptkit.io.segments import Filled

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


@dataclass(frozen=True)
class _Bundle:
    """Files of equal size that are cut at one height.

    Attributes:
        files: Indices among the files of the plan.
        size: Bytes of each.
    """

    files: Sequence[int]
    size: int

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return self.size * len(self.files)


def _windows(files: Sequence[OutputFile], live: Sequence[int], count: int) -> list[dict[int, Window]]:
    share = sum(files[index].size for index in live) // count
    line = [bundle for bundle in _bundles(files, live, share) if bundle.size]
    ends = list(accumulate((bundle.nbytes for bundle in line), initial=0))
    cuts = [0, *(_cut(line, ends, ends[-1] * number // count, share) for number in range(1, count)), ends[-1]]
    found: list[dict[int, Window]] = [{} for _ in range(count)]
    for mine, (first, last) in zip(found, pairwise(cuts), strict=True):
        for place in range(bisect_right(ends, first) - 1, len(line)):
            if ends[place] >= last:
                break
            bundle = line[place]
            heights = (max(first, ends[place]), min(last, ends[place + 1]))
            window = Window(*((height - ends[place]) // len(bundle.files) for height in heights))
            if window.start < window.stop:
                mine.update(dict.fromkeys(bundle.files, window))
    for index in live:
        if not files[index].size:
            found[0][index] = Window(0, 0)
    return found


def _bundles(files: Sequence[OutputFile], live: Sequence[int], share: int) -> list[_Bundle]:
    """The files in bundles. Where a cut through several could not be placed well, each stands for itself."""
    together: dict[object, list[int]] = {}
    for index in live:
        segments, key = files[index].segments, cast(object, index)
        if isinstance(segments, Filled) and segments.wholes:
            key = (id(segments.form), *map(id, segments.wholes))
        together.setdefault(key, []).append(index)
    found: list[_Bundle] = []
    for indices in together.values():
        fits = len(indices) * PAGE * _SHARE <= share
        groups = [indices] if fits else [[index] for index in indices]
        found += [_Bundle(group, files[group[0]].size) for group in groups]
    return found


def _cut(line: Sequence[_Bundle], ends: Sequence[int], target: int, share: int) -> int:
    """The place nearest to `target` in the line where all files of a bundle may be cut."""
    place = bisect_right(ends, target) - 1
    if place == len(line):
        return ends[-1]
    start, stop, wide = ends[place], ends[place + 1], len(line[place].files)
    grain = wide * next((grain for grain in _GRAINS if wide * grain * _SHARE <= share), PAGE)
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
