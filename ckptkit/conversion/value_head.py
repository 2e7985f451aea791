"""Turns a language model into a value model: the same layers with a new head, whose weights are given or generated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.dtypes import DTYPES, DTYPES_BY_TORCH_NAME, DType
from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.families import family_of, value_family_of
from ckptkit.families.heads import as_value_config
from ckptkit.formats import safetensors
from ckptkit.io.castable import check_cast
from ckptkit.tensors import Tensor

ZEROS, NORMAL, FILE = "zeros", "normal", "file:"
SEED = 0
"""Fixed, so that the same model and the same initialisation give the same bytes."""
OUTPUT = "output_layer."
WEIGHTS = ("score.weight", "output_layer.weight", "reward_head.weight", "value_head.weight", "v_head.summary.weight")
"""Names under which files hold a value head."""


def to_value_model(source: Checkpoint, init: str) -> tuple[Checkpoint, list[str]]:
    """A language model with a value head in place of its own head.

    Args:
        source: The opened language model.
        init: `zeros`; `normal` with the standard deviation of the model's config; or `file:PATH`, a safetensors file
            that holds the head alone, under one of `WEIGHTS` and perhaps a bias.

    Returns:
        The value model, and a sentence for each part of the language model that is left out.

    Raises:
        UsageError: The source is a value model already, or `init` is none of these.
        InputError: The file does not hold a head of this width.
        UnsupportedError: ckptkit knows no value model of this architecture.
    """
    if source.config.value_head:
        raise UsageError("--head value: it is a value model already", where=source.path)
    family = value_family_of(source.family)
    if family is None:
        raise UnsupportedError(
            f"no value model is known here for {source.config.architecture}", where=source.path, hint=_way_out(source)
        )
    lossy = [] if source.config.tied else ["the language model head is left out (--head value)"]
    if count := source.config.mtp_layers:
        source = source.without_prediction()
        lossy.append(f"{count} of the layers, of multi-token prediction, are left out (--head value)")
    directory = family.directory
    raw = as_value_config(source.sidecar.config, family.architectures[0], bias=True, auto_map=directory.auto_map)
    config = replace(family.parse(raw), dtype=source.config.dtype)
    items = {item.key: item for item in family.items(config)}
    head = {key: item.shape for key, item in items.items() if key.startswith(OUTPUT)}
    made = _made(head, init, config.init_std, DTYPES_BY_TORCH_NAME[source.main_dtype])
    tensors = {key: made[key] if key in made else source.tensors[key] for key in items}
    # Code beside the weights may be older than the class that `auto_map` names.
    own = {path.name for path in directory.code}
    small = {name: path for name, path in source.sidecar.small.items() if name not in own}
    model = replace(
        source,
        family=family,
        config=config,
        items=items,
        tensors=tensors,
        sidecar=replace(source.sidecar, config=raw, headers={}, small=small),
        spelling=family.spellings[0],
    )
    return model, lossy


def _way_out(source: Checkpoint) -> str | None:
    """What to do where a multimodal model has no value class and its text part has one."""
    if source.family.text_only is None:
        return None
    text = family_of(source.family.text_only(source.sidecar.config), source.path)
    return None if value_family_of(text) is None else "--layout text makes a value model of its text part"


def _made(head: dict[str, tuple[int, ...]], init: str, std: float, dtype: DType) -> dict[str, Tensor]:
    """The tensors of the head in the dtype of the model."""
    if init == ZEROS:
        return {key: Tensor.full(dtype, shape) for key, shape in head.items()}
    if init == NORMAL:
        biases = {key: Tensor.full(dtype, shape) for key, shape in head.items()}
        return biases | {key: _normal(shape, std, dtype) for key, shape in head.items() if len(shape) == 2}
    if init.startswith(FILE) and init != FILE:
        return _from_file(Path(init.removeprefix(FILE)), head, dtype)
    raise UsageError(f"--head-init {init}", hint=f"{ZEROS}, {NORMAL} or {FILE}PATH of a safetensors file")


def _normal(shape: tuple[int, ...], std: float, dtype: DType) -> Tensor:
    import numpy as np

    values = np.random.default_rng(SEED).normal(0.0, std, shape).astype("<f4")
    return Tensor.from_bytes(values.tobytes(), DTYPES["F32"], shape).astype(dtype)


def _from_file(path: Path, head: dict[str, tuple[int, ...]], dtype: DType) -> dict[str, Tensor]:
    """Reads the head from a file. A bias that the file lacks is zero."""
    if not path.is_file():
        raise InputError("no such file", where=path, hint=f"--head-init {FILE}PATH names a safetensors file")
    stored = safetensors.tensors_of(path, safetensors.read_header(path))
    weights = [name for name in WEIGHTS if name in stored]
    if len(weights) != 1:
        raise InputError(f"{len(weights)} value heads", where=path, hint=f"it must hold one of {', '.join(WEIGHTS)}")
    stem = weights[0].removesuffix("weight")
    names = {f"{stem}{key.removeprefix(OUTPUT)}": key for key in head}
    if unknown := sorted(stored.keys() - names.keys()):
        raise InputError(f"unexpected tensors in the value head file: {', '.join(unknown[:3])}", where=path)
    found: dict[str, Tensor] = {}
    for name, key in names.items():
        shape = head[key]
        tensor = stored.get(name) or Tensor.full(dtype, shape)
        if tensor.shape != shape:
            raise InputError(f"{name} is {list(tensor.shape)}, the model asks for {list(shape)}", where=path)
        check_cast(tensor.dtype, dtype)
        found[key] = tensor.astype(dtype)
    return found
