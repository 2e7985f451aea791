"""From an opened checkpoint and options to a complete plan."""

from __future__ import annotations

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.element_types import check_element_types
from ckptkit.checkpoints.sidecar_contents import notes_of_moved
from ckptkit.conversion.adapters import PEFT_FORMAT, make_adapter_plan
from ckptkit.conversion.changes import changes
from ckptkit.conversion.options import Options, check_options
from ckptkit.conversion.original import notes_of_kept
from ckptkit.conversion.target import Target, WritableFormat
from ckptkit.conversion.targets import format_called
from ckptkit.conversion.with_adapter import check_adapter_options, with_adapter
from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.formats.garbage import collection_paused
from ckptkit.io.plan import OutputFile, Plan
from ckptkit.megatron_args.inexpressible import inexpressible
from ckptkit.tables.divisibility import sharing_problem
from ckptkit.tables.hybrid_names import inexpressible_as_hybrid


@collection_paused()
def make_plan(source: Checkpoint, to: str, options: Options, adapter: Checkpoint | None = None) -> Plan:
    """The complete plan of a conversion.

    Args:
        source: The model, or an adapter alone.
        to: Name of the output's format.
        options: The requested output.
        adapter: An adapter that goes beside the model, or None.

    Raises:
        UsageError: `to` is no format, an option does not apply to it, or the grid cannot hold the model.
        InputError: Stored `args` contradict config.json, or the source lacks tensors that the output needs.
        UnsupportedError: A cast that does not exist, or (strict) a config that Megatron cannot express.
    """
    format = format_called(to)
    check_options(options, format)
    for one in (source, adapter) if adapter is not None else (source,):
        if one.disagreements:
            raise InputError(
                f"the checkpoint contradicts itself: {'; '.join(one.disagreements)}",
                where=one.path,
                hint="pass --hf-reference with the right config.json, which outranks the stored one",
            )
        check_element_types(one)
    if source.lora is not None:
        return make_adapter_plan(source, format, options)
    if adapter is None:
        _refuse_adapter_options(options, format)
    else:
        check_adapter_options(options, format)
    moved = notes_of_moved(source.items, source.tensors)
    lossy: list[str] = []
    for change in changes(options, format):
        source, lost = change(source)
        lossy += lost
    target = Target(source, options, format)
    beside: list[OutputFile] = []
    if adapter is not None:
        target, beside, lost = with_adapter(target, adapter)
        lossy += lost
    notes = [*target.source.notes, *moved, *(_megatron_notes(target) if format.megatron else ()), *format.notes(target)]
    notes += notes_of_kept(target.source, megatron=format.megatron, wanted=options.quantise)
    if format.sharded and (problem := sharing_problem(source.config, target.grid)):
        notes.append(f"a runtime that keeps keys and values within a stage cannot run this: {problem}")
    files = [*format.lay_out(target), *beside]
    coverage, unused = dict(source.coverage), [] if format.megatron else source.dropped(source.stored_names)
    if unused:
        coverage["unused parts dropped"] = len(unused)
    tp, divisible_by = (target.grid.tp, target.divisible_by) if format.megatron else (1, 1)
    unused += source.padding_left_out(tp, divisible_by)
    facts: dict[str, object] = {"megatron_flags": target.megatron_flags} if format.sharded else {}
    quantised = target.quantised
    if quantised is not None:
        facts["quantised"] = {"scheme": quantised.scheme, "tensors": quantised.count}
        notes += quantised.notes
        lossy += quantised.lossy
    comparisons = source.comparisons
    if adapter is not None:
        comparisons += adapter.comparisons
        coverage["of the adapter"] = sum(adapter.coverage.values())
    likenesses = () if quantised is None else quantised.likenesses
    return Plan(tuple(files), comparisons, tuple(lossy), tuple(notes), coverage, tuple(unused), facts, likenesses)


def _refuse_adapter_options(options: Options, format: WritableFormat) -> None:
    """Options and formats that are about adapters, where the source is a model."""
    if format.name == PEFT_FORMAT:
        raise UsageError("--to peft is for adapters, and the source is a model", hint="choose another --to")
    if options.adapter_layout is not None or options.lossy:
        flag = "--lossy" if options.lossy else "--adapter-layout"
        raise UsageError(f"{flag} is about adapters, and the source is a model", hint="drop it, or give --adapter")


def _megatron_notes(target: Target) -> list[str]:
    """Notes about config features that Megatron's arguments cannot express.

    Raises:
        UsageError: The family has no spelling of the requested name.
        UnsupportedError: There is such a feature, and `--strict-config` refuses it.
    """
    config = target.source.config
    features = inexpressible(config, local=target.spelling.name == "local")
    if target.spelling.hybrid:
        features += inexpressible_as_hybrid(layer.rope.kind for layer in config.layers)
    if features and target.options.strict_config:
        where = target.source.path
        raise UnsupportedError(f"Megatron's arguments cannot express: {'; '.join(features)}", where=where)
    return [f"not in Megatron's arguments: {text}" for text in features]
