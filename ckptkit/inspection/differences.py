"""`diff`: where two checkpoints of any layouts differ, first by their headers, then by every value, streamed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.source_options import SourceOptions
from ckptkit.checkpoints.sources import open_side
from ckptkit.errors import InputError
from ckptkit.inspection.structure import adapter_differences, config_differences
from ckptkit.inspection.values import Gap, Survey, common_type, gap, survey
from ckptkit.io.plan import Comparison
from ckptkit.io.reading import compare, in_step
from ckptkit.io.threads import Progress, Readers, read_all
from ckptkit.tensors import Tensor

SIDES = ("A", "B")

SCHEMA = 1
"""Version of the JSON; it rises when a field goes away or changes its meaning."""


@dataclass(frozen=True)
class Structure:
    """The differences between the headers of two checkpoints.

    Attributes:
        config: Sentences about the two configs, and where a side contradicts itself.
        only_in_a: Tensors that only A has.
        only_in_b: Tensors that only B has.
        shapes: Name -> the shapes in A and B, where they differ.
        dtypes: Name -> the element types in A and B, where they differ.
    """

    config: list[str] = field(default_factory=list)
    only_in_a: list[str] = field(default_factory=list)
    only_in_b: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    dtypes: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def same(self) -> bool:
        """Whether they do not differ."""
        return not (self.config or self.only_in_a or self.only_in_b or self.shapes or self.dtypes)


@dataclass(frozen=True)
class TensorDifference:
    """How two tensors of one name differ, or that they are not finite.

    Attributes:
        name: Hugging Face name.
        elements: Number of elements.
        differing: How many of them have different bits, after a cast to a type that holds both exactly.
        largest: Largest |difference| of two finite elements, or None where the two types have no such common type.
        first: Index, in row-major order, of the first element that differs, or None.
        nan: How many elements of A and of B are not a number.
        inf: How many are infinite.
    """

    name: str
    elements: int
    differing: int
    largest: float | None
    first: int | None
    nan: tuple[int, int]
    inf: tuple[int, int]


@dataclass(frozen=True)
class Differences:
    """The differences between two checkpoints.

    Attributes:
        a: Facts about A: path, format, architecture, grid.
        b: Facts about B.
        structure: Differences between their headers.
        values_compared: Whether values were compared, too.
        compared: Number of compared tensors.
        equal: Number of those with equal bits.
        tensors: Tensors that differ or are not finite, in order of their names.
        inconsistent: Sentences about copies within one side that should be equal and differ.
        bytes: Bytes read.
        seconds: Time it took.
    """

    a: dict[str, str]
    b: dict[str, str]
    structure: Structure
    values_compared: bool
    compared: int
    equal: int
    tensors: list[TensorDifference]
    inconsistent: list[str]
    bytes: int
    seconds: float

    @property
    def same(self) -> bool:
        """Whether both are the same model with the same weights, as far as was asked."""
        return self.structure.same and self.equal == self.compared and not self.inconsistent

    def to_dict(self) -> dict[str, Any]:
        """The differences as JSON values."""
        return {"schema": SCHEMA, **asdict(self), "same": self.same}


def diff(
    a: str | Path,
    b: str | Path,
    *,
    values: bool = True,
    threads: int | None = None,
    progress: Progress | None = None,
    hf_reference: str | Path | None = None,
    a_source: SourceOptions = SourceOptions(),  # noqa: B008  frozen
    b_source: SourceOptions = SourceOptions(),  # noqa: B008  frozen
) -> Differences:
    """Compares two checkpoints of any formats and grids, under Hugging Face's names; torch is not needed.

    Args:
        a: A checkpoint of any format, or `org/model@revision` on the hub.
        b: The other.
        values: Whether to compare values, and not only names, shapes and types.
        threads: How many read; by default one for each core.
        progress: Called with (bytes done, bytes in all).
        hf_reference: Hugging Face directory that describes the Megatron sides.
        a_source: Facts about A that it does not record itself.
        b_source: Facts about B that it does not record itself.

    Raises:
        InputError: A side is damaged or incomplete.
        UnsupportedError: No family or format of ours.
        StorageError: A file cannot be read.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        sides = [
            open_side(stack, path, source, prefix, hf_reference, headers_only=not values)
            for path, source, prefix in ((a, a_source, "a"), (b, b_source, "b"))
        ]
        left, right = (side.hf_tensors(()) for side in sides)
        structure = _structure(sides[0], sides[1], left, right)
        pairs = [
            _Pair(name, left[name], right[name])
            for name in sorted(left.keys() & right.keys())
            if values and left[name].shape == right[name].shape
        ]
        found = read_all(pairs, _compare, lambda pair: pair.nbytes, threads=threads, progress=progress)
        copies = [(name, c) for name, side in zip(SIDES, sides, strict=True) for c in side.comparisons if values]
        checked = read_all(copies, _check_copy, lambda item: item[1].left.nbytes, threads=threads)
    return Differences(
        a=_about(a, sides[0]),
        b=_about(b, sides[1]),
        structure=structure,
        values_compared=values,
        compared=len(found),
        equal=sum(item.differing == 0 for item in found),
        tensors=[item for item in found if item.differing or any((*item.nan, *item.inf))],
        inconsistent=[text for text in checked if text],
        bytes=sum(pair.nbytes for pair in pairs) + sum(2 * item.left.nbytes for _, item in copies),
        seconds=time.monotonic() - started,
    )


