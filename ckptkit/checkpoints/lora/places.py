"""Where the tensors of a PEFT file belong: the factor of one linear layer, of all experts, or something else.

A file may hold a pair of factors for each expert, or one for all experts of a layer (`target_parameters`). Then A
is `[experts * rank, in]`, expert by expert, and B is `[out, rank * experts]`, where the experts of one rank are
neighbours.
Before 0.19, PEFT took the last two axes of such a weight for `[in, out]`, whatever they were; then A is `[experts *
rank, out]` and B is `[in, rank * experts]`. Since 0.19 it takes them for `[out, in]` unless the class of the experts
says `is_transposed`, which those of GPT-OSS do since a release of transformers 5 that no adapter records.
A square weight does not tell its orientation. All parameters of an adapter have the same one, so another one tells it.

Source: `ParamWrapper` of peft 0.17.1, 0.18.1, 0.19.0 and 0.21.2.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ckptkit.errors import InputError, UnsupportedError
from ckptkit.formats.peft import Stored, factor_name
from ckptkit.io.computed import permuted
from ckptkit.tables.family import Family
from ckptkit.tables.lora import A, B, Linear, linears
from ckptkit.tables.model_config import ModelConfig
from ckptkit.tables.spelling import ROWS, Form, HfSpelling, Stack
from ckptkit.tensors import Tensor, vstack

_WEIGHT = ".weight"
_IN_MEMORY = "in_memory"


@dataclass(frozen=True)
class Packed:
    """The weights of all experts of a layer, as one parameter.

    Attributes:
        name: Name of the parameter, as transformers has it.
        experts: For each expert its linear layers, in the order of the parameter's rows.
        old: Whether PEFT was older than 0.19; None if that is not known.
        form: How the layers of an expert make its part of the parameter.
        told: Whether A and B of other parameters of the adapter are swapped; None if there are none that tell.
    """

    name: str
    experts: tuple[tuple[Linear, ...], ...]
    old: bool | None = None
    form: Form = ROWS
    told: bool | None = None

    @property
    def wrapper(self) -> str:
        """Name of the module that holds it."""
        return self.name.rpartition(".")[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of one expert's weight, [out, in]."""
        first = self.experts[0]
        return sum(linear.shape[0] for linear in first), first[0].shape[1]

    def by_shapes(self, a: Tensor, b: Tensor, where: object) -> bool | None:
        """Whether A and B take `[in, out]` for the shape of an expert's weight; None if that is square.

        Raises:
            InputError: They have the shapes of neither.
        """
        (rows, columns), count = self.shape, len(self.experts)
        rank, rest = divmod(a.shape[0], count)
        fits = [
            swapped
            for swapped, (out, into) in ((False, (rows, columns)), (True, (columns, rows)))
            if not rest and rank and (a.shape, b.shape) == ((rank * count, into), (out, rank * count))
        ]
        if not fits:
            raise InputError(
                f"the factors of {self.name} are {list(a.shape)} and {list(b.shape)}, an expert is [{rows}, {columns}]",
                where=where,
            )
        return fits[0] if len(fits) == 1 else None

    def is_swapped(self, a: Tensor, b: Tensor, where: object) -> bool:
        """Whether A and B take `[in, out]` for the shape of an expert's weight.

        Raises:
            InputError: They have the shapes of neither.
            UnsupportedError: The weight is square, and nothing else tells.
        """
        found = self.by_shapes(a, b, where)
        if found is not None:
            return found
        if self.form.columns and self.old:
            return False  # `[in, out]` is what it is
        if self.told is not None and (self.form.columns or self.old is None):
            return self.told
        if self.form.columns:
            raise UnsupportedError(
                f"{self.name} is square: which of its axes A belongs to depends on the release of transformers that"
                " PEFT ran with, which no adapter records, and no other parameter of these experts is adapted that"
                " would tell",
                where=where,
                hint="merge it with the peft and transformers that trained it",
            )
        if self.old is None:
            raise UnsupportedError(
                f"{self.name} is square, and nothing says which of its axes A belongs to",
                where=where,
                hint="add the peft_version that trained it to adapter_config.json",
            )
        return self.old

    def apart(self, a: Tensor, b: Tensor, where: object) -> dict[str, Tensor]:
        """The factors of all experts -> those of each linear layer, by their names in `canonical`."""
        (rows, columns), count = self.shape, len(self.experts)
        swapped = self.is_swapped(a, b, where)
        rank = a.shape[0] // count
        if swapped:
            first = permuted(b.reshape((columns, rank, count)), (2, 1, 0))
            second = permuted(a.reshape((count, rank, rows)), (0, 2, 1))
        else:
            first, second = a.reshape((count, rank, columns)), permuted(b.reshape((rows, rank, count)), (2, 0, 1))
        found = {}
        for number, parts in enumerate(self.experts):
            one, other = (side.rows(number, number + 1).reshape(side.shape[1:]) for side in (first, second))
            seconds = self.form.rows_apart(other, [linear.shape[0] for linear in parts])
            for linear, its_second in zip(parts, seconds, strict=True):
                found[linear.key(A)], found[linear.key(B)] = one, its_second
        return found

    def together(self, tensors: Mapping[str, Tensor], *, swapped: bool) -> tuple[Tensor, Tensor]:
        """The inverse of `apart`: A and B of all experts. That the layers of an expert share A is not checked here."""
        (rows, columns), count = self.shape, len(self.experts)
        firsts = [tensors[parts[0].key(A)] for parts in self.experts]
        seconds = [self.form.rows_together([tensors[one.key(B)] for one in parts]) for parts in self.experts]
        rank = firsts[0].shape[0]
        first, second = vstack(firsts), vstack(seconds)
        if swapped:
            a = permuted(second.reshape((count, rows, rank)), (0, 2, 1)).reshape((count * rank, rows))
            return a, permuted(first.reshape((count, rank, columns)), (2, 1, 0)).reshape((columns, rank * count))
        return first, permuted(second.reshape((count, rows, rank)), (1, 2, 0)).reshape((rows, rank * count))


