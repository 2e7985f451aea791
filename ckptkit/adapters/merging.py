"""The weights of a model with adapters in them: W + scale * B A, as computed tensors.

In DoRA the rows of that sum get the lengths that the adapter stores: a tile holds whole rows, so they are known.

Source: `Linear.get_delta_weight`, `Embedding.get_delta_weight` and `merge` of PEFT's `tuners/lora/layer.py`, and
`DoraLinearVariant.merge_safe` of `tuners/lora/variants.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.dtypes import DType
from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.formats.peft import MAGNITUDE
from ckptkit.io.computed import computed, digest_of, numbers, operand, recast
from ckptkit.tables.items import Item
from ckptkit.tables.lora import A, B, is_embedding
from ckptkit.tensors import Tensor

if TYPE_CHECKING:
    from ckptkit.io.computed import Values

_WEIGHT = ".weight"
_EMBEDDING_A, _EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
_NARROW = ("F16", "BF16")


@dataclass(frozen=True)
class Term:
    """What one adapter adds to a weight: factor * left @ right.

    Attributes:
        a: A of a linear layer, [rank, in]; of an embedding, [rank, tokens].
        b: B of a linear layer, [out, rank]; of an embedding, [width, rank].
        factor: The scale, times the weight of the adapter.
        of_embedding: Whether it is the factors of an embedding, whose table is the transpose of B A.
    """

    a: Tensor
    b: Tensor
    factor: float
    of_embedding: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight that it fits."""
        out, into = self.b.shape[0], self.a.shape[1]
        return (into, out) if self.of_embedding else (out, into)

    @cached_property
    def _digest(self) -> str:
        return digest_of([self.b if self.of_embedding else self.a])

    def rows(self, start: int, stop: int, *, double: bool) -> Values:
        """Rows of what it adds, in float32 or float64."""
        left, right = self._factors(start, stop, double=double)
        return (left @ right) * left.dtype.type(self.factor)

    def sizes(self, start: int, stop: int) -> Values:
        """The same of the absolute values of all numbers, in float64: what rounding errors are measured by."""
        import numpy as np

        left, right = self._factors(start, stop, double=True)
        return np.asarray((np.abs(left) @ np.abs(right)) * abs(self.factor), np.float64)

    def _factors(self, start: int, stop: int, *, double: bool) -> tuple[Values, Values]:
        whole = operand(self.b if self.of_embedding else self.a, self._digest, double=double)
        if self.of_embedding:
            return numbers(self.a.cols(start, stop), double=double).T, whole.T
        return numbers(self.b.rows(start, stop), double=double), whole


def with_magnitudes(rows: Values, magnitudes: Tensor, start: int, stop: int) -> Values:
    """Rows of a sum, [rows, columns], with the lengths that DoRA has stored for them."""
    import numpy as np

    lengths = np.linalg.norm(rows, axis=1)
    wanted = numbers(magnitudes.rows(start, stop), double=rows.dtype == np.float64)
    found: Values = rows * (wanted / lengths)[:, None].astype(rows.dtype)
    return found


def merged(
    weight: Tensor, terms: Sequence[Term], dtype: DType, *, double: bool, magnitudes: Tensor | None = None
) -> Tensor:
    """A weight with adapters in it: float32 sums (float64 with `double`), rounded once.

    Args:
        weight: The weight, a matrix.
        terms: What the adapters add, in this order.
        dtype: Type of the result.
        double: Whether to compute in float64.
        magnitudes: The lengths of the rows of the result, [rows] (DoRA); or None.
    """

    def values(start: int, stop: int) -> Values:
        total = numbers(weight.rows(start, stop), double=double)
        for term in terms:
            total = total + term.rows(start, stop, double=double)
        return total if magnitudes is None else with_magnitudes(total, magnitudes, start, stop)

    inputs = [weight, *(factor for term in terms for factor in (term.a, term.b))]
    what: tuple[object, ...] = ("merged", double, [(term.factor, term.of_embedding) for term in terms])
    if magnitudes is not None:
        inputs, what = [*inputs, magnitudes], (*what, "magnitudes")
    return computed(dtype, weight.shape, inputs, what, values)


@dataclass(frozen=True)
class Weighted:
    """An opened adapter, and the weight that it is added with."""

    adapter: Checkpoint
    weight: float = 1.0


@dataclass(frozen=True)
class Changes:
    """What adapters change in a model.

    Attributes:
        terms: Hugging Face name of a weight -> what is added to it.
        wholes: Hugging Face name of a tensor -> the tensor that replaces it.
        magnitudes: Hugging Face name of a weight -> the lengths of its rows after all (DoRA).
    """

    terms: Mapping[str, Sequence[Term]]
    wholes: Mapping[str, Tensor]
    magnitudes: Mapping[str, Tensor]


def changes_of(base: Checkpoint, adapters: Sequence[Weighted]) -> Changes:
    """What adapters change in a model.

    Raises:
        InputError: As `with_adapters`.
        UnsupportedError: As `with_adapters`.
        UsageError: As `with_adapters`.
    """
    merger = _Merger(base, None, False)
    for one in adapters:
        merger.add(one)
    merger.check()
    return Changes(merger.terms, merger.wholes, merger.magnitudes)


def with_adapters(
    base: Checkpoint, adapters: Sequence[Weighted], *, dtype: DType | None, double: bool
) -> tuple[Checkpoint, list[str]]:
    """A model with adapters in its weights. All other tensors stay the bytes that they are.

    Args:
        base: The model.
        adapters: The adapters, which are added in this order.
        dtype: Type of the merged tensors, or None for that of the model's.
        double: Whether to compute in float64.

    Returns:
        The model, and a sentence for each loss.

    Raises:
        InputError: An adapter is for another model.
        UnsupportedError: It changes tied weights.
        UsageError: Two adapters replace the same tensor, or one that replaces tensors has a weight.
    """
    merger = _Merger(base, dtype, double)
    for one in adapters:
        merger.add(one)
    return merger.result()


