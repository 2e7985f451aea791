"""An adapter out of two models: a truncated singular value decomposition of the difference, layer by layer.

With D = U S V^T, B is U sqrt(S) and A is sqrt(S) V^T, each cut to the rank: no matrix of that rank is nearer to D.
Small matrices are decomposed in full, large ones on a subspace that holds their largest singular values almost surely.

Source: Eckart and Young, 1936; algorithm 4.4 of Halko, Martinsson and Tropp, 2011 (arXiv 0909.4061).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ckptkit.errors import InputError
from ckptkit.io.computed import TILE, numbers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ckptkit.tensors import Tensor

    Matrix = NDArray[np.float32] | NDArray[np.float64]

IN_FULL = 768
"""Largest shorter side of a matrix that is decomposed in full."""
OVERSAMPLING = 16
"""How many more vectors than the rank the subspace has."""
POWERS = 3
"""How many times the subspace is turned towards the largest singular values."""


@dataclass(frozen=True)
class Wanted:
    """How much of a difference an adapter keeps: one of the two.

    Attributes:
        rank: Its rank.
        energy: The part of the sum of the squares of all elements that it keeps at least, in (0, 1].
    """

    rank: int | None = None
    energy: float | None = None


@dataclass(frozen=True)
class Factors:
    """The factors of a difference.

    Attributes:
        a: A, float32 [rank, in].
        b: B, float32 [out, rank].
        energy: The part of the sum of the squares of the difference's elements that B A has.
    """

    a: NDArray[np.float32]
    b: NDArray[np.float32]
    energy: float

    @property
    def rank(self) -> int:
        """The rank."""
        return int(self.a.shape[0])


@dataclass
class Decomposition:
    """Singular values and vectors of a matrix, as many as are known.

    Attributes:
        left: [out, n].
        values: [n], falling.
        right: [n, in].
        square: Sum of the squares of all elements of the matrix.
        complete: Whether these are all.
    """

    left: Matrix
    values: Matrix
    right: Matrix
    square: float
    complete: bool
    kept: list[float] = field(init=False)

    def __post_init__(self) -> None:
        total, self.kept = 0.0, []
        for value in self.values.tolist():
            total += value * value
            self.kept.append(min(total / self.square, 1.0) if self.square else 1.0)

    def rank_for(self, energy: float) -> int | None:
        """The smallest rank that keeps a part of the energy, or None if the known values do not reach it."""
        reached = (number for number, kept in enumerate(self.kept, start=1) if kept >= energy)
        # Rounding may keep a complete decomposition from reaching 1 by the last bits.
        return next(reached, len(self.kept) if self.complete else None)

    def cut(self, rank: int) -> Factors:
        """The factors of a rank, filled up with zeros where the matrix has less."""
        import numpy as np

        rows, columns = self.left.shape[0], self.right.shape[1]
        a, b = np.zeros((rank, columns), np.float32), np.zeros((rows, rank), np.float32)
        count = min(rank, len(self.values))
        roots = np.sqrt(self.values[:count])
        a[:count], b[:, :count] = roots[:, None] * self.right[:count], self.left[:, :count] * roots
        return Factors(a, b, self.kept[count - 1] if count else 1.0)


def decompose(matrix: Matrix, wanted: Wanted) -> Decomposition:
    """The largest singular values of a matrix, at least as many as are wanted."""
    import numpy as np

    shorter = min(matrix.shape)
    square = sum(float(np.square(matrix[rows], dtype=np.float64).sum()) for rows in _slices(matrix.shape))
    count = (wanted.rank or 32) + OVERSAMPLING
    while shorter > IN_FULL and 4 * count < shorter:
        found = _on_a_subspace(matrix, count, square)
        if wanted.energy is None or found.rank_for(wanted.energy) is not None:
            return found
        count *= 2
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return Decomposition(left, values, right, square, complete=True)


def _slices(shape: tuple[int, ...]) -> Iterator[slice]:
    step = max(TILE // shape[1], 1)
    return (slice(start, start + step) for start in range(0, shape[0], step))


def _on_a_subspace(matrix: Matrix, count: int, square: float) -> Decomposition:
    """The decomposition of a matrix in a subspace of `count` columns; the same one in every run."""
    import numpy as np

    start: Any = np.random.default_rng(0).standard_normal((matrix.shape[1], count)).astype(matrix.dtype)
    basis, _ = np.linalg.qr(matrix @ start)
    for _ in range(POWERS):
        turned, _ = np.linalg.qr(matrix.T @ basis)
        basis, _ = np.linalg.qr(matrix @ turned)
    left, values, right = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    return Decomposition(basis @ left, values, right, square, complete=False)


def difference_of(name: str, base: Tensor, tuned: Tensor) -> Matrix:
    """Tuned minus base, float32; float64 if one is.

    Raises:
        InputError: An element is not finite.
    """
    import numpy as np

    left, right = numbers(base), numbers(tuned)
    with np.errstate(all="ignore"):
        found: Matrix = right - left
    if not bool(np.isfinite(found).all()):
        raise InputError(f"{name} has elements that are not finite, or differ by more than float32 holds")
    return found


def factors_of(matrices: Sequence[Callable[[], Matrix]], wanted: Wanted) -> list[Factors]:
    """The factors of matrices that must have one rank (those of all experts of a layer).

    Args:
        matrices: Each makes a matrix, which may be asked for twice: one at a time is in memory.
        wanted: What is kept of each.
    """
    if len(matrices) == 1 and wanted.energy is not None:
        found = decompose(matrices[0](), wanted)
        return [found.cut(found.rank_for(wanted.energy) or 1)]
    rank = wanted.rank
    if rank is None:
        assert wanted.energy is not None
        rank = max(decompose(make(), wanted).rank_for(wanted.energy) or 1 for make in matrices)
    return [decompose(make(), Wanted(rank=rank)).cut(rank) for make in matrices]