@dataclass(frozen=True)
class Names:
    """The modules of a model by the names that one spelling gives them."""

    family: Family
    config: ModelConfig
    spelling: HfSpelling
    old: bool | None = None

    @cached_property
    def known(self) -> dict[str, Linear]:
        """Canonical name of a module -> its linear layer."""
        return linears(self.family, self.config)

    @cached_property
    def linears(self) -> dict[str, Linear]:
        """Name of a module -> its linear layer, except those of packed experts."""
        return {self.spelling.written(linear.weight).removesuffix(_WEIGHT): linear for linear in self.known.values()}

    @cached_property
    def packed(self) -> dict[str, list[Packed]]:
        """Name of a module -> the parameters in it that hold all experts."""
        found: dict[str, list[Packed]] = {}
        for packed in _packed(self.spelling.stacks, self.config, self.known, self.old):
            found.setdefault(packed.wrapper, []).append(packed)
        return found

    def written(self, module: str) -> str:
        """The canonical name of a module -> its name in this spelling."""
        return self.spelling.written(module + _WEIGHT).removesuffix(_WEIGHT)

    def canonical(self, name: str) -> str:
        """The name of a whole tensor -> its canonical name."""
        return self.spelling.canonical(name)


def _packed(
    stacks: Sequence[Stack], config: ModelConfig, known: Mapping[str, Linear], old: bool | None
) -> Iterable[Packed]:
    for index, layer in enumerate(config.layers):
        for stack in stacks if layer.moe else ():
            if "{i}" not in stack.fused:  # of multi-token prediction, which PEFT does not see
                continue
            if not stack.parts[0].endswith(_WEIGHT):
                continue
            yield Packed(
                stack.fused.format(i=index),
                tuple(
                    tuple(known[part.format(i=index, e=expert).removesuffix(_WEIGHT)] for part in stack.parts)
                    for expert in range(config.num_experts)
                ),
                old,
                stack.form,
            )


