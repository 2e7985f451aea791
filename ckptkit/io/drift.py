"""Measures dropped parts of tensors: how far their content is from the content that a conversion would put there."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from ckptkit.dtypes import DTYPES
from ckptkit.io.casts import convert
from ckptkit.io.plan import Dropped
from ckptkit.io.reading import TensorReader, in_step
from ckptkit.tensors import Tensor


def summarise(dropped: Iterable[Dropped], *, measure: bool) -> list[dict[str, object]]:
    """One record for each kind: number of parts and elements, and the largest difference from the expected content.

    Kinds that usually are as expected have one only if they are read and are not.

    Args:
        dropped: All parts.
        measure: Whether to read them; otherwise the largest difference (`max_abs_difference`) is None.

    Raises:
        InputError: A source is gone or ends early.
        StorageError: A source cannot be read.
    """
    kinds: dict[str, list[Dropped]] = defaultdict(list)
    for part in dropped:
        kinds[part.what].append(part)
    records: list[dict[str, object]] = []
    for what, parts in kinds.items():
        sizes = [largest_difference(part.found, part.expected) for part in parts] if measure else []
        if not any(sizes) and all(part.usual for part in parts):
            continue
        most = max(range(len(sizes)), key=sizes.__getitem__) if measure else None
        records.append(
            {
                "what": what,
                "parts": len(parts),
                "elements": sum(part.found.numel for part in parts),
                "max_abs_difference": None if most is None else sizes[most],
                "where": None if most is None or not sizes[most] else parts[most].where,
            }
        )
    return records


def largest_difference(left: Tensor, right: Tensor) -> float:
    """`max |left - right|` of two tensors of one floating-point type and size, streamed; a lone NaN counts as infinity.

    Raises:
        InputError: A source is gone or ends early.
        UnsupportedError: They are not of a type that can be cast to F64.
        StorageError: A source cannot be read.
    """
    largest, double = 0.0, DTYPES["F64"]
    if left.same_bytes_as(right):
        return largest
    with TensorReader() as first, TensorReader() as second:
        for a, b in in_step(first.chunks(left), second.chunks(right)):
            if np.array_equal(a, b):
                continue
            x = convert(a, left.out_dtype, double).view(np.float64)
            y = convert(b, right.out_dtype, double).view(np.float64)
            with np.errstate(invalid="ignore"):
                difference = np.abs(x - y)
            difference[(x == y) | (np.isnan(x) & np.isnan(y))] = 0.0
            peak = float(difference.max())
            largest = max(largest, math.inf if math.isnan(peak) else peak)
    return largest
