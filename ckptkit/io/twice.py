"""Which bytes of a store several outputs of a plan take: these stay on this disk, so that each is fetched once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from ckptkit.io.plan import Plan
from ckptkit.io.stores.mirror import mirrored
from ckptkit.tensors import Region, Tensor

_KEPT = 1 << 30
"""Bytes that may stay; of what is beyond, the largest ranges are fetched again."""

Span = tuple[int, int]


def keep_what_is_read_twice(plan: Plan) -> None:
    """Has the mirrors of the sources of a plan keep what its outputs and comparisons take more than once."""
    files = {path: file for path in plan.sources() if (file := mirrored(path)) is not None}
    if not files:
        return
    spans: dict[str, list[Span]] = defaultdict(list)
    columns: dict[tuple[str, int, int], list[Region]] = defaultdict(list)
    for region in _regions(plan):
        if region.file not in files:
            continue
        if region.contiguous:
            spans[region.file].append((region.offset, region.offset + region.rows * region.width))
        else:
            columns[region.file, region.pitch, region.rows].append(region)
    for (path, *_), regions in columns.items():
        spans[path] += _blocks(regions)
    found = [(stop - start, path, start) for path, taken in spans.items() for start, stop in overlaps(taken)]
    room = _KEPT
    for size, path, start in sorted(found):
        room -= size
        if room < 0:
            break
        files[path].keep(start, start + size)


def overlaps(spans: Iterable[Span]) -> Iterator[Span]:
    """The ranges that more than one of some spans covers, in order."""
    edges = sorted(edge for start, stop in spans for edge in ((start, 1), (stop, -1)))
    depth, begun = 0, 0
    for at, step in edges:
        if depth == 1 and step == 1:
            begun = at
        if depth == 2 and step == -1 and begun < at:
            yield begun, at
        depth += step


def _regions(plan: Plan) -> Iterator[Region]:
    tensors: list[Iterable[Tensor]] = [(segment.tensor for segment in file.segments) for file in plan.files]
    tensors.append(tensor for comparison in plan.comparisons for tensor in (comparison.left, comparison.right))
    for group in tensors:
        for tensor in group:
            for band in tensor.bands:
                yield from (piece for piece in band.pieces if isinstance(piece, Region))


def _blocks(regions: list[Region]) -> Iterator[Span]:
    """Rows of which different columns are taken count once: one read serves all of their columns."""
    group: list[Region] = []
    for region in sorted(regions, key=lambda item: item.offset):
        if group and not _beside(group, region):
            yield _span(group)
            group = []
        group.append(region)
    if group:
        yield _span(group)


def _beside(group: list[Region], new: Region) -> bool:
    first, last = group[0], group[-1]
    return last.offset + last.width <= new.offset and new.offset + new.width <= first.offset + first.pitch


def _span(group: list[Region]) -> Span:
    first, last = group[0], group[-1]
    return first.offset, last.offset + (last.rows - 1) * last.pitch + last.width
