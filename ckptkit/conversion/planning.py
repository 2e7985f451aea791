"""From an opened checkpoint and options to a complete plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptkit.checkpoints.checkpoint import LAYOUTS, Checkpoint
from ckptkit.conversion.changes import cast_floats, legacy_layout, text_only
from ckptkit.conversion.options import Options
from ckptkit.conversion.targets import DISTRIBUTED_SPECS, SHARDED, TARGETS, bridge_config, spelling_of
from ckptkit.conversion.value_head import VALUE, ZEROS, to_value_model
from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.io.plan import Plan
from ckptkit.megatron_args.inexpressible import inexpressible
from ckptkit.sharding.grid import Parallelism
from ckptkit.tables.divisibility import sharing_problem
from ckptkit.tables.hybrid_names import HYBRID, MODELS, inexpressible_as_hybrid

if TYPE_CHECKING:
    pass


def make_plan(source: Checkpoint, to: str, options: Options) -> Plan:
    """The complete plan of a conversion.

    Raises:
        UsageError: `to` is no format, or the grid cannot hold the model.
        InputError: Stored `args` contradict config.json.
        UnsupportedError: A cast that does not exist, or (strict) a config that Megatron cannot express.
    """
    if to not in TARGETS:
        raise UsageError(f"--to {to}", hint=f"one of {', '.join(TARGETS)}")
    if options.layout not in LAYOUTS:
        raise UsageError(f"--layout {options.layout}", hint=f"one of {', '.join(LAYOUTS)}")
    if to not in SHARDED and options.grid != Parallelism():
        raise UsageError(f"--to {to} is not sharded over ranks", hint="drop the parallel sizes, or use --to torch")
    _check_options(to, options)
    _check_model(source, to, options.model)
    of_ranks = to != "hf" and spelling_of(source, options).blocks
    if (to == "packed" and of_ranks) or (to == "torch_dist" and (of_ranks or options.spec not in DISTRIBUTED_SPECS)):
        raise UsageError(f"--spec {options.spec} is a layout of ranks' files", hint="use --to torch")
    if source.disagreements:
        raise InputError(
            f"the checkpoint contradicts itself: {'; '.join(source.disagreements)}",
            where=source.path,
            hint="pass --hf-reference with the right config.json, which then counts",
        )
    if options.head not in (None, VALUE):
        raise UsageError(f"--head {options.head}", hint=f"{VALUE} is what can be asked for")
    if options.head is None and options.head_init is not None:
        raise UsageError("--head-init is of a new head", hint=f"add --head {VALUE}")
    dropped: list[str] = []
    if to == "hf" and options.layout == "text":
        source, dropped = text_only(source)
    if to == "hf" and source.towers_are_missing:
        raise InputError(
            f"{source.config.architecture} has tensors outside of the text model, and they are not here",
            where=source.path,
            hint="--hf-reference with the original's weights supplies them, --layout text leaves them out",
        )
    if options.layout == "legacy":
        source, dropped = legacy_layout(source, to)
    source, lossy = cast_floats(source, options.dtype)
    if options.head is not None:
        source, left = to_value_model(source, options.head_init or ZEROS)
        dropped += left
    lossy = [*dropped, *lossy]
    notes = [*source.notes]
    if to != "hf":
        features = inexpressible(source.config)
        if options.model == HYBRID:
            features += inexpressible_as_hybrid(layer.rope.kind for layer in source.config.layers)
        if features and options.strict_config:
            raise UnsupportedError(f"Megatron's arguments cannot express: {'; '.join(features)}", where=source.path)
        notes += [f"not in Megatron's arguments: {text}" for text in features]
    if to == "torch_dist" and (why := bridge_config(source, options)[1]) is not None:
        notes.append(f"no run_config.yaml, which Megatron-Bridge needs to load it by itself: {why}")
    if to in SHARDED and (problem := sharing_problem(source.config, options.grid)):
        notes.append(f"a runtime that keeps keys and values within a stage cannot run this: {problem}")
    files = TARGETS[to](source, options)
    coverage, unused = dict(source.coverage), tuple(source.dropped(source.stored_names)) if to == "hf" else ()
    if unused:
        coverage["unused parts dropped"] = len(unused)
    return Plan(tuple(files), tuple(source.comparisons), tuple(lossy), tuple(notes), coverage, unused)


def _check_options(to: str, options: Options) -> None:
    """Whether the format has what is asked of it: nothing that was asked for is left out in silence."""
    if to == "hf":
        asked = {
            "--spec": options.spec != Options.spec,
            "--experts": options.experts is not None,
            "--make-vocab-size-divisible-by": options.divisible_by is not None,
        }
        if given := [name for name, is_given in asked.items() if is_given]:
            raise UsageError(f"{given[0]} is about Megatron's formats, and --to is hf", hint=f"drop {given[0]}")
    elif to in SHARDED and options.shard_size is not None:
        raise UsageError(f"--shard-size is about safetensors files, and --to is {to}", hint="drop --shard-size")


def _check_model(source: Checkpoint, to: str, model: str) -> None:
    """Whether there is a model of Megatron-Core's that can be written so."""
    if model not in MODELS:
        raise UsageError(f"--megatron-model {model}", hint=f"one of {', '.join(MODELS)}")
    if model == HYBRID and to == "hf":
        raise UsageError("--megatron-model is of Megatron's formats", hint="drop it, or use --to torch_dist")
    if model == HYBRID and source.config.adapter is not None:
        raise UsageError("--megatron-model hybrid: it has layers of one width", hint="use --megatron-model gpt")
