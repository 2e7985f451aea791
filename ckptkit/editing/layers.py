"""Models with other layers: some left out, repeated, in another order, or taken from several models.

No byte of a layer changes. What depends on numbers of layers follows: names, config.json (windows, types of attention,
layers with and without experts, layers that use another's keys and values), columns of per-layer embeddings, and the
buffers of layers. config.json is written by the family and read again: layers that it cannot describe are refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.config_fields import differing_fields, in_words
from ckptkit.editing.inputs import DROP_PREDICTION, Input
from ckptkit.errors import CkptkitError, InputError, UnsupportedError, UsageError
from ckptkit.formats.hf import BIN_INDEX, INDEX
from ckptkit.printable import printable
from ckptkit.tables.bounds import MAX_LAYERS
from ckptkit.tables.family import Family
from ckptkit.tables.items import Item
from ckptkit.tables.model_config import LayerConfig, ModelConfig
from ckptkit.tensors import Tensor, hstack, vstack

_NUMBER = re.compile(r"(layers\w*\.)[0-9]+\.")
_LIST = re.compile(r"[0-9]{1,18}(?:-[0-9]{1,18})?(?:,[0-9]{1,18}(?:-[0-9]{1,18})?)*")
_LONGEST = 1 << 16
"""Characters of a list of layers."""
_SHOWN = 60
"""Characters of a list that messages show."""
_BY_LAYER = ("layer_types", "mlp_layer_types")
"""Lists of config.json with an entry for each layer that families need not know to read a model."""


@dataclass(frozen=True)
class Place:
    """Where a layer comes from.

    Attributes:
        source: The model.
        layer: Its number there.
    """

    source: Input
    layer: int


def layer_list(text: str, count: int, option: str) -> list[int]:
    """The layers that a text such as `0-15,24-31` names, in its order. Both ends of a range belong to it.

    `7-4` counts down. A layer may be named twice.

    Args:
        text: The text.
        count: Number of layers of the model.
        option: What the text was given as, for messages.

    Raises:
        UsageError: It is no such list, or names a layer that the model does not have.
    """
    if not is_layer_list(text):
        shown = printable(text, _SHOWN, _SHOWN)
        raise UsageError(f"{option} {shown!r} is no list of layers", hint="numbers and ranges, as in 0-15,24-31")
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        one, other = int(first), int(last or first)
        if max(one, other) >= count:
            raise UsageError(
                f"{option} {part}: the model has {count} layers", hint=f"they are numbered 0 to {count - 1}"
            )
        found += range(one, other + 1) if one <= other else range(one, other - 1, -1)
        if len(found) > MAX_LAYERS:
            raise UsageError(f"{option} names more than {MAX_LAYERS:,} layers")
    return found


def is_layer_list(text: str) -> bool:
    """Whether a text looks like a list of layers."""
    return len(text) <= _LONGEST and _LIST.fullmatch(text) is not None


@dataclass(frozen=True)
class Restacked:
    """The form of a model with other layers, without its tensors.

    Attributes:
        family: Its family.
        config: It.
        raw: Its config.json.
        items: Canonical name -> table item.
    """

    family: Family
    config: ModelConfig
    raw: dict[str, Any]
    items: dict[str, Item]

    def checkpoint(self, base: Input, tensors: dict[str, Tensor], extras: dict[str, Tensor]) -> Checkpoint:
        """The model with tensors. Its files are laid out anew: those of `base` had other tensors.

        Args:
            base: The model that gives the small files.
            tensors: One for each item.
            extras: Tensors without a place in Megatron.
        """
        small = {name: file for name, file in base.model.sidecar.small.items() if name not in (INDEX, BIN_INDEX)}
        return replace(
            base.model,
            config=self.config,
            items=self.items,
            tensors=tensors,
            sidecar=replace(base.model.sidecar, config=self.raw, headers={}, small=small, extras=extras),
        )


def restack(base: Input, places: Sequence[Place]) -> Restacked:
    """The model whose layers come from these places; all else of its config is that of `base`.

    Args:
        base: The model.
        places: For each new layer where it comes from. All models are alike but for their layers.

    Raises:
        UsageError: There is no layer.
        UnsupportedError: config.json cannot describe these layers in this order.
    """
    model = base.model
    if not places:
        raise UsageError("no layer is left", hint="keep at least one")
    if model.config.adapter is not None:
        raise UnsupportedError("a split Llama has two kinds of layers", where=base.name, hint="build it anew")
    check_prediction(places[-1])
    config = replace(model.config, layers=_layers(places))
    raw = _described(base, config, places)
    return Restacked(model.family, config, raw, {item.key: item for item in model.family.items(config)})


def check_prediction(last: Place) -> None:
    """Whether layers of multi-token prediction can follow a new last layer: they go on from their model's last one.

    Raises:
        UnsupportedError: Its model has some, and it is not that layer.
    """
    model = last.source.model
    if model.config.mtp_layers and last.layer != model.config.num_layers - 1:
        raise UnsupportedError(
            f"layers of multi-token prediction go on from layer {model.config.num_layers - 1}, and the last one is now"
            f" layer {last.layer}",
            where=last.source.name,
            hint=f"{DROP_PREDICTION} leaves them out",
        )


def _layers(places: Sequence[Place]) -> tuple[LayerConfig, ...]:
    """The layers, each with the new number of the layer that lends it keys and values: the last one before it."""
    found: list[LayerConfig] = []
    for number, place in enumerate(places):
        layer = place.source.model.config.layers[place.layer]
        if layer.kv_donor is not None:
            wanted = Place(place.source, layer.kv_donor)
            donors = [at for at, other in enumerate(places[:number]) if other == wanted]
            if not donors:
                raise UnsupportedError(
                    f"layer {place.layer} uses the keys and values of layer {layer.kv_donor}, which is not before it",
                    where=place.source.name,
                    hint="keep that layer, too",
                )
            layer = replace(layer, kv_donor=donors[-1])
        found.append(layer)
    return tuple(found)


def _described(base: Input, config: ModelConfig, places: Sequence[Place]) -> dict[str, Any]:
    """config.json of a model with other layers.

    Raises:
        UnsupportedError: The family's config.json cannot describe them; the message says which and why.
    """
    model, where = base.model, base.name
    try:
        raw = model.family.unparse(config, model.sidecar.config)
        for inner in (raw, raw.get(model.family.sizes_in or "")):
            if isinstance(inner, dict):
                _follow(inner, places, base)
        read = model.family.parse(raw)
    except CkptkitError as error:
        raise UnsupportedError(
            f"config.json cannot describe these layers: {error.what}", where=where, hint=error.hint
        ) from None
    if found := differing_fields(config, read, ignored=("dtype", "init_std", "mtp_layers")):
        texts = [_difference(item.name, item.layer, item.left, item.right, places) for item in found]
        raise UnsupportedError(f"config.json cannot describe these layers: {'; '.join(texts)}", where=where)
    return raw


def _difference(name: str, layer: int | None, wanted: object, read: object, places: Sequence[Place]) -> str:
    if layer is None:
        return f"{name} would be {in_words(read)}, not {in_words(wanted)}"
    source = places[layer]
    return (
        f"layer {layer} would have {name} {in_words(read)}, and comes from layer {source.layer} of"
        f" {source.source.name}, which has {in_words(wanted)}"
    )


def _follow(raw: dict[str, Any], places: Sequence[Place], base: Input) -> None:
    """Has lists with an entry for each layer follow the layers, where the family has left them alone.

    Raises:
        UnsupportedError: There is such a list, and nothing says what it means.
    """
    count = base.model.config.num_layers
    for key, value in raw.items():
        if not (isinstance(value, list) and "layer" in key and len(value) == count != len(places)):
            continue
        if key not in _BY_LAYER or any(place.source.model is not base.model for place in places):
            raise UnsupportedError(f"{key} has an entry for each layer, and its meaning is not known")
        raw[key] = [deepcopy(value[place.layer]) for place in places]


def stacked(base: Input, first: Input, last: Input, places: Sequence[Place]) -> Checkpoint:
    """A model whose layers come from these places.

    Args:
        base: The model that gives config.json, tokenizer and towers.
        first: The model that gives the embedding.
        last: The model that gives the last norm, the head, and the layers of multi-token prediction.
        places: For each layer where it comes from. All models are alike but for their layers.

    Raises:
        UsageError: There is no layer.
        InputError: A model lacks a tensor of its own layers.
        UnsupportedError: config.json cannot describe these layers in this order.
    """
    form = restack(base, places)
    tensors = {
        key: tensor_of(item, first if item.row.first else last, places if item.layer is None else [places[item.layer]])
        for key, item in form.items.items()
    }
    used = {place.source.name: place.source for place in places} | {one.name: one for one in (base, first, last)}
    sources = {place.source.name: place for place in places}
    comparisons = [check for one in used.values() for check in one.model.comparisons]
    same = len(sources) == 1 and first is last
    return replace(
        form.checkpoint(base, tensors, extras_of(base, places)),
        padding=first.model.padding if same else {},
        comparisons=tuple(comparisons),
        coverage={"copied": len(tensors)},
    )


def tensor_of(item: Item, source: Input, places: Sequence[Place]) -> Tensor:
    """The Megatron tensor that becomes one of a model with other layers.

    Args:
        item: The tensor of the new model.
        source: The model that it comes from, if it is in no layer.
        places: Where its layer comes from; all layers, if it is in none: it may hold a block for each.

    Raises:
        InputError: The model has no such tensor, or one of another shape.
    """
    axis = next((axis for shape in item.row.hf.values() for axis, dim in enumerate(shape) if dim.by_layer), None)
    if item.layer is not None:
        (place,) = places
        return _checked(item, place.source, item.name(place.layer, item.expert))
    if axis is None:
        return _checked(item, source, item.key)
    blocks = [_block(item, place, axis) for place in places]
    return vstack(blocks) if axis == 0 else hstack(blocks)


def _checked(item: Item, source: Input, key: str) -> Tensor:
    tensor = source.model.tensors.get(key)
    if tensor is None:
        raise InputError(f"there is no {key}", where=source.name)
    if tensor.shape != item.shape:
        raise InputError(f"{key} is {list(tensor.shape)}, and {list(item.shape)} is wanted", where=source.name)
    return tensor


def _block(item: Item, place: Place, axis: int) -> Tensor:
    """The block of one layer in a tensor that holds one for each: rows or columns."""
    tensor = place.source.model.tensors[item.key]
    size = tensor.shape[axis] // place.source.model.config.num_layers
    cut = tensor.rows if axis == 0 else tensor.cols
    return cut(place.layer * size, (place.layer + 1) * size)


def extras_of(base: Input, places: Sequence[Place]) -> dict[str, Tensor]:
    """The tensors without a place in Megatron: those of layers follow the layers, all others are those of `base`."""
    model = base.model
    of_layer = model.family.extra_of_layer
    found = {name: one for name, one in model.sidecar.extras.items() if of_layer(name, model.config) is None}
    for number, place in enumerate(places):
        source = place.source.model
        for name, one in source.sidecar.extras.items():
            if of_layer(name, source.config) == place.layer:
                found[_NUMBER.sub(rf"\g<1>{number}.", name, count=1)] = one
    return found