def _about(path: str | Path, side: Checkpoint) -> dict[str, str]:
    architecture = side.config.architecture
    return {"path": str(path), "format": side.format, "architecture": architecture, "grid": str(side.grid)}


def _structure(a: Checkpoint, b: Checkpoint, left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> Structure:
    contradictions = [
        f"{name} contradicts itself: {text}"
        for name, side in zip(SIDES, (a, b), strict=True)
        for text in side.disagreements
    ]
    both = [(name, left[name], right[name]) for name in sorted(left.keys() & right.keys())]
    return Structure(
        [*config_differences(a.config, b.config, SIDES), *adapter_differences(a, b, SIDES), *contradictions],
        sorted(left.keys() - right.keys()),
        sorted(right.keys() - left.keys()),
        {name: (list(x.shape), list(y.shape)) for name, x, y in both if x.shape != y.shape},
        {name: (str(x.out_dtype), str(y.out_dtype)) for name, x, y in both if x.out_dtype != y.out_dtype},
    )


@dataclass(frozen=True)
class _Pair:
    """Two tensors of one name and shape."""

    name: str
    left: Tensor
    right: Tensor

    @property
    def nbytes(self) -> int:
        return self.left.nbytes + self.right.nbytes


def _compare(readers: Readers, pair: _Pair) -> TensorDifference:
    left, right = pair.left, pair.right
    dtype = common_type(left.out_dtype, right.out_dtype)
    if dtype is None:
        return TensorDifference(pair.name, left.numel, left.numel, None, None, (0, 0), (0, 0))
    sizes = dtype.itemsize
    total, of_left, of_right, done = Gap(), Survey(), Survey(), 0
    streams = readers.first.chunks(left.astype(dtype)), readers.second.chunks(right.astype(dtype))
    for a, b in in_step(*streams):
        apart = gap(a, b, dtype)
        one = survey(a, dtype)
        of_left, of_right = of_left + one, of_right + (survey(b, dtype) if apart.differing else one)
        total = total.then(apart, done)
        done += len(a) // sizes
    return TensorDifference(
        pair.name,
        left.numel,
        total.differing,
        total.largest,
        total.first,
        (of_left.nan, of_right.nan),
        (of_left.inf, of_right.inf),
    )


def _check_copy(readers: Readers, item: tuple[str, Comparison]) -> str:
    """A sentence about a copy that differs from its original, or an empty string."""
    side, comparison = item
    try:
        compare(comparison)
    except InputError as error:
        return f"{side}: {error}"
    return ""
