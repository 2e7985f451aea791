"""The plan of an output that holds an adapter beside the weights of its model, as training with an adapter saves it.

Megatron-Bridge leaves the names of the weights as they are. Under the names of PEFT, the layer that is adapted is
inside of the one that adapts it: `linear_qkv.base_layer.weight`.

Source: `AdapterWrapper.state_dict` and `sharded_state_dict` of Megatron-Bridge (commit 067f987), and
`tuners_sharded_state_dict` of mcore-bridge (commit f020e47).
"""

from __future__ import annotations

from dataclasses import fields, replace

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.conversion.adapters import beside, cast_adapter, in_layout
from ckptkit.conversion.options import Options
from ckptkit.conversion.target import OF_MEGATRON_LM, Target, WritableFormat
from ckptkit.errors import UsageError
from ckptkit.io.plan import OutputFile
from ckptkit.tables.items import Item, Kind
from ckptkit.tables.lora import PEFT
from ckptkit.tables.megatron_names import WRAPPED
from ckptkit.tables.spelling import Spelling
from ckptkit.tensors import Tensor

_TAKEN = frozenset(
    {
        *("grid", "spec", "experts", "make_vocab_size_divisible_by", "dtype", "strict_config"),
        *("adapter_layout", "lossy"),
    }
)


def check_adapter_options(options: Options, format: WritableFormat) -> None:
    """Whether a model can be written with an adapter beside it.

    Raises:
        UsageError: The format, the names, or another change have no place for an adapter.
    """
    if not format.sharded:
        raise UsageError(
            f"--to {format.name} has no form for a model with an adapter beside it",
            hint="use --to torch or torch_dist, or `ckptkit adapter merge` to put it into the weights",
        )
    for option in fields(Options):
        if option.name not in _TAKEN and getattr(options, option.name) != getattr(Options(), option.name):
            flag = f"--{option.name.replace('_', '-')}"
            raise UsageError(f"{flag} and --adapter exclude each other", hint=f"drop {flag}")
    if options.spec not in OF_MEGATRON_LM:
        raise UsageError(
            f"--spec {options.spec} has no names for an adapter beside the weights",
            hint=f"use --spec {' or '.join(OF_MEGATRON_LM)}",
        )


def with_adapter(target: Target, adapter: Checkpoint) -> tuple[Target, list[OutputFile], list[str]]:
    """An output with an adapter beside its model.

    Args:
        target: The output without it.
        adapter: The adapter, in its canonical view.

    Returns:
        The output, files that go with the adapter, and a sentence for each loss.

    Raises:
        InputError: The adapter is for another model.
        UsageError: It does not divide over the grid, or its scales ask for `lossy`.
        UnsupportedError: Megatron cannot express it.
    """
    base = target.source
    assert adapter.lora is not None
    adapter.lora.check_fits(base.family, base.config, adapter.path)
    adapter, lossy = cast_adapter(adapter, target.options)
    factors, adapted, lost = in_layout(adapter, target)
    weights, tensors = base.items, base.tensors
    if adapted.record.layout == PEFT:
        weights, tensors = _wrapped(base, factors, target.spelling)
    both = replace(base, items={**weights, **factors.items}, tensors={**tensors, **factors.tensors})
    name, count = adapter.path.name, len(adapted.lora.linears)
    told = f"{count:,} linear layers have {name} beside them, in the layout {adapted.record.layout}"
    both = both.noting(told, *(f"{name}: {note}" for note in factors.notes))
    found = replace(target, source=both, adapter=replace(adapted, sidecar=factors.sidecar))
    return found, beside(found), [*lossy, *lost]


def _wrapped(base: Checkpoint, adapter: Checkpoint, spelling: Spelling) -> tuple[dict[str, Item], dict[str, Tensor]]:
    """The model's tensors, those of adapted layers under the names that they have inside of these."""
    assert adapter.lora is not None
    modules = {spelling.written(linear.item.key).rpartition(".weight")[0] for linear in adapter.lora.linears.values()}
    kinds: dict[int, Kind] = {}
    items: dict[str, Item] = {}
    tensors: dict[str, Tensor] = {}
    for key, item in base.items.items():
        inside = item
        if spelling.written(key).rpartition(".")[0] in modules:
            if id(item.kind) not in kinds:
                row = replace(item.row, megatron=_inside(item.row.megatron))
                kinds[id(item.kind)] = Kind(row, item.kind.config, item.kind.model, item.kind.given)
            inside = item._replace(kind=kinds[id(item.kind)], key=_inside(key))
        items[inside.key], tensors[inside.key] = inside, base.tensors[key]
    return items, tensors


def _inside(name: str) -> str:
    module, _, last = name.rpartition(".")
    return f"{module}.{WRAPPED}.{last}"
