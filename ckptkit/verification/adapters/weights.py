"""The levels structure and weights of adapters: the same linear layers, and the same `scale * B A` for each of them.

Factors are compared by what they mean. Megatron may hold them stacked, padded and scaled, so equal adapters can have
other ranks and other numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ckptkit.adapters.merging import Term, Weighted, changes_of, with_magnitudes
from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.lora.values import same_values
from ckptkit.dtypes import DType
from ckptkit.io.computed import TILE, numbers
from ckptkit.io.reading import difference, hash_tensor
from ckptkit.tables.lora import SIDES, A, B
from ckptkit.tensors import Tensor
from ckptkit.verification.reports.report import LevelResult
from ckptkit.verification.reports.results import Check

if TYPE_CHECKING:
    from ckptkit.io.computed import Values

NAMED = 5
"""How many modules a message names."""
EQUAL = 1e-9
"""Largest difference of two products in float64, relative to the largest element: the order of sums differs."""
_BITS = {"BF16": 8, "F16": 11, "F32": 24, "F64": 53}


def check_adapters(expected: Checkpoint, found: Checkpoint) -> LevelResult:
    """Whether two adapters are for the same linear layers of a model."""
    ours, theirs = _linears(expected), _linears(found)
    problems = [
        f"{module} has factors in the {'adapter' if module in ours else 'candidate'} alone"
        for module in sorted(ours ^ theirs)
    ]
    extras, others = expected.sidecar.extras.keys(), found.sidecar.extras.keys()
    problems += [
        f"{name} is in the {'adapter' if name in extras else 'candidate'} alone" for name in sorted(extras ^ others)
    ]
    summary = problems[0] if problems else f"{len(ours)} linear layers have factors in both"
    checks = [Check("adapter", not problems, summary)]
    return LevelResult("structure", not problems, summary, {"modules": len(ours), "problems": problems}, checks)


def check_deltas(expected: Checkpoint, found: Checkpoint) -> LevelResult:
    """Whether two adapters add the same to every weight, and if not, in which known way they differ."""
    assert expected.lora is not None and found.lora is not None
    owners = _Owners(expected)
    problems = []
    for module, linear in expected.lora.linears.items():
        if module in found.lora.linears:
            pair = [_term(side, module) for side in (expected, found)]
            problems += _delta_problem(module, pair[0], pair[1], owners)
        else:
            problems.append(f"{linear.module} has no factors in the candidate")
    extras = expected.sidecar.extras
    for name, tensor in found.sidecar.extras.items():
        if name not in extras or not same_values(tensor, extras[name]):
            problems.append(f"{name} differs")
    count = len(expected.lora.linears)
    return _answer("adapter", problems, f"scale * B A of {count} linear layers is the same", count)


def check_merged(base: Checkpoint, adapter: Checkpoint, model: Checkpoint) -> LevelResult:
    """Whether a model has an adapter in its weights, within the rounding of the type that it stores them in.

    The limit for an element is half a unit in the last place for the sum, as much for what is added in that type, and
    the error of float32 sums.
    """
    assert adapter.lora is not None
    changes = changes_of(base, [Weighted(adapter)])
    problems = []
    for key, item in base.items.items():
        mine, theirs = item.unpack(base.tensors[key]), item.unpack(model.tensors[key])
        for name, weight in mine.items():
            weight, terms = changes.wholes.get(name, weight), changes.terms.get(name, ())
            if terms:
                problems += _merged_problem(name, weight, terms, theirs[name], changes.magnitudes.get(name))
            elif weight.out_dtype == theirs[name].out_dtype:
                how = difference(weight, theirs[name])
                problems += [] if how is None else [f"{name}, which the adapter does not change: they {how}"]
            else:
                problems += _merged_problem(name, weight, (), theirs[name])
    count = len(changes.terms)
    good = f"{count} weights have the adapter in them, the others are as they were"
    return _answer("merged weights", problems, good, count)


def _answer(name: str, problems: list[str], good: str, count: int) -> LevelResult:
    summary = f"{len(problems)} differ: {'; '.join(problems[:NAMED])}" if problems else good
    details = {"modules": count, "problems": problems}
    return LevelResult("weights", not problems, summary, details, [Check(name, not problems, summary)])


def _linears(adapter: Checkpoint) -> set[str]:
    assert adapter.lora is not None
    return set(adapter.lora.linears)


def _term(adapter: Checkpoint, module: str) -> Term:
    assert adapter.lora is not None
    linear = adapter.lora.linears[module]
    return Term(adapter.tensors[linear.key(A)], adapter.tensors[linear.key(B)], adapter.lora.scales[module])


def _tiles(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    step = max(TILE // shape[1], 1)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


@dataclass
class _Sums:
    """What two matrices have in common, summed up tile by tile.

    Attributes:
        product: Sum of the products of their elements.
        square: Sum of the squares of the first one's.
        other: Sum of the squares of the second one's.
        gap: Largest |difference|.
        largest: Largest |element| of the first.
    """

    product: float = 0.0
    square: float = 0.0
    other: float = 0.0
    gap: float = 0.0
    largest: float = 0.0

    def add(self, expected: Values, found: Values) -> None:
        """Takes in a tile, float64."""
        import numpy as np

        self.product += float((expected * found).sum())
        self.square += float((expected * expected).sum())
        self.other += float((found * found).sum())
        self.gap = max(self.gap, float(np.abs(found - expected).max(initial=0.0)))
        self.largest = max(self.largest, float(np.abs(expected).max(initial=0.0)))

    @property
    def ratio(self) -> float | None:
        """How many times the first the second is, or None if it is not a multiple."""
        if not self.square or not math.isfinite(self.other):
            return None
        ratio = self.product / self.square
        rest = self.other - ratio * self.product
        return ratio if rest <= 1e-9 * max(self.other, self.square) else None


def _delta_problem(module: str, expected: Term, found: Term, owners: _Owners) -> list[str]:
    same = [same_values(one, other) for one, other in ((expected.a, found.a), (expected.b, found.b))]
    if all(same) and expected.factor == found.factor:
        return []
    sums = _Sums()
    for tile in _tiles(expected.shape):
        sums.add(expected.rows(*tile, double=True), found.rows(*tile, double=True))
    if sums.gap <= EQUAL * sums.largest:
        return []
    return [f"{module}: {_how(module, expected, found, sums, owners)}"]


def _how(module: str, expected: Term, found: Term, sums: _Sums, owners: _Owners) -> str:
    ratio = sums.ratio
    if ratio is not None:
        rank = expected.a.shape[0]
        plain = math.isclose(ratio * math.sqrt(rank), 1.0, rel_tol=1e-6)
        why = "alpha / rank, where the adapter has alpha / sqrt(rank)" if plain else "is alpha the adapter's?"
        return f"the scale is {ratio * expected.factor:.6g}, and should be {expected.factor:.6g} ({why})"
    others = {side: owners.of(side, tensor) for side, tensor in zip(SIDES, (found.a, found.b), strict=True)}
    theirs = {side: own for side, own in others.items() if own and module not in own}
    if theirs:
        return " and ".join(f"{side} is that of {sorted(own)[0]}" for side, own in theirs.items())
    if _exchanged(expected, found):
        return "A and B are exchanged"
    return f"scale * B A differs by at most {sums.gap:.3g}, where the largest element is {sums.largest:.3g}"


def _exchanged(expected: Term, found: Term) -> bool:
    if found.a.shape != expected.b.shape[::-1] or found.b.shape != expected.a.shape[::-1]:
        return False
    pairs = ((found.a, expected.b), (found.b, expected.a))
    return all(bool((numbers(one) == numbers(other).T).all()) for one, other in pairs)


@dataclass(frozen=True)
class _Owners:
    """Which modules of an adapter a factor belongs to, by its bytes."""

    adapter: Checkpoint

    def of(self, side: str, factor: Tensor) -> set[str]:
        """The modules whose factor of this side has these bytes."""
        return self._known[side].get(hash_tensor(factor), set())

    @cached_property
    def _known(self) -> Mapping[str, dict[str, set[str]]]:
        assert self.adapter.lora is not None
        known: dict[str, dict[str, set[str]]] = {side: {} for side in SIDES}
        for module, linear in self.adapter.lora.linears.items():
            for side in SIDES:
                known[side].setdefault(hash_tensor(self.adapter.tensors[linear.key(side)]), set()).add(module)
        return known


def _merged_problem(
    name: str, weight: Tensor, terms: Sequence[Term], found: Tensor, magnitudes: Tensor | None = None
) -> list[str]:
    import numpy as np

    if found.shape != weight.shape:
        return [f"{name} is {list(found.shape)}, and should be {list(weight.shape)}"]
    sums, wrong, worst = _Sums(), 0, 0.0
    unit = 2.0 ** -_bits(found.out_dtype)
    shape = (weight.shape[0], weight.numel // max(weight.shape[0], 1))
    for tile in _tiles((max(shape[0], 1), max(shape[1], 1))):
        base = np.asarray(numbers(weight.rows(*tile), double=True), np.float64).reshape(-1, shape[1])
        stored = np.asarray(numbers(found.rows(*tile), double=True), np.float64).reshape(-1, shape[1])
        added, size = np.zeros_like(base), np.abs(base)
        for term in terms:
            added += term.rows(*tile, double=True)
            size += term.sizes(*tile)
        exact = base + added
        if magnitudes is not None:
            lengths = np.linalg.norm(exact, axis=1, keepdims=True)
            exact = np.asarray(with_magnitudes(exact, magnitudes, *tile), np.float64)
            # The length of a row is rounded, too, and so is the quotient.
            size = size * np.linalg.norm(exact, axis=1, keepdims=True) / lengths + 4 * np.abs(exact)
            added = exact - base
        rank = sum(term.a.shape[0] for term in terms)
        limit = unit * (np.abs(exact) + 2 * np.abs(added)) * (1 + 1e-9) + (rank + 2) * 2.0**-23 * size
        gap = np.abs(stored - exact)
        wrong += int((~(gap <= limit)).sum())  # what is not a number is wrong, too
        worst = max(worst, float(gap.max(initial=0.0)))
        sums.add(added, stored - base)
    if not wrong:
        return []
    text = f"{wrong:,} of {found.numel:,} elements are off, by at most {worst:.3g}"
    if terms and sums.square:
        text += f"; about {sums.product / sums.square:.3g} times the adapter is in it"
    return [f"{name}: {text}"]


def _bits(dtype: DType) -> int:
    """Significant bits of a floating-point type; half a unit in the last place is at most 2**-bits of the value."""
    return _BITS.get(dtype.name, 24)