class _Merger:
    """Collects what adapters change in a model, and changes it."""

    def __init__(self, base: Checkpoint, dtype: DType | None, double: bool) -> None:
        self.base, self.dtype, self.double = base, dtype, double
        self.home = {name: item for item in base.items.values() for name in item.parts}
        self.terms: dict[str, list[Term]] = {}
        self.wholes: dict[str, Tensor] = {}
        self.magnitudes: dict[str, Tensor] = {}
        self.lossy: list[str] = []

    def add(self, one: Weighted) -> None:
        """Notes what an adapter changes."""
        adapter, lora = one.adapter, one.adapter.lora
        if lora is None:
            raise UsageError("no adapter", where=adapter.path, hint="the model comes first, then its adapters")
        lora.check_fits(self.base.family, self.base.config, adapter.path)
        for module, linear in lora.linears.items():
            a, b = adapter.tensors[linear.key(A)], adapter.tensors[linear.key(B)]
            self._add(linear.weight, Term(a, b, lora.scales[module] * one.weight), adapter)
        self._add_extras(one)

    def _add_extras(self, one: Weighted) -> None:
        adapter, lora, extras = one.adapter, one.adapter.lora, one.adapter.sidecar.extras
        assert lora is not None
        for name, tensor in extras.items():
            if name.endswith(_EMBEDDING_B):
                continue
            if name.endswith(MAGNITUDE):
                if one.weight != 1:
                    raise UsageError("an adapter of DoRA has no part by weight", where=adapter.path, hint="drop it")
                self.magnitudes[name.removesuffix(MAGNITUDE) + _WEIGHT] = tensor
            elif name.endswith(_EMBEDDING_A):
                module = name.removesuffix(_EMBEDDING_A)
                if (b := extras.get(module + _EMBEDDING_B)) is None:
                    raise InputError(f"{name} has no lora_embedding_B beside it", where=adapter.path)
                scale = lora.config.scale_of(module, tensor.shape[0])
                self._add(f"{module}.weight", Term(tensor, b, scale * one.weight, of_embedding=True), adapter)
            else:
                self._replace(name, tensor, one)

    def _add(self, name: str, term: Term, adapter: Checkpoint) -> None:
        item = self.home.get(name)
        if item is None or item.parts[name] != term.shape:
            raise InputError(f"{name} is not in the model, or has another shape there", where=adapter.path)
        self._refuse_tied(item, name, adapter)
        self.terms.setdefault(name, []).append(term)

    def _replace(self, name: str, tensor: Tensor, one: Weighted) -> None:
        item, where = self.home.get(name), one.adapter.path
        if item is None or item.parts[name] != tensor.shape:
            raise InputError(f"the whole tensor {name} is not in the model, or has another shape there", where=where)
        self._refuse_tied(item, name, one.adapter)
        if name in self.wholes:
            raise UsageError(f"two adapters replace {name}", where=where, hint="merge one of them")
        if one.weight != 1:
            raise UsageError(f"it replaces {name} (modules_to_save), which has no part by weight", where=where)
        self.wholes[name] = tensor

    def _refuse_tied(self, item: Item, name: str, adapter: Checkpoint) -> None:
        if is_embedding(item) and self.base.config.tied:
            raise UnsupportedError(
                f"the model ties {name} to its head, and the adapter changes one of the two",
                where=adapter.path,
                hint="merge it with peft, and save both",
            )

    def check(self) -> None:
        """Whether the lengths of rows are those of one adapter.

        Raises:
            UnsupportedError: Another adapter changes the same weight.
        """
        for name in self.magnitudes:
            if len(self.terms[name]) > 1:
                raise UnsupportedError(
                    f"several adapters change {name}, and one of them is of DoRA, whose lengths are those of all rows",
                    where=self.base.path,
                    hint="merge them one after the other",
                )

    def result(self) -> tuple[Checkpoint, list[str]]:
        """The changed model."""
        self.check()
        touched = {self.home[name].key: self.home[name] for name in (*self.wholes, *self.terms)}
        tensors = {**self.base.tensors, **{key: self._changed(item) for key, item in touched.items()}}
        return replace(self.base, tensors=tensors), self.lossy

    def _changed(self, item: Item) -> Tensor:
        """A Megatron tensor with its changed parts. They must have one type, so all are cast with the first."""
        tensor = self.base.tensors[item.key]
        dtype = self.dtype or tensor.out_dtype
        parts: dict[str, Tensor] = {}
        for name, original in item.unpack(tensor).items():
            part = self.wholes.get(name, original)
            if name in self.terms:
                parts[name] = merged(
                    part, self.terms[name], dtype, double=self.double, magnitudes=self.magnitudes.get(name)
                )
            elif part.out_dtype != dtype or part is not original:
                parts[name] = self._cast(part, dtype, name)
        return item.replaced(tensor if tensor.out_dtype == dtype else recast(tensor, dtype, double=self.double), parts)

    def _cast(self, part: Tensor, dtype: DType, name: str) -> Tensor:
        if part.out_dtype == dtype:
            return part
        if dtype.name in _NARROW and name in self.wholes:
            self.lossy.append(f"{name} of the adapter is rounded ({part.out_dtype} -> {dtype})")
        return recast(part, dtype, double=self.double)
