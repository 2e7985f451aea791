"""An adapter in the layouts that Megatron has for it, and back.

Megatron has one rank and one alpha for all layers. So a layer of a smaller rank gets rows of zeros in A and columns of
zeros in B, which change nothing and stay zero in training. A layer of another scale gets the ratio of the two scales
into B. That is exact for powers of two.

`fused` and `peft` have one pair of factors for all parts of a Megatron tensor. Where the parts share A, their B are
laid out as their weights are. Where they do not, their A are stacked, and each B has zeros for the ranks of the others.
The lengths of rows that DoRA has are laid out as the weight's rows are, in `fused` alone.

A `Record` keeps which ranks belong to which part, and no values. As long as the zeros are there, the parts are taken
apart again. Once training has filled them, each part gets all ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import frexp
from typing import TYPE_CHECKING

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.lora.record import Lora
from ckptkit.checkpoints.lora.values import ValueReader, same_values
from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.formats.peft import MAGNITUDE
from ckptkit.formats.peft_config import alpha_for
from ckptkit.io.computed import computed
from ckptkit.tables.items import Item
from ckptkit.tables.lora import (
    CANONICAL,
    FUSED,
    SIDES,
    A,
    B,
    Linear,
    fused,
    has_magnitudes,
    has_parts,
    magnitudes,
    part_of,
    single,
)
from ckptkit.tensors import Tensor, hstack, vstack

if TYPE_CHECKING:
    from ckptkit.io.computed import Values


@dataclass(frozen=True)
class Ranks:
    """The ranks of a module in a Megatron adapter.

    Attributes:
        count: How many they are: the module's own rank.
        first: The first of them, among those of its tensor.
        scale: The module's own factor of B A.
    """

    count: int
    first: int
    scale: float

    @property
    def stop(self) -> int:
        """The rank after the last of them."""
        return self.first + self.count


@dataclass(frozen=True)
class Record:
    """How the ranks of a Megatron adapter are made up. It is data for the way back, and holds no values.

    Attributes:
        layout: `fused`, `canonical` or `peft`.
        rank: The rank of all factors.
        scale: The factor of B A of all of them.
        modules: Hugging Face name of a module -> its ranks.
        names: Names and shapes in the original PEFT file, where the sidecar has no header of it.
    """

    layout: str
    rank: int
    scale: float
    modules: Mapping[str, Ranks] = field(default_factory=dict)
    names: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def alpha(self) -> float:
        """Megatron's alpha: the scale is alpha / rank."""
        return alpha_for(self.scale, self.rank)

    def to_json(self) -> dict[str, object]:
        """JSON values."""
        modules = {name: [own.count, own.first, own.scale] for name, own in self.modules.items()}
        names = {name: list(shape) for name, shape in self.names.items()}
        return {"layout": self.layout, "rank": self.rank, "alpha": self.alpha, "modules": modules, "names": names}


@dataclass(frozen=True)
class Group:
    """The factors of one Megatron tensor: those of its parts that have any.

    Attributes:
        item: The Megatron tensor.
        linears: The parts.
        fused: Whether they have one pair of factors.
        shared: Whether they then share A.
    """

    item: Item
    linears: tuple[Linear, ...]
    fused: bool
    shared: bool = False


def _groups(lora: Lora, layout: str, *, sequential: bool) -> list[Group]:
    """The factors by Megatron tensor, in table order; nothing is known of shared ones yet."""
    found: dict[str, list[Linear]] = {}
    for linear in lora.linears.values():
        found.setdefault(linear.item.key, []).append(linear)
    groups = []
    for parts in found.values():
        item, linears = parts[0].item, tuple(sorted(parts, key=lambda part: part.index))
        groups.append(Group(item, linears, is_fused(item, layout, sequential=sequential)))
    return groups


def _sharing(source: Checkpoint, groups: Sequence[Group]) -> list[Group]:
    """Groups that know whether they share A, for which values are read."""
    with ValueReader() as reader:
        return [
            replace(group, shared=reader.all_same([source.tensors[linear.key(A)] for linear in group.linears]))
            if group.fused
            else group
            for group in groups
        ]


def is_fused(item: Item, layout: str, *, sequential: bool) -> bool:
    """Whether the parts of a Megatron tensor have one pair of factors.

    `CanonicalLoRA` of Megatron-Bridge, too, has one for the experts of a grouped module.
    """
    return has_parts(item) and (layout != CANONICAL or (item.expert is not None and not sequential))


