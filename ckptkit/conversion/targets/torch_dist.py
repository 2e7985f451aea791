"""Writes Megatron-Core's distributed checkpoint: whole tensors, in the chunks that the ranks of a grid would write."""

from __future__ import annotations

from dataclasses import replace

from ckptkit.checkpoints.checkpoint import is_on
from ckptkit.checkpoints.lora.megatron import is_adapter_name, stored_form
from ckptkit.conversion.target import NoRunConfig, Target, WritableFormat
from ckptkit.formats.torch_dist import GlobalTensor, lay_out_torch_dist
from ckptkit.io.plan import OutputFile
from ckptkit.sharding.stages import stage_of_layer
from ckptkit.tables.items import Item
from ckptkit.tables.megatron_names import distributed_states, norms_of_local_spec
from ckptkit.tables.spelling import GROUPED

_SPECS = ("te", "local")
"""Specs that this format can be written for. Its keys differ in extra states and in the norm before experts only."""


def _lay_out(target: Target) -> list[OutputFile]:
    source = target.source
    files = lay_out_torch_dist(
        _tensors(target),
        target.args,
        dtype=target.dtype,
        grid=target.grid,
        groups=source.family.attention_groups(source.config),
        stacked=False if target.spelling.hybrid or _some_layers(target) else None,
    )
    run_config = [] if isinstance(target.run_config, NoRunConfig) else [target.run_config]
    return [*files, *run_config, *target.sidecar]


def _some_layers(target: Target) -> bool:
    """Whether only some layers have tensors, as those of an adapter alone may: a stack would have holes."""
    layers = {item.layer for item in target.source.items.values() if item.layer is not None}
    return target.adapter is not None and len(layers) < target.source.config.num_layers


def _tensors(target: Target) -> list[GlobalTensor]:
    """The whole model under the names that all specs share, each tensor on the stage that holds it."""
    source, grid, stages, quirks = target.source, target.grid, target.stages, target.source.family.quirks
    spec = "local" if quirks.local_only(source.config) else target.spelling.name
    written = target.spelling
    local = spec == "local" and quirks.local_keys
    base = written if local else source.family.spellings[0]
    spelling = replace(base, prefix=written.prefix, hybrid=written.hybrid, experts=GROUPED)
    names = {key: spelling.written(key) for key in source.items}
    norms = norms_of_local_spec(names.values()) if spec == "local" and not local else {}
    homes = stage_of_layer(stages)
    tensors = []
    for key, item in source.items.items():
        if item.layer is not None:
            stage, _ = homes[item.layer]
        else:
            stage = next(stage for stage in stages if is_on(item, stage, grid))
        whole, split = source.padded(key, grid.tp, target.divisible_by), item.split(spelling)
        name, states = norms.get(names[key], names[key]), tuple(distributed_states(names[key], spec, quirks))
        blocks = split.blocks
        if is_adapter_name(key):
            states = ()  # Megatron-Bridge saves adapters without them
            whole, blocks = stored_form(item, whole, grid)
        whole_tensor = GlobalTensor(name, whole, split.axis, blocks, stage.pp_rank, states)
        in_parts = item.row.layout.keys and not is_adapter_name(key)
        tensors += _parts(whole_tensor, item) if in_parts else [whole_tensor]
    return tensors


def _parts(whole: GlobalTensor, item: Item) -> list[GlobalTensor]:
    """The parts of a tensor that distributed checkpoints hold each as a tensor of its own."""
    parts = zip(item.row.layout.keys, item.kind.layout.parts(whole.tensor), strict=True)
    found = [replace(whole, name=f"{whole.name}.{key}", tensor=part, blocks=1, states=()) for key, part in parts]
    return [replace(found[0], states=whole.states), *found[1:]]


def _notes(target: Target) -> list[str]:
    if isinstance(target.run_config, NoRunConfig):
        return [f"no run_config.yaml, which Megatron-Bridge needs to load it by itself: {target.run_config.reason}"]
    return []


FORMAT = WritableFormat(
    "torch_dist",
    _lay_out,
    takes=frozenset({"grid", "spec", "experts", "make_vocab_size_divisible_by", "megatron_model", "adapter_layout"}),
    fits=lambda spelling: spelling.name in _SPECS,
    notes=_notes,
    any_grid=True,
)
