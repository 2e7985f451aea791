"""Averages of checkpoints: of several models, or of the iterations of one run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.dtypes import DType
from ckptkit.editing.inputs import Input
from ckptkit.editing.numbers import WIDE, weighted_mean
from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.io.castable import CASTABLE
from ckptkit.io.computed import recast
from ckptkit.io.plan import Comparison
from ckptkit.tables.items import Item
from ckptkit.tensors import Tensor

UNIFORM, EMA, LINEAR, SQRT = "uniform", "ema", "linear", "sqrt"
DECAYS = (UNIFORM, EMA, LINEAR, SQRT)
_LARGEST_WEIGHT = 1e6
"""Far beyond what anybody weighs with, and far below what sums in float32 overflow at."""


def decayed(decay: str, count: int) -> list[float]:
    """Weights of checkpoints, the oldest first.

    `uniform` weighs all alike. `ema:D` is the exponential moving average that starts with the oldest one and keeps D of
    itself at each further one. With `linear` the k-th oldest of n has the weight k, with `sqrt` the square root of k.

    Args:
        decay: `uniform`, `ema:D`, `linear` or `sqrt`.
        count: Number of checkpoints.

    Raises:
        UsageError: There is no such decay, or D is not between 0 and 1.
    """
    name, _, argument = decay.partition(":")
    if name not in DECAYS or bool(argument) != (name == EMA):
        raise UsageError(f"--decay {decay}", hint="uniform, ema:D (as in ema:0.9), linear or sqrt")
    if name == UNIFORM:
        return [1.0] * count
    if name == LINEAR:
        return [float(number) for number in range(1, count + 1)]
    if name == SQRT:
        return [math.sqrt(number) for number in range(1, count + 1)]
    kept = _share(argument)
    return [(1.0 if not number else 1 - kept) * kept ** (count - 1 - number) for number in range(count)]


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise UsageError(f"--decay ema:{text}", hint="a number between 0 and 1, as in ema:0.9")
    return value


def check_weights(weights: Sequence[float], count: int) -> list[float]:
    """Weights as stated by the user.

    Raises:
        UsageError: There is not one for each model, one is not finite or too large, or their sum is 0.
    """
    if len(weights) != count:
        raise UsageError(f"--weights has {len(weights)} numbers for {count} models")
    if not all(abs(weight) <= _LARGEST_WEIGHT for weight in weights) or abs(sum(weights)) < 1e-8:
        most = f"{_LARGEST_WEIGHT:g}"
        raise UsageError(f"--weights must be numbers from -{most} to {most}, and their sum not 0: it is divided by")
    return [float(weight) for weight in weights]


@dataclass(frozen=True)
class Averaged:
    """An average.

    Attributes:
        model: It.
        averaged: Number of Hugging Face tensors that are computed.
        copied: Number of tensors that all inputs take from the same bytes.
        notes: Sentences for the user.
    """

    model: Checkpoint
    averaged: int
    copied: int
    notes: tuple[str, ...]


def averaged(
    inputs: Sequence[Input], weights: Sequence[float], *, dtype: DType | None, double: bool | None
) -> Averaged:
    """The weighted mean of models that are alike.

    Everything but the floating-point tensors is that of the first one.

    Args:
        inputs: The models, of equal configs.
        weights: A weight for each; they are divided by their sum.
        dtype: Type of the result; None for that of the first model's tensors.
        double: Whether to sum in float64; None for float64 where the result has 32 bits or more.

    Raises:
        InputError: A model has tensors that another lacks.
        UnsupportedError: A tensor's type cannot be computed with.
    """
    return _Averager(inputs, weights, dtype, double).result()


class _Averager:
    def __init__(
        self, inputs: Sequence[Input], weights: Sequence[float], dtype: DType | None, double: bool | None
    ) -> None:
        self.inputs, self.weights, self.dtype, self.double = inputs, weights, dtype, double
        self.models = [one.model for one in inputs]
        self.comparisons: list[Comparison] = []
        self.types: Counter[str] = Counter()
        self.averaged = self.copied = 0

    def result(self) -> Averaged:
        first = self.models[0]
        tensors = {key: self._packed(key, item) for key, item in first.items.items()}
        sidecar = replace(first.sidecar, extras=self._extras())
        comparisons = [check for model in self.models for check in model.comparisons]
        model = replace(
            first,
            tensors=tensors,
            sidecar=sidecar,
            padding={},
            comparisons=(*comparisons, *self.comparisons),
            coverage={"averaged": self.averaged, "copied": self.copied},
        )
        notes = [f"{count:,} tensors are averaged of {types}" for types, count in self.types.items()]
        return Averaged(model, self.averaged, self.copied, tuple(notes))

    def _packed(self, key: str, item: Item) -> Tensor:
        """A Megatron tensor, averaged part by part, so that parts are read as they lie in Hugging Face files."""
        wholes = [model.tensors[key] for model in self.models]
        if not item.hf or all(whole.same_bytes_as(wholes[0]) for whole in wholes[1:]):
            self.copied += len(item.hf)
            return wholes[0]
        pieces = [item.unpack(whole) for whole in wholes]
        dtype = self.dtype or wholes[0].out_dtype
        parts = {name: self._mean(name, [piece[name] for piece in pieces], dtype) for name in item.hf}
        slots = wholes[0]
        if slots.out_dtype != dtype and slots.dtype.name in CASTABLE:
            slots = recast(slots, dtype, double=dtype.name in WIDE)
        return item.replaced(slots, parts)

    def _mean(self, name: str, tensors: Sequence[Tensor], dtype: DType) -> Tensor:
        first = tensors[0]
        if not first.dtype.is_float:
            self.copied += 1
            self.comparisons += [
                Comparison(first, other, f"{name} of {self.inputs[0].name} and of {source.name}")
                for other, source in zip(tensors[1:], self.inputs[1:], strict=True)
            ]
            return first
        for tensor, source in zip(tensors, self.inputs, strict=True):
            if tensor.dtype.name not in CASTABLE or dtype.name not in CASTABLE:
                raise UnsupportedError(f"{name} is {tensor.dtype}: no numbers to average", where=source.name)
        self.averaged += 1
        if len(types := dict.fromkeys(str(tensor.out_dtype) for tensor in tensors)) > 1:
            self.types[f"{' and '.join(types)}, and written as {dtype}"] += 1
        double = dtype.name in WIDE if self.double is None else self.double
        return weighted_mean(tensors, self.weights, dtype, double=double)

    def _extras(self) -> dict[str, Tensor]:
        """The tensors that have no place in Megatron: towers are averaged, too."""
        names = [model.sidecar.extras.keys() for model in self.models]
        found: dict[str, Tensor] = {}
        for name in dict.fromkeys(name for some in names for name in some):
            held = [model.sidecar.extras.get(name) for model in self.models]
            tensors = [tensor for tensor in held if tensor is not None]
            if len(tensors) < len(held):
                if self.models[0].family.follows_from_config(name, self.models[0].config):
                    continue
                lacking = self.inputs[held.index(None)].name
                raise InputError(f"there is no {name}, which others have", where=lacking)
            if any(tensor.shape != tensors[0].shape for tensor in tensors):
                raise InputError(f"{name} differs in shape between the models", where=self.inputs[0].name)
            if all(tensor.same_bytes_as(tensors[0]) for tensor in tensors[1:]):
                self.copied += 1
                found[name] = tensors[0]
            else:
                found[name] = self._mean(name, tensors, self.dtype or tensors[0].out_dtype)
        return found