def names_of(family: Family, config: ModelConfig, modules: Collection[str], old: bool | None) -> Names:
    """The spelling in which most of these modules occur.

    Args:
        family: The family.
        config: The model.
        modules: Names of modules.
        old: As for `Packed`.
    """
    found = [Names(family, config, spelling, old) for spelling in family.hf_spellings]
    return max(found, key=lambda names: len(names.linears.keys() & modules) + len(names.packed.keys() & modules))


def names_in_memory(family: Family, config: ModelConfig) -> Names:
    """The names that transformers gives the modules of a loaded model."""
    called = {known.name: known for known in family.hf_spellings}
    return Names(family, config, called.get(_IN_MEMORY) or family.hf_spellings[0])


Pair = tuple[Tensor, Tensor]


def assign(
    factors: Mapping[tuple[str, int], Pair], names: Names, where: object
) -> tuple[dict[tuple[str, int], Linear | Packed], list[str]]:
    """What each pair of factors belongs to, and the names of those that belong to nothing.

    Args:
        factors: (module, depth) -> A and B.
        names: The modules of the model.
        where: For messages.

    Raises:
        UnsupportedError: Two parameters of one module have the same shapes.
    """
    found: dict[tuple[str, int], Linear | Packed] = {}
    unknown: list[str] = []
    for (module, depth), pair in factors.items():
        if depth == 0 and module in names.linears:
            found[module, depth] = names.linears[module]
            continue
        fitting = [packed for packed in names.packed.get(module, ()) if _fits(packed, pair, where)]
        if len(fitting) > 1:
            both = " and ".join(packed.name for packed in fitting)
            raise UnsupportedError(f"the shapes of the factors fit {both}", where=where, hint="merge it with peft")
        if fitting:
            found[module, depth] = fitting[0]
        else:
            unknown.append(factor_name(module, A, depth))
    shapes = [
        (one.form.columns, one.by_shapes(*factors[key], where)) for key, one in found.items() if isinstance(one, Packed)
    ]

    def told(packed: Packed) -> bool | None:
        ways = {way for columns, way in shapes if way is not None and columns == packed.form.columns}
        return ways.pop() if len(ways) == 1 else None

    return {
        key: replace(one, told=told(one)) if isinstance(one, Packed) else one for key, one in found.items()
    }, unknown


def _fits(packed: Packed, pair: Pair, where: object) -> bool:
    try:
        packed.is_swapped(*pair, where)
    except InputError:
        return False
    except UnsupportedError:
        return True
    return True


def pairs(stored: Mapping[str, Stored], take: Callable[[str], Tensor], where: object) -> dict[tuple[str, int], Pair]:
    """The factors of a file, in pairs.

    Args:
        stored: Stored name -> what it says.
        take: Stored name -> tensor.
        where: For messages.

    Raises:
        InputError: One factor has no other, or they do not fit together.
    """
    sides: dict[tuple[str, int], dict[str, str]] = {}
    for name, about in stored.items():
        if about.kind == "factor":
            sides.setdefault((about.module, about.depth), {})[about.side] = name
    found = {}
    for key, both in sides.items():
        if len(both) < 2:
            (name,) = both.values()
            missing = B if A in both else A
            raise InputError(f"{name} has no lora_{missing} beside it", where=where, hint="is the adapter complete?")
        a, b = take(both[A]), take(both[B])
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            raise InputError(f"{both[A]} is {list(a.shape)}, {both[B]} is {list(b.shape)}", where=where)
        if a.dtype != b.dtype:
            raise InputError(f"{both[A]} is {a.dtype}, {both[B]} is {b.dtype}", where=where)
        found[key] = (a, b)
    return found
