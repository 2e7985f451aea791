"""Changes of the model during a conversion: text part alone, published layout, another dtype, another head.

A `Change` takes a checkpoint and returns the changed one, with a sentence for each loss. `changes` lists the changes of
a conversion. A new change is a function and a line in `changes`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.fused_rows import as_table
from ckptkit.conversion.options import LEGACY, TEXT, Options
from ckptkit.conversion.target import WritableFormat
from ckptkit.conversion.value_head import ZEROS, to_value_model
from ckptkit.dtypes import TORCH_DTYPE_NAMES, DType
from ckptkit.errors import InputError, UsageError
from ckptkit.families import family_of
from ckptkit.io.castable import check_cast
from ckptkit.tables.config_fields import set_dtype
from ckptkit.tensors import Tensor

Change = Callable[[Checkpoint], tuple[Checkpoint, list[str]]]
"""A checkpoint -> the changed one, and a sentence for each loss."""


def changes(options: Options, format: WritableFormat) -> list[Change]:
    """The changes that a conversion makes, in order.

    `--layout text` changes the model only for a Hugging Face output. A Megatron output has the text part's names
    instead, and keeps the towers in its sidecar.
    """
    found: list[Change] = []
    if not format.megatron:
        found += [text_only, with_towers] if options.layout == TEXT else [with_towers]
    if options.layout == LEGACY:
        found.append(partial(legacy_layout, format=format))
    if options.dtype is not None:
        found.append(partial(cast_floats, dtype=options.dtype))
    if options.head is not None:
        found.append(partial(to_value_model, init=options.head_init or ZEROS))
    if format.megatron:
        found.append(partial(with_fused_rows, spec=options.spec))
    return found


def with_fused_rows(source: Checkpoint, spec: str) -> tuple[Checkpoint, list[str]]:
    """The model by the table of ranks that fuse layers, if `--spec` asks for their names.

    Raises:
        UsageError: Megatron fuses nothing in such a model.
    """
    fused = source.family.quirks.fused
    if fused is None or fused.spelling.name != spec:
        return source, []
    if not fused.when(source.config):
        raise UsageError(f"--spec {spec}: Megatron-Core builds no such model without q_lora_rank", hint="use --spec te")
    table = fused.table(source.family)
    items, tensors = as_table(table, source.config, source.items, source.tensors)
    return replace(source, family=table, items=items, tensors=tensors), []


def text_only(source: Checkpoint) -> tuple[Checkpoint, list[str]]:
    """Makes the text part of a multimodal model a model of its own. Its other tensors are left out."""
    if source.family.text_only is None:
        raise UsageError(f"--layout text: {source.config.architecture} is a text model already", where=source.path)
    raw = source.family.text_only(source.sidecar.config)
    family = family_of(raw, source.path)
    sidecar = replace(source.sidecar, config=raw, headers={}, extras={})
    config = replace(family.parse(raw), mtp_layers=source.config.mtp_layers)
    items = {item.key: item for item in family.items(config)}
    left_out = len(source.sidecar.extras)
    text = replace(source, family=family, config=config, items=items, sidecar=sidecar, spelling=family.spellings[0])
    lossy = [f"{left_out} tensors outside the text model are left out (--layout text)"]
    if unknown := [name for key in source.tensors.keys() - items.keys() for name in source.items[key].hf]:
        lossy.append(f"{config.architecture} has no {', '.join(sorted(unknown))}: left out (--layout text)")
    return text, lossy


def with_towers(source: Checkpoint) -> tuple[Checkpoint, list[str]]:
    """Returns the model as it is. A multimodal model without the towers that its config.json describes is an error."""
    if source.towers_are_missing:
        raise InputError(
            f"{source.config.architecture} has tensors outside of the text model, which the source lacks",
            where=source.path,
            hint="--hf-reference with the original's weights supplies them, --layout text leaves them out",
        )
    return source, []


def legacy_layout(source: Checkpoint, format: WritableFormat) -> tuple[Checkpoint, list[str]]:
    """Writes the model in its family's published layout (`--layout legacy`)."""
    if format.megatron or source.family.directory.legacy_config is None:
        which = f"--to {format.name}" if format.megatron else source.config.architecture
        raise UsageError(f"--layout legacy: {which} has none", where=source.path, hint="drop --layout legacy")
    names = {path.name for path in source.family.directory.code}
    sidecar = replace(
        source.sidecar,
        config=source.family.directory.legacy_config(source.sidecar.config),
        small={name: path for name, path in source.sidecar.small.items() if name not in names},
    )
    loss = "the legacy layout does not describe the model by itself, and transformers takes it for another one"
    return replace(source, sidecar=sidecar), [loss]


def cast_floats(source: Checkpoint, dtype: DType) -> tuple[Checkpoint, list[str]]:
    """Casts the floating-point tensors to `dtype` and enters it in config.json. Narrower types round: a loss."""
    lost: Counter[str] = Counter()

    def cast(tensor: Tensor, to: Callable[[Tensor, DType], Tensor] = Tensor.astype) -> Tensor:
        if not tensor.dtype.is_float or tensor.dtype == dtype:
            return tensor
        check_cast(tensor.dtype, dtype)
        if not _holds(dtype, tensor.dtype):
            lost[f"{tensor.dtype} -> {dtype}"] += 1
        return to(tensor, dtype)

    # Both libraries keep buffers in fp32, so that they stay what they are.
    items = source.items
    tensors = {
        key: tensor if items[key].row.buffer else cast(tensor, items[key].cast)
        for key, tensor in source.tensors.items()
    }
    extras = {name: cast(tensor) for name, tensor in source.sidecar.extras.items()}
    name = TORCH_DTYPE_NAMES[dtype]
    config = deepcopy(source.sidecar.config)
    set_dtype(config, name)
    sidecar = replace(source.sidecar, config=config, extras=extras)
    lossy = [f"{count} tensors are rounded ({pair})" for pair, count in lost.items()]
    return replace(source, tensors=tensors, sidecar=sidecar, config=replace(source.config, dtype=name)), lossy


def _holds(wide: DType, narrow: DType) -> bool:
    """Whether every value of `narrow` exists in `wide`."""
    return wide.name == "F64" or (wide.name == "F32" and narrow.itemsize < 4)
