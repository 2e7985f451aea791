"""Rows of embeddings and heads for another tokenizer, model by model, before these are merged.

Source: `PermutedVocabulary` in `tokenizer/embed.py` of mergekit 0.1.5.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ckptkit.dtypes import DType
from ckptkit.editing.recipes import TokenRow
from ckptkit.errors import InputError
from ckptkit.io.computed import Once, computed, numbers, tiles
from ckptkit.tensors import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ckptkit.io.computed import Values

ZEROS, MEAN, PADDING = -1, -2, -3
"""In place of a model's number: zeros, a mean of rows of several models, and the mean of all rows above."""

Pick = tuple[int, int]
"""Where a row comes from: (number of the model, row there), or (one of the above, number of the mean)."""


@dataclass(frozen=True)
class Picks:
    """The rows of the table of one model.

    Attributes:
        rows: int32 `[new rows, 2]`: a `Pick` for each.
        means: Rows whose means are rows.
    """

    rows: NDArray[np.int32]
    means: tuple[tuple[Pick, ...], ...] = ()

    @property
    def digest(self) -> str:
        """A digest of both."""
        return hashlib.sha256(self.rows.tobytes() + repr(self.means).encode()).hexdigest()


@dataclass(frozen=True)
class TokenRows:
    """The rows of a new tokenizer.

    Attributes:
        tokens: Token -> id, from 0 without gaps.
        owned: Model -> its own tokens and their rows.
        wanted: Token -> where models that lack it take its row from.
        multiple: Number of rows that the vocabulary is padded to a multiple of.
        where: The recipe, for messages.
    """

    tokens: Mapping[str, int]
    owned: Mapping[str, Mapping[str, int]]
    wanted: Mapping[str, TokenRow]
    multiple: int | None
    where: object

    @property
    def size(self) -> int:
        """Number of rows."""
        return -(-len(self.tokens) // (self.multiple or 1)) * (self.multiple or 1)

    def tables(self, models: Sequence[str], base: str | None, tables: Sequence[Tensor], dtype: DType) -> list[Tensor]:
        """The tables of models with the new rows.

        Args:
            models: Names of the models.
            base: The base model, or None.
            tables: Their tables, of one width.
            dtype: Type of the result, in which means are computed.
        """
        given = [table if table.out_dtype == dtype else table.astype(dtype) for table in tables]
        return [_permuted(given, picks, dtype) for picks in self.picks(models, base, [one.shape[0] for one in tables])]

    def picks(self, models: Sequence[str], base: str | None, heights: Sequence[int]) -> list[Picks]:
        """For each model where its rows come from.

        Raises:
            InputError: The recipe takes a row from a model that does not have it.
        """
        import numpy as np

        rows = np.full((len(models), self.size, 2), (PADDING, 0), np.int32)
        means: list[tuple[Pick, ...]] = []
        for token, number in self.tokens.items():
            own = [self.owned[model].get(token) for model in models]
            wanted = self.wanted.get(token)
            force = wanted is not None and wanted.force
            default: Pick | None = None
            if force or None in own:
                default = self._default(token, wanted, own, models, base, heights, means)
            for at, row in enumerate(own):
                pick = default if row is None or force else (at, row)
                assert pick is not None
                rows[at, number] = pick
        return [Picks(some, tuple(means)) for some in rows]

    def _default(
        self,
        token: str,
        wanted: TokenRow | None,
        own: Sequence[int | None],
        models: Sequence[str],
        base: str | None,
        heights: Sequence[int],
        means: list[tuple[Pick, ...]],
    ) -> Pick:
        """The row of a token in the models that lack it.

        That of the recipe; of the only model that has it; of the base model; the mean of those that have it.
        """
        if wanted is not None:
            return self._wanted(token, wanted, models, heights)
        there = [(at, row) for at, row in enumerate(own) if row is not None]
        if len(there) <= 1:
            return there[0] if there else (ZEROS, 0)
        if base in models and (row := own[models.index(base)]) is not None:
            return models.index(base), row
        means.append(tuple(there))
        return MEAN, len(means) - 1

    def _wanted(self, token: str, wanted: TokenRow, models: Sequence[str], heights: Sequence[int]) -> Pick:
        if wanted.model is None:
            return ZEROS, 0
        place = f"tokenizer.tokens.{token[:60]}"
        if wanted.model not in models:
            raise InputError(f"{place}: {wanted.model[:80]} is none of the models", where=self.where)
        at = models.index(wanted.model)
        asked = token if wanted.token is None else wanted.token
        row = asked if isinstance(asked, int) else self.owned[wanted.model].get(asked)
        if row is None or row >= heights[at]:
            what = f"{place}: {wanted.model[:80]} has no row for {str(asked)[:60]!r}"
            raise InputError(what, where=self.where)
        return at, row


def _permuted(tables: Sequence[Tensor], picks: Picks, dtype: DType) -> Tensor:
    """A table of the picked rows. One whose rows all stay where they are is that table."""
    import numpy as np

    count, width = len(picks.rows), tables[0].shape[1]
    first = int(picks.rows[0, 0])
    if first >= 0 and (picks.rows[:, 0] == first).all() and (picks.rows[:, 1] == np.arange(count)).all():
        return tables[first].rows(0, count)
    padding = Once(lambda: _mean_above(tables, picks, dtype))

    def values(start: int, stop: int) -> Values:
        return _picked(tables, picks, start, stop, dtype, padding)

    return computed(dtype, (count, width), tables, ("token rows", picks.digest), values)


def _picked(
    tables: Sequence[Tensor], picks: Picks, start: int, stop: int, dtype: DType, padding: Once[Any] | None
) -> Values:
    """Rows `start` to `stop` of a table."""
    import numpy as np

    double = dtype.name == "F64"
    found = np.zeros((stop - start, tables[0].shape[1]), np.float64 if double else np.float32)
    for top, bottom in _runs(picks.rows, start, stop):
        source, row = map(int, picks.rows[top])
        into = found[top - start : bottom - start]
        if source >= 0:
            into[:] = numbers(tables[source].rows(row, row + bottom - top), double=double)
        elif source == MEAN:
            into[:] = _mean(tables, picks.means[row], dtype)
        elif source == PADDING and padding is not None:
            into[:] = padding()
    return found


def _runs(rows: NDArray[np.int32], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Runs of new rows that are successive rows of one table, or alike: (first, the one after the last)."""
    import numpy as np

    some = rows[start:stop]
    step = np.where(some[:-1, 0] >= 0, 1, 0)
    ends = (np.diff(some[:, 0]) != 0) | (np.diff(some[:, 1]) != step)
    edges = [start, *(start + 1 + np.flatnonzero(ends)).tolist(), stop]
    yield from pairwise(edges)


def _mean(tables: Sequence[Tensor], rows: Sequence[Pick], dtype: DType) -> Values:
    """The mean of rows, rounded after each step, as torch does it in this type."""
    import numpy as np

    from ckptkit.io.casts import rounded

    double = dtype.name == "F64"
    total: Any = (np.float64 if double else np.float32)(0)
    for source, row in rows:
        total = rounded(total + numbers(tables[source].rows(row, row + 1), double=double)[0], dtype)
    return rounded(total / total.dtype.type(len(rows)), dtype)


def _mean_above(tables: Sequence[Tensor], picks: Picks, dtype: DType) -> NDArray[np.float64]:
    """The mean of all rows that are no padding."""
    import numpy as np

    width = tables[0].shape[1]
    count = int(np.count_nonzero(picks.rows[:, 0] != PADDING))
    total = np.zeros(width)
    for start, stop in tiles((count, width)):
        total += _picked(tables, picks, start, stop, dtype, None).sum(axis=0, dtype=np.float64)
    return total / count
