"""`adapter extract`: an adapter that makes a tuned model of its base, as nearly as its rank allows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from ckptkit.adapters.decomposition import Wanted, difference_of, factors_of
from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.lora.places import Names, Packed, names_in_memory
from ckptkit.checkpoints.lora.record import Lora
from ckptkit.checkpoints.sources import facts_of, open_source
from ckptkit.conversion.adapters import PEFT_FORMAT
from ckptkit.conversion.execution import ConversionResult, Execution, How, carry_out
from ckptkit.conversion.options import Options, dtype_called
from ckptkit.conversion.planning import make_plan
from ckptkit.dtypes import DTYPES_BY_TORCH_NAME
from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.formats.peft import PREFIX, factor_name
from ckptkit.formats.peft_config import AdapterConfig, raw_config
from ckptkit.inspection.structure import config_differences
from ckptkit.io.reading import difference
from ckptkit.sharding.grid import Parallelism
from ckptkit.tables.items import Item
from ckptkit.tables.lora import A, B, Linear, is_embedding, is_linear, linears, single
from ckptkit.tensors import Tensor

if TYPE_CHECKING:
    from ckptkit.adapters.decomposition import Matrix

_WEIGHT, _ROUTER = ".weight", ".router.weight"
_PEFT_VERSION = "0.19.0"
"""The first version whose factors of packed experts have the orientation that is written."""
_WORST = 3
"""How many modules the result names whose energy is kept least."""


def extract_adapter(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: str | None = None,
    hf_reference: str | Path | None = None,
    source: dict[str, Any] | None = None,
    **how: Unpack[How],
) -> ConversionResult:
    """Writes an adapter of PEFT for the difference of two models.

    The difference of each linear layer is cut to a rank by a singular value decomposition. Embeddings, norms and
    routers that differ are kept whole (`modules_to_save`). What peft has no form for is refused.

    Args:
        base: The model, of any format.
        tuned: What it became, of any format.
        out: The directory to create.
        rank: The rank of all layers; or
        energy: the part of each difference's sum of squares that is kept, in (0, 1]: each layer gets the rank for it.
        dtype: Type of the factors; float32 by default.
        hf_reference: Hugging Face directory that describes a Megatron model, for both.
        source: Further options of `open_checkpoint`, for both.
        how: As for `convert`.

    Returns:
        The result; `target["modules"]` has rank and kept energy of each module.

    Raises:
        UsageError: Neither or both of `rank` and `energy` are given, or nothing differs.
        InputError: A model is damaged, or they are different models.
        UnsupportedError: What differs has no form in an adapter.
        StorageError: The destination cannot be written.
    """
    started, execution = time.monotonic(), Execution(**how)
    wanted = _wanted(rank, energy)
    with ExitStack() as stack:
        pair = [open_source(stack, path, hf_reference, headers_only=False, **(source or {})) for path in (base, tuned)]
        before, after = pair
        _check_same_model(before, after)
        found = _Extraction(before, after, wanted)
        found.collect()
        adapter = found.adapter()
        plan = make_plan(adapter, PEFT_FORMAT, Options(dtype=dtype_called(dtype)))
        plan = replace(plan, notes=(*plan.notes, *found.notes()))
        source_facts = {**facts_of(after), "path": str(tuned), "origin": after.sidecar.origin}
        target_facts = {"path": str(out), "format": PEFT_FORMAT, "grid": str(Parallelism()), "modules": found.modules}
        return carry_out(plan, pair, source_facts, target_facts, execution, started)


def _wanted(rank: int | None, energy: float | None) -> Wanted:
    if (rank is None) == (energy is None):
        raise UsageError("an adapter needs a rank or an energy", hint="give either --rank R or --energy 0.99")
    if rank is not None and rank < 1:
        raise UsageError(f"--rank must be at least 1, got {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"--energy must be above 0 and at most 1, got {energy:g}")
    return Wanted(rank, energy)


def _check_same_model(base: Checkpoint, tuned: Checkpoint) -> None:
    for one in (base, tuned):
        if one.lora is not None:
            raise UsageError("an adapter, and no model", where=one.path, hint="give the model before and after tuning")
    problems = config_differences(base.config, tuned.config, ("the base", "the tuned model"))
    keys = base.tensors.keys() ^ tuned.tensors.keys()
    problems += [f"{min(keys)} is in one of them alone"] if keys else []
    if problems:
        raise InputError(f"not the same model: {problems[0]}", where=tuned.path)


@dataclass
class _Extraction:
    """What differs between two models, in the form of an adapter.

    Attributes:
        base: One.
        tuned: The other.
        wanted: What is kept.
        linears: Canonical name of a module -> its linear layer, for those that have factors.
        tensors: Name in `canonical` -> factor.
        wholes: Canonical name -> tensor that is kept whole.
        stored: Names and shapes in the file.
        parameters: Parameters of packed experts that have factors.
        modules: Name of a module -> rank and kept energy.
    """

    base: Checkpoint
    tuned: Checkpoint
    wanted: Wanted
    linears: dict[str, Linear] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    wholes: dict[str, Tensor] = field(default_factory=dict)
    stored: dict[str, tuple[int, ...]] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        family, config = self.base.family, self.base.config
        packed = next((spelling for spelling in family.hf_spellings if spelling.stacks), None)
        # transformers has one parameter for all experts, and peft goes by its modules.
        self.names = names_in_memory(family, config) if packed is None else Names(family, config, packed)
        self.known = linears(self.base.family, self.base.config)

    def collect(self) -> None:
        """Decomposes what differs.

        Raises:
            UsageError: Nothing differs.
        """
        packed = [one for several in self.names.packed.values() for one in several]
        inside = {linear.module for one in packed for parts in one.experts for linear in parts}
        for item in self.base.items.values():
            mine, theirs = item.unpack(self.base.tensors[item.key]), item.unpack(self.tuned.tensors[item.key])
            for name, tensor in mine.items():
                module = name.removesuffix(_WEIGHT)
                if module in inside or difference(tensor, theirs[name]) is None:
                    continue
                if is_linear(item) and not item.key.endswith(_ROUTER):
                    self._add_linear(self.known[module], partial(difference_of, name, tensor, theirs[name]))
                else:
                    self._add_whole(item, name, theirs[name])
        for wrapper in self.names.packed.values():
            self._add_packed(wrapper)
        self._check_extras()
        if not self.linears and not self.wholes:
            raise UsageError("the two models are equal", where=self.tuned.path)
        if not self.linears:
            raise UnsupportedError("no linear layer differs, so there is nothing for an adapter", where=self.tuned.path)

    def _add_linear(self, linear: Linear, make: Callable[[], Matrix]) -> None:
        (factors,) = factors_of([make], self.wanted)
        self._add(linear, factors.a, factors.b)
        name = self.names.written(linear.module)
        self._store(name, 0, factors.a.shape, factors.b.shape)
        self.modules[name] = {"rank": factors.rank, "energy": factors.energy}

    def _add(self, linear: Linear, a: Any, b: Any) -> None:
        self.linears[linear.module] = linear
        self.tensors[linear.key(A)], self.tensors[linear.key(B)] = _tensor(a), _tensor(b)

    def _add_packed(self, several: Sequence[Packed]) -> None:
        """Factors for the parameters of a module that holds all experts; peft nests the first of them innermost."""
        changed = [one for one in several if self._differs(one)]
        for depth, one in zip(range(len(changed) - 1, -1, -1), changed, strict=True):
            found = factors_of([partial(self._of_expert, parts) for parts in one.experts], self.wanted)
            for parts, factors in zip(one.experts, found, strict=True):
                top = 0
                for linear in parts:
                    self._add(linear, factors.a, factors.b[top : top + linear.shape[0]])
                    top += linear.shape[0]
            self.parameters.append(one.name)
            rank, count, (rows, columns) = found[0].rank, len(found), one.shape
            self._store(one.wrapper, depth, (count * rank, columns), (rows, rank * count))
            self.modules[one.name] = {"rank": rank, "energy": min(factors.energy for factors in found)}

    def _parts(self, linear: Linear) -> tuple[Tensor, Tensor]:
        key = linear.item.key
        sides = (linear.item.unpack(side.tensors[key])[linear.weight] for side in (self.base, self.tuned))
        one, other = sides
        return one, other

    def _differs(self, packed: Packed) -> bool:
        return any(difference(*self._parts(linear)) is not None for parts in packed.experts for linear in parts)

    def _of_expert(self, parts: Sequence[Linear]) -> Matrix:
        import numpy as np

        found: Matrix = np.concatenate([difference_of(linear.weight, *self._parts(linear)) for linear in parts])
        return found

    def _store(self, module: str, depth: int, a: tuple[int, ...], b: tuple[int, ...]) -> None:
        self.stored[factor_name(module, A, depth)], self.stored[factor_name(module, B, depth)] = a, b

    def _add_whole(self, item: Item, name: str, tensor: Tensor) -> None:
        module = name.removesuffix(_WEIGHT)
        if not name.endswith(_WEIGHT) or module in self.linears:
            raise UnsupportedError(f"{name} differs, and an adapter has no form for that", where=self.tuned.path)
        if is_embedding(item) and self.base.config.tied:
            raise UnsupportedError(
                f"{name} differs, and the model ties it to its head: an adapter cannot keep them tied",
                where=self.tuned.path,
            )
        self.wholes[name] = tensor
        self.stored[PREFIX + self.names.spelling.written(name)] = tensor.shape

    def _check_extras(self) -> None:
        mine, theirs = self.base.sidecar.extras, self.tuned.sidecar.extras
        for name in sorted(mine.keys() & theirs.keys()):
            if difference(mine[name], theirs[name]) is not None:
                raise UnsupportedError(f"{name} differs, and is no part of the language model", where=self.tuned.path)

    def adapter(self) -> Checkpoint:
        """The adapter, as if it had been opened."""
        ranks = [self.tensors[linear.key(A)].shape[0] for linear in self.linears.values()]
        rank = max(set(ranks), key=ranks.count)
        config = AdapterConfig.parse(self._config(rank), self.tuned.path)
        items = {
            linear.key(side): single(linear, side, self.tensors[linear.key(A)].shape[0])
            for linear in self.linears.values()
            for side in (A, B)
        }
        sidecar = replace(self.base.sidecar, headers={}, small={}, extras=dict(self.wholes))
        return replace(
            self.base,
            format=PEFT_FORMAT,
            sidecar=sidecar,
            items=items,
            tensors={key: self.tensors[key] for key in items},
            padding={},
            coverage={"linear layers": len(self.linears), **({"kept whole": len(self.wholes)} if self.wholes else {})},
            comparisons=(),
            notes=(),
            lora=Lora(config, self.linears, dict.fromkeys(self.linears, 1.0), self.stored),
        )

    def _config(self, rank: int) -> Mapping[str, Any]:
        wholes = sorted(self.names.spelling.written(name).removesuffix(_WEIGHT) for name in self.wholes)
        return {
            **raw_config(self.base.sidecar.origin.get("repository", ""), rank, rank),
            "modules_to_save": wholes or None,
            "target_modules": [],
            "target_parameters": sorted(self.parameters) or None,
            "peft_version": _PEFT_VERSION,
        }

    def notes(self) -> list[str]:
        """Sentences about how much is kept, and of what least."""
        kept = sorted((about["energy"], name) for name, about in self.modules.items())
        ranks = sorted(about["rank"] for about in self.modules.values())
        span = str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
        worst = ", ".join(f"{name} {energy:.2%}" for energy, name in kept[:_WORST])
        found = [f"{len(kept):,} modules of rank {span} keep {kept[0][0]:.2%} or more of their energy; least: {worst}"]
        if self.wholes:
            found.append(f"{len(self.wholes)} tensors are kept whole (modules_to_save): {min(self.wholes)}, ...")
        return found


def _tensor(values: Any) -> Tensor:
    """A factor in memory: the factors of a whole adapter are."""
    import numpy as np

    data = np.ascontiguousarray(values, dtype="<f4").tobytes()
    return Tensor.from_bytes(data, DTYPES_BY_TORCH_NAME["float32"], values.shape)
