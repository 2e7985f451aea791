"""Gradients of an adapter's factors under the names of Hugging Face's modules, from peft and from Megatron's layouts.

Megatron may hold the factors of several modules as one: A once, where they share it, and B side by side, with zeros for
the ranks of the others. So its gradient of A is the sum of theirs, and its gradient of B holds theirs as blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.lora.layouts import Found, Record, taken_apart, times
from ckptkit.checkpoints.lora.peft_directory import open_peft_files
from ckptkit.dtypes import DTYPES
from ckptkit.errors import UnsupportedError, VerificationError
from ckptkit.formats.hf import HfFiles
from ckptkit.formats.peft import PREFIX, open_peft
from ckptkit.io.computed import computed, numbers
from ckptkit.io.plan import source_files
from ckptkit.sharding.grid import Parallelism
from ckptkit.tables.lora import SIDES, A, B, Linear
from ckptkit.tensors import Tensor
from ckptkit.verification.ranks.adapters import LaidOut
from ckptkit.verification.training import files
from ckptkit.verification.training.names import Named, joined

if TYPE_CHECKING:
    from ckptkit.io.computed import Values

AND = " + "
"""Between the names of modules whose factors count as one."""


def is_factor(name: str) -> bool:
    """Whether a parameter of a model with modules of peft is a factor of the adapter."""
    return any(f".lora_{side}." in name for side in SIDES)


def stored_name(name: str) -> str:
    """The name in the adapter's file of a factor in memory."""
    return f"{PREFIX}{name.replace('.default.', '.')}"


def of_peft(adapter: str | Path, base: Checkpoint, folder: str | Path, kind: str) -> Named:
    """What a run in peft wrote.

    Args:
        adapter: The adapter that it ran, a PEFT directory.
        base: The model that it is for.
        folder: Where it wrote.
        kind: `files.GRADIENTS` or `files.UPDATES`.

    Raises:
        VerificationError: peft has other factors in memory than the directory has.
    """
    stored, found = open_peft(Path(adapter)), files.read(folder, kind, files.WHOLE)
    if others := sorted(found.keys() ^ stored.tensors.keys()):
        raise VerificationError(f"peft trains other factors than the adapter has, {others[0]} first", where=adapter)
    reference = HfFiles(base.path, base.sidecar.config, {}, {}, dict(base.sidecar.small))
    return _of_modules(open_peft_files(replace(stored, tensors=found), reference))


def of_ranks(laid: LaidOut, grid: Parallelism, folder: str | Path, kind: str) -> Named:
    """What the ranks of a grid wrote.

    Args:
        laid: The adapter as they ran it.
        grid: Their grid.
        folder: Where they wrote it.
        kind: `files.GRADIENTS`, or `files.UPDATES`, which are those of the factors that Megatron has.

    Raises:
        InputError: Shards are missing or do not fit.
    """
    whole = joined(laid.checkpoint, grid, folder, kind)
    return replace(_apart(replace(laid.checkpoint, tensors=dict(whole.tensors)), laid.record), copies=whole.comparisons)


def _apart(laid: Checkpoint, record: Record) -> Named:
    """What is in the place of an adapter's factors, by module."""
    named = Named({})
    for found in taken_apart(laid, record, sequential=True):
        _take(found, record, named)
    return named


def _of_modules(adapter: Checkpoint) -> Named:
    """What is in the place of the factors of an adapter in its canonical view."""
    assert adapter.lora is not None
    linears = adapter.lora.linears.values()
    return Named({_name(linear, side): adapter.tensors[linear.key(side)] for linear in linears for side in SIDES})


def _take(found: Found, record: Record, named: Named) -> None:
    """Puts the parts of a pair where they belong."""
    rank = record.rank
    used = max(record.modules[linear.module].stop for linear, _ in found.linears if linear.module in record.modules)
    if used < rank:
        named.unused[f"ranks from {used} on of A of {found.item.key}"] = found.a.rows(used, rank)
    for linear, b in found.linears:
        if used < rank:
            named.unused[f"ranks from {used} on of B of {linear.module}"] = b.cols(used, rank)
        own = record.modules.get(linear.module)
        if own is None:
            named.further[f"B of {linear.module}, which has no factors"] = b.cols(0, used)
            continue
        named.tensors[_name(linear, A)] = found.a.rows(own.first, own.stop)
        part, ratio = b.cols(own.first, own.stop), _ratio(record, linear)
        named.tensors[_name(linear, B)] = part if ratio == 1 else times(part, ratio)
        for first, stop in ((0, own.first), (own.stop, used)):
            if first < stop:
                named.further[f"ranks {first} to {stop - 1} of B of {linear.module}"] = b.cols(first, stop)