def laid_out(
    source: Checkpoint, layout: str, multiple: int, *, sequential: bool, lossy: bool
) -> tuple[Checkpoint, Record, list[str]]:
    """An adapter in a layout of Megatron.

    Args:
        source: The adapter, in its canonical view.
        layout: `fused`, `canonical` or `peft`.
        multiple: The rank must be a multiple of this number, so that it divides over ranks.
        sequential: Whether each expert is a module of its own.
        lossy: Whether factors may be rounded.

    Returns:
        The adapter in that layout, the record for the way back, and a sentence for each loss.

    Raises:
        UnsupportedError: Megatron cannot express it.
        UsageError: Its scales differ by other ratios than powers of two, and `lossy` is false.
    """
    lora = source.lora
    assert lora is not None
    found = _groups(lora, layout, sequential=sequential)
    _check_expressible(source, layout, found)
    found = _sharing(source, found)
    modules: dict[str, Ranks] = {}
    for group in found:
        at = 0
        for linear in group.linears:
            count = source.tensors[linear.key(A)].shape[0]
            modules[linear.module] = Ranks(count, at, lora.scales[linear.module])
            at += count if group.fused and not group.shared else 0
    rank = max(own.stop for own in modules.values())
    rank = -(-rank // multiple) * multiple
    scale = Counter(lora.scales[module] for module in modules).most_common(1)[0][0]
    record = Record(layout, rank, scale, modules, {} if source.sidecar.headers else lora.names)
    writer = _Writer(source, record, lossy)
    items: dict[str, Item] = {}
    tensors: dict[str, Tensor] = {}
    for group in found:
        make = writer.fused if group.fused else writer.singles
        for item, tensor in make(group):
            items[item.key], tensors[item.key] = item, tensor
        if lora.config.dora:
            item = magnitudes(group.item)
            items[item.key], tensors[item.key] = item, writer.magnitudes(group)
    # What a source has beside its factors is in the tensors now: the rest was refused.
    adapter = replace(source, items=items, tensors=tensors, sidecar=replace(source.sidecar, extras={}))
    return adapter, record, writer.losses()


def _check_expressible(source: Checkpoint, layout: str, found: Sequence[Group]) -> None:
    extras = [name for name in source.sidecar.extras if not name.endswith(MAGNITUDE)]
    if extras:
        name = min(extras)
        kind = "factors of an embedding" if "lora_embedding" in name else "a whole tensor (modules_to_save, or a bias)"
        raise UnsupportedError(
            f"adapters of Megatron have no place for {name}, {kind}",
            where=source.path,
            hint="`ckptkit adapter merge` puts it into the model",
        )
    assert source.lora is not None
    if source.lora.config.dora:
        _check_magnitudes(source, layout, found)
    for group in found:
        if not group.fused and any(slot.slot.repeats is not None for slot in group.item.slots):
            raise UnsupportedError(
                f"--adapter-layout {layout} has no form for {group.item.key}, a part of which repeats another",
                where=source.path,
                hint=f"use --adapter-layout {FUSED}",
            )


def _check_magnitudes(source: Checkpoint, layout: str, found: Sequence[Group]) -> None:
    hint = "`ckptkit adapter merge` puts it into the model"
    if layout != FUSED:
        what = f"--adapter-layout {layout} has no form for the lengths of rows that DoRA has"
        raise UnsupportedError(what, where=source.path, hint=f"use --adapter-layout {FUSED}")
    for group in found:
        if not has_magnitudes(group.item):
            why = "an expert's" if group.item.expert is not None else "some rows of which the model does not use"
            what = f"DoRA of Megatron has no form for {group.item.key}, {why}"
            raise UnsupportedError(what, where=source.path, hint=hint)
        if others := sorted(group.item.parts.keys() - {linear.weight for linear in group.linears}):
            what = f"DoRA of Megatron has one length for each row of {group.item.key}"
            raise UnsupportedError(f"{what}, the adapter has none for {others[0]}", where=source.path, hint=hint)


@dataclass
class _Writer:
    """Makes the factors of a layout."""

    source: Checkpoint
    record: Record
    lossy: bool
    rounded: list[str] = field(default_factory=list)

    def fused(self, group: Group) -> Iterator[tuple[Item, Tensor]]:
        """A and B of a whole Megatron tensor."""
        item, rank = group.item, self.record.rank
        firsts = [
            self.source.tensors[linear.key(A)] for linear in (group.linears[:1] if group.shared else group.linears)
        ]
        try:
            first = vstack(firsts)
        except ValueError as error:
            raise InputError(f"{item.key}: {error}", hint="--dtype casts the factors to one type") from None
        a = fused(item, A, rank, self.record.layout)
        yield a, _padded_rows(first, rank)
        b, present = fused(item, B, rank, self.record.layout), {linear.index: linear for linear in group.linears}
        parts = [
            self._wide(present[index]) if index in present else _zeros(first, (rows, rank))
            for index, (rows, _) in enumerate(item.parts.values())
        ]
        yield b, b.pack(parts)

    def singles(self, group: Group) -> Iterator[tuple[Item, Tensor]]:
        """A and B of each linear layer, or of the only one of its Megatron tensor."""
        rank, layout = self.record.rank, self.record.layout
        for linear in group.linears:
            for side, tensor in (
                (A, _padded_rows(self.source.tensors[linear.key(A)], rank)),
                (B, self._wide(linear)),
            ):
                whole = not has_parts(linear.item)
                yield fused(linear.item, side, rank, layout) if whole else single(linear, side, rank), tensor

    def magnitudes(self, group: Group) -> Tensor:
        """The lengths of the rows of a whole Megatron tensor."""
        extras = self.source.sidecar.extras
        return magnitudes(group.item).pack([extras[linear.module + MAGNITUDE] for linear in group.linears])

    def _wide(self, linear: Linear) -> Tensor:
        """B of a linear layer, with the common scale and columns of zeros for the ranks of others."""
        own, b = self.record.modules[linear.module], self.source.tensors[linear.key(B)]
        b = self._rescaled(b, own.scale / self.record.scale, linear.module)
        rows, rest = b.shape[0], self.record.rank - own.stop
        return hstack([_zeros(b, (rows, own.first)), b, _zeros(b, (rows, rest))])

    def _rescaled(self, b: Tensor, ratio: float, module: str) -> Tensor:
        if ratio == 1:
            return b
        if not _is_power_of_two(ratio) and not self.lossy:
            raise UsageError(
                f"Megatron has one scale for all layers, and that of {module} is {ratio:g} times the most common one",
                where=self.source.path,
                hint="--lossy rounds B to it; `adapter merge` needs no common scale",
            )
        scaled = times(b, ratio)
        if not _is_power_of_two(ratio) or not same_values(times(scaled, 1 / ratio), b):
            if not self.lossy:
                raise UsageError(
                    f"B of {module} times {ratio:g} leaves the range of {b.out_dtype}",
                    where=self.source.path,
                    hint="--dtype float32 has room for it, and --lossy rounds it",
                )
            self.rounded.append(module)
        return scaled

    def losses(self) -> list[str]:
        """A sentence if factors were rounded."""
        some = f" ({self.rounded[0]}, ...)" if self.rounded else ""
        return [f"lora_B of {len(self.rounded)} modules is rounded to the common scale{some}"] if self.rounded else []


def _zeros(like: Tensor, shape: tuple[int, int]) -> Tensor:
    zeros = Tensor.full(like.dtype, shape)
    return zeros if like.cast is None else zeros.astype(like.cast)


def _padded_rows(a: Tensor, rank: int) -> Tensor:
    missing = rank - a.shape[0]
    return vstack([a, _zeros(a, (missing, a.shape[1]))]) if missing else a


def _is_power_of_two(value: float) -> bool:
    return value > 0 and frexp(value)[0] == 0.5


def times(tensor: Tensor, factor: float) -> Tensor:
    """A tensor of floating-point numbers, multiplied and rounded once."""
    from ckptkit.io.computed import numbers

    def values(start: int, stop: int) -> Values:
        return numbers(tensor.rows(start, stop), double=True) * factor

    return computed(tensor.out_dtype, tensor.shape, [tensor], ("times", factor), values)


@dataclass(frozen=True)
class Found:
    """A pair of factors as a Megatron checkpoint holds it.

    Attributes:
        item: The Megatron tensor that it is for.
        index: The part of it, or None for all parts.
        layout: The layout of its names.
        a: A.
        b: B, whole and in the layout of the weight.
        magnitudes: The lengths of all rows, in the layout of the weight (DoRA); or None.
    """

    item: Item
    index: int | None
    layout: str
    a: Tensor
    b: Tensor
    magnitudes: Tensor | None = None

    @cached_property
    def linears(self) -> list[tuple[Linear, Tensor]]:
        """The linear layers, each with its rows of B."""
        if self.index is not None:
            return [(part_of(self.item, self.index), self.b)]
        parts = fused(self.item, B, self.b.shape[1], self.layout).unpack(self.b)
        return [(part_of(self.item, index), part) for index, part in enumerate(parts.values())]

    @property
    def lengths(self) -> dict[str, Tensor]:
        """Hugging Face name of a module -> the lengths of its rows, where there are any."""
        if self.magnitudes is None:
            return {}
        parts = magnitudes(self.item).unpack(self.magnitudes)
        return {part_of(self.item, index).module: part for index, part in enumerate(parts.values())}


def taken_apart(laid: Checkpoint, record: Record, *, sequential: bool) -> Iterator[Found]:
    """The pairs of factors of an adapter that `laid_out` has laid out.

    Args:
        laid: The adapter in that layout, or other tensors in the place of its factors.
        record: The record of that layout.
        sequential: Whether each expert is a module of its own.
    """
    assert laid.lora is not None
    rank, layout = record.rank, record.layout
    for group in _groups(laid.lora, layout, sequential=sequential):
        if group.fused or not has_parts(group.item):
            keys = [fused(group.item, side, rank, layout).key for side in SIDES]
            yield Found(group.item, None, layout, *(laid.tensors[key] for key in keys))
            continue
        for linear in group.linears:
            keys = [single(linear, side, rank).key for side in SIDES]
            yield Found(group.item, linear.index, layout, *(laid.tensors[key] for key in keys))


@dataclass
class Canonical:
    """The canonical view of a Megatron adapter, as it is made.

    Attributes:
        linears: Hugging Face name of a module -> the linear layer.
        scales: Hugging Face name of a module -> the factor of B A.
        items: Name in `canonical` -> table item.
        tensors: Name in `canonical` -> factor.
        trained: Modules that got all ranks of their tensor, because training has mixed them.
    """

    linears: dict[str, Linear] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    items: dict[str, Item] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    trained: list[str] = field(default_factory=list)

    def add(self, linear: Linear, a: Tensor, b: Tensor, scale: float) -> None:
        """Adds the factors of a layer."""
        self.linears[linear.module], self.scales[linear.module] = linear, scale
        for side, tensor in zip(SIDES, (a, b), strict=True):
            item = single(linear, side, a.shape[0])
            self.items[item.key], self.tensors[item.key] = item, tensor


def canonical(found: Sequence[Found], scale_of: Callable[[int], float], record: Record | None) -> Canonical:
    """The canonical view of the factors of a Megatron checkpoint.

    Args:
        found: The factors.
        scale_of: Rank -> the factor of B A.
        record: How the ranks were made up, if that is known; values are read to see whether it still holds.
    """
    view = Canonical()
    if record is None:
        for one in found:
            for linear, b in one.linears:
                view.add(linear, one.a, b, scale_of(one.a.shape[0]))
        return view
    with ValueReader() as reader:
        for one in found:
            _take_apart(view, one, record, reader)
    return view


def _take_apart(view: Canonical, one: Found, record: Record, reader: ValueReader) -> None:
    """Adds the layers of a tensor: each with its own ranks, or with all of them where training has mixed them."""
    known = [(linear, b, record.modules.get(linear.module)) for linear, b in one.linears]
    if not _untouched(one.a, [(b, own) for _, b, own in known], reader):
        for linear, b, _ in known:
            view.add(linear, one.a, b, record.scale)
            view.trained.append(linear.module)
        return
    for linear, b, own in known:
        if own is not None:
            part, ratio = b.cols(own.first, own.stop), own.scale / record.scale
            factor = part if ratio == 1 else times(part, 1 / ratio)
            view.add(linear, one.a.rows(own.first, own.stop), factor, own.scale)


def _untouched(a: Tensor, parts: Sequence[tuple[Tensor, Ranks | None]], reader: ValueReader) -> bool:
    """Whether what a record says is zero still is: ranks of other parts in B, and ranks of none in A."""
    rank, claimed = a.shape[0], set[int]()
    for b, own in parts:
        first, stop = (own.first, own.stop) if own is not None else (0, 0)
        claimed.update(range(first, stop))
        others = [(0, first), (stop, rank)]
        if not all(start == end or reader.is_zero(b.cols(start, end)) for start, end in others):
            return False
    free = [number for number in range(rank) if number not in claimed]
    return not free or reader.is_zero(a.rows(free[0], free[-1] + 1))
