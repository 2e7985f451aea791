"""The methods of merging, as mergekit computes them: the same steps, rounded to the same type after each.

A method takes tensors of one shape and gives a computed tensor. Norms and k-th magnitudes of whole tensors are found
in passes of their own, tile by tile, when the first tile of the result is wanted; they are kept, not the tensors.

Source: `merge_methods/linear.py`, `slerp.py`, `generalized_task_arithmetic.py` and `sparsify.py` of mergekit 0.1.5.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ckptkit.dtypes import DTYPES, DType
from ckptkit.io.cache import Cache
from ckptkit.io.computed import Once, as_matrix, blocks, elementwise, tiles
from ckptkit.io.cores import usable_cores
from ckptkit.tensors import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ckptkit.io.computed import Values

Found = TypeVar("Found")
_EPS = 1e-8
_SMALL = 1e-7
"""Norms below this are not rescaled."""
_COLLINEAR = 0.9995
"""Cosine from which on slerp is linear."""


_BINS = 1 << 16
_WHOLE = 1 << 18
"""Elements of a block where sums of a whole tensor are found, whatever the blocks are."""


@dataclass(frozen=True)
class Types:
    """The types of a merge.

    Attributes:
        compute: The type that inputs are cast to, and results rounded to.
        out: The type that is written.
    """

    compute: DType
    out: DType

    @property
    def double(self) -> bool:
        """Whether numbers are float64."""
        return self.compute.name == "F64"


def promoted(types: Sequence[DType]) -> DType:
    """The type that holds the values of all of these, as torch promotes them."""
    names = {dtype.name for dtype in types}
    if len(names) == 1:
        return DTYPES[next(iter(names))]
    return DTYPES["F64" if "F64" in names else "F32"]


def _rounding(dtype: DType) -> Callable[[Values], Values]:
    """Rounds numbers to a type and keeps them as float32 (float64 for F64)."""
    from ckptkit.io.casts import rounded

    return lambda values: rounded(values, dtype)


def _in_type(tensors: Sequence[Tensor], types: Types) -> list[Tensor]:
    """The inputs, cast to the type that is computed in."""
    return [tensor if tensor.out_dtype == types.compute else tensor.astype(types.compute) for tensor in tensors]


def _measured(
    inputs: Sequence[Tensor], double: bool, measure: Callable[[int, list[Values]], Found], size: int | None
) -> Iterator[Found]:
    """What a function finds in each block of some tensors, in order. Blocks of several tiles are measured at a time."""
    matrices = [as_matrix(tensor) for tensor in inputs]

    def of_tile(tile: tuple[int, int]) -> list[Found]:
        return [measure(at, values) for at, values in blocks(matrices, *tile, double=double, size=size)]

    with ThreadPoolExecutor(usable_cores()) as pool:
        for found in pool.map(of_tile, tiles(matrices[0].shape)):
            yield from found


def scaled(tensor: Tensor, scale: float, types: Types) -> Tensor:
    """`scale * tensor`, of the method passthrough."""
    rounded = _rounding(types.compute)

    def values(at: int, found: list[Values]) -> Values:
        return rounded(found[0] * found[0].dtype.type(scale))

    what, inputs = ("scaled", scale, types), _in_type([tensor], types)
    return elementwise(types.out, inputs, what, values, double=types.double, any_rows=True)


def linear(tensors: Sequence[Tensor], weights: Sequence[float], normalize: bool, types: Types) -> Tensor:
    """`sum(weight * tensor)`, divided by the sum of the weights with `normalize`.

    Each product is added to the sum at once, as a fused multiply-add rounds it.
    """
    import numpy as np

    single: Any = np.float64 if types.double else np.float32
    factors = [single(weight) for weight in weights]
    whole = single(0)
    for factor in factors:
        whole = whole + factor
    rounded = _rounding(types.compute)

    def values(at: int, found: list[Values]) -> Values:
        total: Values = np.zeros_like(found[0])
        for value, factor in zip(found, factors, strict=True):
            wide = value.astype(np.float64)
            wide *= np.float64(factor)
            wide += total
            total[...] = wide
        return rounded(total / whole if normalize else total)

    what = ("linear", tuple(weights), normalize, types)
    return elementwise(types.out, _in_type(tensors, types), what, values, double=types.double, any_rows=True)


def slerp(base: Tensor, other: Tensor, t: float, types: Types) -> Tensor:
    """The point at `t` on the arc from a tensor to another; on the line where they are nearly parallel.

    All of it is computed in float64, and rounded once. In float32 the norm of a tensor of millions of elements is off
    by hundreds of units in the last place, and the result with it: mergekit's is, unless its dtype is float64.
    """
    import numpy as np

    from ckptkit.io.casts import decode, encode

    inputs = _in_type([base, other], types)

    def find() -> tuple[float, float]:
        def sums(at: int, found: list[Values]) -> NDArray[np.float64]:
            a, b = (value.astype(np.float64, copy=False) for value in found)
            return np.array([np.dot(a, a), np.dot(b, b), np.dot(a, b)])

        total = sum(_measured(inputs, types.double, sums, _WHOLE), np.zeros(3))
        return _arc(float(total[0]), float(total[1]), float(total[2]), t)

    coefficients = Once(find)

    def values(at: int, found: list[Values]) -> Values:
        one, two = coefficients()
        a, b = (value.astype(np.float64, copy=False) for value in found)
        return decode(encode(a * one + b * two, types.compute), types.compute)

    return elementwise(types.out, inputs, ("slerp", t, types), values, double=types.double, any_rows=True)


def _arc(aa: float, bb: float, ab: float, t: float) -> tuple[float, float]:
    """The factors of two vectors with these squared norms and this product, for the point at `t` between them."""
    a, b = math.sqrt(aa), math.sqrt(bb)
    cosine = ab / ((a if a > _EPS else 1.0) * (b if b > _EPS else 1.0))
    cosine = max(-1.0, min(1.0, cosine))
    if abs(cosine) > _COLLINEAR:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


@dataclass(frozen=True)
class Task:
    """What a model adds to the base.

    Attributes:
        tensor: The tensor of the tuned model.
        weight: Factor of its difference from the base.
        density: Share of the elements of the difference that are kept.
        name: Tells it apart from the others, for random numbers.
    """

    tensor: Tensor
    weight: float
    density: float
    name: str


@dataclass(frozen=True)
class TaskOptions:
    """How differences from a base are joined.

    Attributes:
        sparse: `magnitude` keeps the largest elements, `random` keeps any; None keeps all.
        consensus: Whether an element takes part only with the sign that the sum has.
        normalize: Whether the sum is divided by that of the weights that take part.
        rescale: Whether what is left of a difference gets its sum of absolute values back.
        factor: Factor of the sum (`lambda`).
        seed: Seed of random numbers.
    """

    sparse: str | None
    consensus: bool
    normalize: bool
    rescale: bool
    factor: float = 1.0
    seed: int = 0


def task_arithmetic(base: Tensor, tasks: Sequence[Task], options: TaskOptions, types: Types) -> Tensor:
    """The base and the sum of the differences that models have from it.

    Args:
        base: The tensor of the base model.
        tasks: The other models.
        options: How their differences are joined.
        types: Types of computing and writing.
    """
    import numpy as np

    first, *others = _in_type([base, *(task.tensor for task in tasks)], types)
    inputs = [first, *others]
    if not tasks:
        return first.astype(types.out) if types.out != types.compute else first
    rounded = _rounding(types.compute)
    number: Any = np.float64 if types.double else np.float32
    weights = [rounded(np.array([task.weight], number)) for task in tasks]
    rules = [
        _rule(task, _Pair(first, other, types, rounded), options) for task, other in zip(tasks, others, strict=True)
    ]

    def values(at: int, found: list[Values]) -> Values:
        start, *rest = found
        deltas = [
            rounded(rule(at, rounded(value - start)) * weight)
            for rule, value, weight in zip(rules, rest, weights, strict=True)
        ]
        total = _joined(deltas, weights, options, rounded)
        if options.factor != 1:
            total = rounded(total * number(options.factor))
        return rounded(start + total)

    what = ("tasks", [(task.weight, task.density, task.name) for task in tasks], options, types)
    return elementwise(types.out, inputs, what, values, double=types.double)


def _joined(
    deltas: list[Values], weights: list[Values], options: TaskOptions, rounded: Callable[[Values], Values]
) -> Values:
    """The sum of weighted differences, divided by the sum of weights if asked for."""
    import numpy as np

    if options.consensus:
        positive = rounded(_sum(deltas)) >= 0
        masks = [((delta > 0) & positive) | ((delta < 0) & ~positive) for delta in deltas]
        deltas = [delta * mask for delta, mask in zip(deltas, masks, strict=True)]
        weights = [weight * mask.astype(weight.dtype) for weight, mask in zip(weights, masks, strict=True)]
    total = rounded(_sum(deltas))
    if not options.normalize:
        return total
    divisor = rounded(_sum(weights))
    none = (divisor == 0) if options.consensus else (np.abs(divisor) < _EPS)
    return rounded(total / np.where(none, divisor.dtype.type(1), divisor))


def _sum(values: Sequence[Values]) -> Values:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


@dataclass(frozen=True)
class _Pair:
    """A base and a tuned tensor, and how their difference is rounded."""

    base: Tensor
    tuned: Tensor
    types: Types
    rounded: Callable[[Values], Values]

    def measured(self, measure: Callable[[int, Values], Found], size: int | None) -> Iterator[Found]:
        """What a function finds in each block of the difference."""

        def of_block(at: int, found: list[Values]) -> Found:
            return measure(at, self.rounded(found[1] - found[0]))

        return _measured([self.base, self.tuned], self.types.double, of_block, size)


Rule = Callable[[int, "Values"], "Values"]
"""What is kept of a difference: (index of the first element, elements of the difference) -> elements."""


def _rule(task: Task, pair: _Pair, options: TaskOptions) -> Rule:
    """What is kept of the difference of a task."""
    if options.sparse is None or task.density >= 1:
        return lambda at, delta: delta
    if task.density <= 0 and options.sparse == "magnitude":
        return lambda at, delta: delta * 0
    mask = _largest(pair, task.density) if options.sparse == "magnitude" else _random(task, options.seed)
    if not options.rescale:
        return lambda at, delta: delta * mask(at, delta)
    through = pair.types.compute
    if options.sparse == "random" and through.name != "BF16":
        through = DTYPES["F32"]  # torch draws for these in float32
    narrow = _rounding(through)
    factor = Once(lambda: _regained(pair, mask, narrow))

    def rescaled(at: int, delta: Values) -> Values:
        left = delta * mask(at, delta)
        return pair.rounded(narrow(left * delta.dtype.type(factor())))

    return rescaled


Mask = Callable[[int, "Values"], "NDArray[np.bool_]"]


def _regained(pair: _Pair, mask: Mask, rounded: Callable[[Values], Values]) -> float:
    """By what the kept elements grow to get back the sum of absolute values of all."""
    import numpy as np

    def sums(at: int, delta: Values) -> NDArray[np.float64]:
        size = np.abs(delta)
        return np.array([size.sum(dtype=np.float64), size[mask(at, delta)].sum(dtype=np.float64)])

    totals: NDArray[np.float64] = sum(pair.measured(sums, _WHOLE), np.zeros(2))
    before, after = rounded(totals)
    if before < _SMALL or after < _SMALL:
        return 1.0
    return float(rounded(np.array([before / after]))[0])


def _random(task: Task, seed: int) -> Mask:
    """A mask that keeps an element with the probability of the density: the same for any thread and order."""
    import numpy as np

    key = int.from_bytes(hashlib.sha256(f"{seed} {task.name}".encode()).digest()[:16], "little")
    bound = np.uint64(min(round(max(task.density, 0) * 2**64), 2**64 - 1))

    def mask(at: int, delta: Values) -> NDArray[np.bool_]:
        # A count of the stream gives four numbers, so that an element has the same one in any block.
        stream = np.random.Philox(key=key, counter=at // 4)
        return np.asarray(stream.random_raw(at % 4 + delta.size)[at % 4 :] < bound)

    return mask


def _largest(pair: _Pair, density: float) -> Mask:
    """A mask that keeps the largest elements of a difference: of those alike at the limit, the first ones."""
    import numpy as np

    key = object()

    def mask(at: int, delta: Values) -> NDArray[np.bool_]:
        found = _limits.get(key, lambda: _select(pair, max(1, int(density * pair.base.numel))))
        size = _magnitudes(delta)
        keep = size > found.magnitude
        equal = np.flatnonzero(size == found.magnitude)
        before = found.equal_before(at)
        keep[equal[: max(found.of_equal - before, 0)]] = True
        return np.asarray(keep)

    return mask


def _magnitudes(delta: Values) -> NDArray[np.float32]:
    """What elements are compared by, also those of float64."""
    import numpy as np

    return np.abs(delta.astype(np.float32, copy=False))


@dataclass(frozen=True)
class _Limit:
    """The k-th largest magnitude.

    Attributes:
        magnitude: It. All larger ones are kept.
        of_equal: How many of those that equal it are kept.
        blocks: Indices of the first elements of blocks, ascending; empty if all equal ones are kept.
        equal: How many equal ones are before each of them.
    """

    magnitude: float
    of_equal: int
    blocks: NDArray[np.int64]
    equal: NDArray[np.int64]

    def equal_before(self, at: int) -> int:
        """How many equal ones are before the block whose first element this is."""
        return int(self.equal[self.blocks.searchsorted(at)]) if len(self.blocks) else 0


_limits: Cache[_Limit] = Cache(16 << 20, lambda limit: 64 + limit.blocks.nbytes + limit.equal.nbytes)
"""Limits of the latest tensors: those of a whole model would take more memory the larger it is."""


def _select(pair: _Pair, count: int) -> _Limit:
    """The `count`-th largest magnitude of a difference, exactly: 16 bits of its float32 after the other 16."""
    import numpy as np

    def upper_bits(at: int, delta: Values) -> NDArray[np.int64]:
        return np.bincount(_magnitudes(delta).view(np.uint32) >> np.uint32(16), minlength=_BINS)

    histogram = _summed(pair.measured(upper_bits, _WHOLE))
    upper, larger = _bin_of(histogram, count)
    bits, alike = upper << 16, int(histogram[upper])
    if pair.types.compute.name != "BF16":

        def lower_bits(at: int, delta: Values) -> NDArray[np.int64]:
            found = _magnitudes(delta).view(np.uint32)
            return np.bincount(found[found >> np.uint32(16) == upper] & np.uint32(_BINS - 1), minlength=_BINS)

        histogram = _summed(pair.measured(lower_bits, _WHOLE))
        lower, beyond = _bin_of(histogram, count - larger)
        bits, larger, alike = bits | lower, larger + beyond, int(histogram[lower])
    magnitude = float(np.array([bits], np.uint32).view(np.float32)[0])
    none = np.empty(0, np.int64)
    if count - larger == alike:
        return _Limit(magnitude, alike, none, none)

    def equal(at: int, delta: Values) -> tuple[int, int]:
        return at, int(np.count_nonzero(_magnitudes(delta) == np.float32(magnitude)))

    blocks, counts = np.array(list(pair.measured(equal, None)), np.int64).T
    return _Limit(magnitude, count - larger, blocks, np.cumsum(counts) - counts)


def _summed(histograms: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
    import numpy as np

    total = np.zeros(_BINS, np.int64)
    for histogram in histograms:
        total += histogram
    return total


def _bin_of(histogram: NDArray[np.int64], count: int) -> tuple[int, int]:
    """The bin that holds the `count`-th largest number, and how many are in higher bins."""
    import numpy as np

    from_above = np.cumsum(histogram[::-1])
    at = int(np.searchsorted(from_above, count))
    return len(histogram) - 1 - at, int(from_above[at - 1]) if at else 0