def _name(linear: Linear, side: str) -> str:
    return f"{linear.module}.lora_{side}.weight"


def _ratio(record: Record, linear: Linear) -> float:
    """How many times the module's own B Megatron has: so often the gradient of the latter is in that of the former."""
    return record.modules[linear.module].scale / record.scale


def check_same_factors(expected: Checkpoint, found: Checkpoint) -> None:
    """Whether two adapters have the same factors: with others, equal products have other gradients.

    Raises:
        UnsupportedError: They have not.
    """
    assert expected.lora is not None and found.lora is not None
    for module, linear in expected.lora.linears.items():
        pairs = [(expected.tensors[linear.key(side)], found.tensors[linear.key(side)]) for side in SIDES]
        if expected.lora.scales[module] == found.lora.scales[module] and all(_equal(*pair) for pair in pairs):
            continue
        raise UnsupportedError(
            f"the candidate has other factors of {module} than the adapter, and so other gradients",
            where=found.path,
            hint="compare it with the adapter that `ckptkit adapter export` makes of it",
        )


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((numbers(one) == numbers(other)).all())


def together(sides: Sequence[Named]) -> list[Named]:
    """The sides with one tensor in the place of several that any of them has as one, which is the sum of them.

    Args:
        sides: Named alike.
    """
    groups = _Groups()
    for side in sides:
        first: dict[object, str] = {}
        for name, tensor in side.tensors.items():
            if source_files([tensor]):
                groups.join(name, first.setdefault(_identity(tensor), name))
    members: dict[str, list[str]] = {}
    for name in sides[0].tensors:
        members.setdefault(groups.of(name), []).append(name)
    return [
        replace(
            side,
            tensors={
                AND.join(names): _sum([side.tensors[name] for name in names if name in side.tensors])
                for names in members.values()
            },
        )
        for side in sides
    ]


def check_trained_alike(adapter: Checkpoint, laid: LaidOut) -> None:
    """Whether steps of training do the same to an adapter in peft and in a layout of Megatron.

    Args:
        adapter: The adapter, a PEFT directory.
        laid: The candidate's.

    Raises:
        UnsupportedError: Megatron trains what peft does not, or one of the two has one factor in the place of several.
    """
    candidate = _apart(laid.checkpoint, laid.record)
    shared = [name for name in together([_of_modules(adapter), candidate])[0].tensors if AND in name]
    record = laid.record
    rescaled = [module for module, own in record.modules.items() if own.scale != record.scale]
    why = None
    if candidate.further:
        why = f"{next(iter(candidate.further))} is trained in Megatron and not in peft"
    elif shared:
        why = f"one of the two has one factor in the place of several: {shared[0]}"
    elif rescaled:
        why = f"Megatron has a multiple of lora_B of {rescaled[0]}, which a step changes by another amount"
    if why is not None:
        raise UnsupportedError(
            f"steps of training cannot be compared in this layout: {why}",
            where=laid.checkpoint.path,
            hint="stop at --level gradients, or convert it with --adapter-layout canonical",
        )


def _identity(tensor: Tensor) -> object:
    return tensor.shape, tuple(tensor.runs())


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape, each of them once."""
    parts = list({_identity(tensor): tensor for tensor in tensors}.values())
    if len(parts) == 1:
        return parts[0]

    def values(start: int, stop: int) -> Values:
        return sum((numbers(part.rows(start, stop), double=True) for part in parts[1:]), _first(start, stop))

    def _first(start: int, stop: int) -> Values:
        return numbers(parts[0].rows(start, stop), double=True)

    return computed(DTYPES["F64"], parts[0].shape, parts, "sum", values)


class _Groups:
    """Names that belong together."""

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}

    def of(self, name: str) -> str:
        """The name that stands for the group of a name."""
        while (parent := self._parents.get(name, name)) != name:
            name = parent
        return name

    def join(self, name: str, other: str) -> None:
        """Makes one group of the groups of two names."""
        self._parents[self.of(name)] = self.of(other)


def described(further: Mapping[str, Tensor]) -> Iterator[str]:
    """A sentence about what Megatron trains and peft does not have, if there is any."""
    if further:
        yield (
            f"{len(further)} blocks of the candidate's B hold zeros in this layout, {next(iter(further))} first;"
            " training fills them in Megatron, and peft has no parameters for them: they are not compared"
        )
