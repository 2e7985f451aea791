"""Merging by recipe: which tensors of which models become one tensor, and with which parameters.

The tensors are those of the modules of transformers, as mergekit has them: all experts of a layer are one tensor, which
has one norm and one k-th magnitude, whether or not its files store each expert by itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.dtypes import DType
from ckptkit.editing import methods, recipes
from ckptkit.editing.inputs import Input
from ckptkit.editing.layers import Place, Restacked, check_prediction, extras_of, restack, tensor_of
from ckptkit.editing.methods import Task, TaskOptions, Types, promoted
from ckptkit.editing.recipes import Recipe, Settings, Slice, resolved
from ckptkit.editing.token_rows import TokenRows
from ckptkit.editing.vocabulary import config_of_size, has_vocabulary
from ckptkit.errors import InputError, UnsupportedError
from ckptkit.io.castable import CASTABLE
from ckptkit.io.computed import recast
from ckptkit.io.plan import Comparison
from ckptkit.tables.config_fields import set_dtype
from ckptkit.tables.items import Item
from ckptkit.tables.prediction import generic, number_of
from ckptkit.tables.spelling import HUB, Stack
from ckptkit.tensors import Tensor, vstack

_SPARSE = {recipes.TIES: "magnitude", recipes.DARE_TIES: "random", recipes.DARE_LINEAR: "random"}
_CONSENSUS = (recipes.TIES, recipes.DARE_TIES)
_RESCALED = (recipes.DARE_TIES, recipes.DARE_LINEAR)
_WITH_BASE = (recipes.SLERP, recipes.TASK_ARITHMETIC, recipes.TIES, recipes.DARE_TIES, recipes.DARE_LINEAR)


_IN_TOWER = re.compile(r"[.]layers[.]([0-9]{1,6})[.]")


@dataclass(frozen=True)
class _Part:
    """A tensor of one model, as an input of a merge.

    Attributes:
        source: The model.
        name: Its name in the modules of transformers.
        tensor: It.
        parameters: What the recipe says of this model in this slice.
    """

    source: Input
    name: str
    tensor: Tensor
    parameters: Settings


@dataclass(frozen=True)
class Merged:
    """A merge.

    Attributes:
        model: It.
        notes: Sentences for the user.
    """

    model: Checkpoint
    notes: tuple[str, ...]


def merged(
    recipe: Recipe,
    inputs: Mapping[str, Input],
    *,
    out: DType | None,
    seed: int,
    where: object,
    tokens: TokenRows | None = None,
) -> Merged:
    """The model that a recipe makes.

    Args:
        recipe: The recipe.
        inputs: Name in the recipe -> the opened model. They are alike but for their layers, and with `tokens` for their
            vocabularies.
        out: Type to write, which outranks that of the recipe.
        seed: Seed of random numbers.
        where: The recipe's file, for messages.
        tokens: The rows of another tokenizer.

    Raises:
        InputError: The recipe contradicts itself or the models.
        UnsupportedError: The models cannot be merged so.
    """
    return _Merger(recipe, inputs, out, seed, where, tokens).result()


class _Merger:
    def __init__(
        self,
        recipe: Recipe,
        inputs: Mapping[str, Input],
        out: DType | None,
        seed: int,
        where: object,
        tokens: TokenRows | None,
    ) -> None:
        self.recipe, self.inputs, self.seed, self.where = recipe, inputs, seed, where
        self.dtype = recipe.dtype
        self.out = out or recipe.out_dtype
        self.base = inputs[recipe.base or recipe.models[0]]
        self.merged = self.copied = 0
        self.comparisons: list[Comparison] = []
        self.spelling = next((one for one in self.base.model.family.hf_spellings if one.stacks), HUB)
        self.stacks = {part: stack for stack in self.spelling.stacks for part in stack.parts}
        self.experts = cache(self._experts)
        for number, one in enumerate(recipe.slices):
            self._check(one, number)
        self.layers = list(self._layers())
        self.predicting = list(self._predicting())
        self.tokens = tokens
        self.form = self._form()
        self.named = {name: item for item in self.form.items.values() for name in item.hf}

    def _form(self) -> Restacked:
        """The form of the result."""
        form = restack(self.base, [places[0] for _, _, places in self.layers])
        if self.tokens is None:
            return form
        config, raw = config_of_size(form.family, form.config, form.raw, self.tokens.size, self.base.name)
        return replace(form, config=config, raw=raw, items={item.key: item for item in form.family.items(config)})

    def _check(self, one: Slice, number: int) -> None:
        """Whether the method takes the inputs of a slice."""
        names = [source.model for source in one.sources]
        place = f"slices[{number}]" if self.recipe.sliced else "models"
        base, method = one.base or self.recipe.base, self.recipe.method
        if len(set(names)) < len(names):
            raise InputError(f"{place} names a model twice", where=self.where)
        if method == recipes.PASSTHROUGH and len(names) != 1:
            raise InputError(f"{place}: passthrough takes one model, not {len(names)}", where=self.where)
        if method in _WITH_BASE and base not in names:
            raise InputError(f"{place}: {method} needs a base_model among its inputs", where=self.where)
        if method == recipes.SLERP and len(names) != 2:
            raise InputError(f"{place}: slerp takes two models, not {len(names)}", where=self.where)
        for source in one.sources:
            count = self.inputs[source.model].model.config.num_layers
            if source.layers is not None and source.layers[1] > count:
                what = f"{place}: layer_range {list(source.layers)} of {source.model}, which has {count} layers"
                raise InputError(what, where=self.where)

    def _layers(self) -> Iterator[tuple[Slice, float, list[Place]]]:
        """For each new layer: its slice, its place from 0 to 1 in it, and where its inputs are."""
        for one in self.recipe.slices:
            sources = [self.inputs[source.model] for source in one.sources]
            first = [0 if source.layers is None else source.layers[0] for source in one.sources]
            bounds = one.sources[0].layers
            count = sources[0].model.config.num_layers if bounds is None else bounds[1] - bounds[0]
            if bounds is None and any(source.model.config.num_layers != count for source in sources):
                raise InputError("the models have different numbers of layers", where=self.where, hint="use slices")
            for number in range(count):
                t = number / (count - 1) if count > 1 else 1.0
                yield one, t, [Place(source, at + number) for source, at in zip(sources, first, strict=True)]

    def _predicting(self) -> Iterator[tuple[Slice, float, list[Place]]]:
        """The same for each layer of multi-token prediction: they follow the last layers of the last slice."""
        one, t, last = self.layers[-1]
        for place in last:
            check_prediction(place)
        for number in range(last[0].source.model.config.mtp_layers):
            yield one, t, [Place(place.source, place.source.model.config.num_layers + number) for place in last]

    def _layer_of(self, item: Item) -> int | None:
        """The number of the new layer that a tensor belongs to; those of multi-token prediction follow all others."""
        number = number_of(item.key)
        return item.layer if number is None else len(self.layers) + number

    def result(self) -> Merged:
        """The merged model."""
        tensors = {key: self._tensor(item) for key, item in self.form.items.items()}
        places = [places[0] for _, _, places in self.layers]
        model = self.form.checkpoint(self.base, tensors, self._extras(places))
        used = [check for one in self.inputs.values() for check in one.model.comparisons]
        model = replace(
            model,
            padding={},
            comparisons=(*used, *self.comparisons),
            coverage={"merged": self.merged, "copied": self.copied},
        )
        if model.main_dtype != self.base.model.config.dtype:
            set_dtype(model.sidecar.config, model.main_dtype)
            model = replace(model, config=replace(model.config, dtype=model.main_dtype))
        return Merged(model, tuple(self._notes()))

    def _notes(self) -> Iterator[str]:
        yield f"{self.merged:,} tensors are merged ({self.recipe.method}), {self.copied:,} are copied"
        own = [name for name in self.base.model.sidecar.extras if not self._follows(name)]
        if own and self.recipe.sliced:
            yield f"{len(own):,} tensors outside of the text model are those of {self.base.name}"

    def _follows(self, extra: str) -> bool:
        return self.form.family.follows_from_config(extra, self.base.model.config)

    def _extras(self, places: Sequence[Place]) -> dict[str, Tensor]:
        """The tensors without a place in Megatron. Towers are merged, too; slices are about the text model alone."""
        found = extras_of(self.base, places)
        if self.recipe.sliced:
            return found
        (one,) = self.recipe.slices
        sources = [self.inputs[source.model] for source in one.sources]
        layers: dict[str, int] = {}
        for name in found:
            before, _, number = _tower_layer(name)
            layers[before] = max(layers.get(before, 0), number + 1)
        for name in dict.fromkeys(name for source in sources for name in source.model.sidecar.extras):
            if self._follows(name):
                continue
            parts = [
                self._extra(name, source, given.parameters) for source, given in zip(sources, one.sources, strict=True)
            ]
            if any(part.tensor.shape != parts[0].tensor.shape for part in parts):
                raise InputError(f"{name} differs in shape between the models", where=self.base.name)
            before, inside, number = _tower_layer(name)
            t = (number / (layers[before] - 1) if layers[before] > 1 else 1.0) if inside else 0.0
            bound = parts[0].tensor.shape == ()  # of a range of values, which may be infinite: no weight
            found[name] = self._alike(name, parts) if bound else self._part(name, parts, one, t)
        return found

    def _extra(self, name: str, source: Input, parameters: Settings) -> _Part:
        tensor = source.model.sidecar.extras.get(name)
        if tensor is None:
            raise InputError(f"there is no {name}, which others have", where=source.name)
        return _Part(source, name, tensor, parameters)

    def _tensor(self, item: Item) -> Tensor:
        """A Megatron tensor, made part by part: recipes are about Hugging Face tensors."""
        if self.tokens is not None and has_vocabulary(item):
            return self._of_tokens(item, self.tokens)
        layer = self._layer_of(item)
        if layer is not None:
            one, t, places = [*self.layers, *self.predicting][layer]
            sources = [place.source for place in places]
            wholes = [tensor_of(item, place.source, [place]) for place in places]
            keys = [item.key if item.layer is None else item.name(place.layer, item.expert) for place in places]
        else:
            one, t = self.recipe.slices[0 if item.row.first else -1], 0.0
            sources = [self.inputs[source.model] for source in one.sources]
            wholes = [tensor_of(item, source, self._places_of(number, item)) for number, source in enumerate(sources)]
            keys = [item.key] * len(sources)
        if not item.hf:
            return wholes[0]
        unpacked = [item.unpack(whole) for whole in wholes]
        made = {}
        for number, (name, template) in enumerate(zip(item.hf, item.row.hf, strict=True)):
            stack = self.stacks.get(template if item.layer is not None else generic(template))
            if stack is not None and self.recipe.method != recipes.PASSTHROUGH:
                assert layer is not None
                made[name] = self.experts(stack, layer)[name]
                continue
            names = [source.model.items[key].hf[number] for source, key in zip(sources, keys, strict=True)]
            if stack is None:
                names = [self.spelling.written(one) for one in names]
            else:
                names = [stack.fused.format(i=place.layer) for place in places]
            parts = [
                _Part(source, called, pieces[name], given.parameters)
                for source, called, pieces, given in zip(sources, names, unpacked, one.sources, strict=True)
            ]
            made[name] = self._part(self._called(item, name, stack), parts, one, t)
        return self._packed(item, wholes[0], unpacked[0], made)

    def _of_tokens(self, item: Item, tokens: TokenRows) -> Tensor:
        """An embedding or a head: its rows are put in the order of the new tokens before they are merged.

        Raises:
            UnsupportedError: It has a part for each layer, and the layers are others.
        """
        one = self.recipe.slices[0 if item.row.first else -1]
        sources = [self.inputs[source.model] for source in one.sources]
        if self.recipe.sliced and any(dim.by_layer for shape in item.row.hf.values() for dim in shape):
            raise UnsupportedError("slices with another tokenizer, of a model with per-layer embeddings")
        (name,) = item.hf
        own = [source.model.items[item.key] for source in sources]
        tables = [one.unpack(source.model.tensors[item.key])[name] for one, source in zip(own, sources, strict=True)]
        compute = self.dtype or promoted([table.out_dtype for table in tables])
        tables = tokens.tables([source.name for source in sources], one.base or self.recipe.base, tables, compute)
        parts = [
            _Part(source, self.spelling.written(name), table, given.parameters)
            for source, table, given in zip(sources, tables, one.sources, strict=True)
        ]
        return item.pack([self._part(self.spelling.written(name), parts, one, 0.0)])

    def _called(self, item: Item, name: str, stack: Stack | None) -> str:
        return self.spelling.written(name) if stack is None else stack.fused.format(i=self._layer_of(item))

    def _experts(self, stack: Stack, layer: int) -> dict[str, Tensor]:
        """Hugging Face name -> tensor of one expert, cut out of what all experts of a layer are merged to."""
        one, t, places = [*self.layers, *self.predicting][layer]
        names = [
            template.format(i=layer, e=expert)
            for expert in range(self.form.config.num_experts)
            for template in stack.parts
        ]
        items = [self.named[name] for name in names]
        parts = []
        for place, given in zip(places, one.sources, strict=True):
            pieces = [
                item.unpack(tensor_of(item, place.source, [place]))[name]
                for item, name in zip(items, names, strict=True)
            ]
            if len({piece.out_dtype for piece in pieces}) > 1:
                what = f"the experts of layer {place.layer} have several types"
                raise UnsupportedError(what, where=place.source.name, hint="convert --dtype makes them one")
            parts.append(_Part(place.source, stack.fused.format(i=place.layer), vstack(pieces), given.parameters))
        whole = self._part(stack.fused.format(i=layer), parts, one, t)
        found, top = {}, 0
        for item, name in zip(items, names, strict=True):
            height = item.parts[name][0]
            found[name] = whole.rows(top, top + height)
            top += height
        return found

    def _places_of(self, number: int, item: Item) -> list[Place]:
        """The layers of one input, for a tensor that holds a block for each layer."""
        if not any(dim.by_layer for shape in item.row.hf.values() for dim in shape):
            return []
        if any(len(places) != len(self.layers[0][2]) for _, _, places in self.layers):
            raise UnsupportedError("slices with different numbers of models, of a model with per-layer embeddings")
        return [places[number] for _, _, places in self.layers]

    def _packed(self, item: Item, whole: Tensor, before: Mapping[str, Tensor], parts: dict[str, Tensor]) -> Tensor:
        """Parts as one tensor. Copies become computed tensors where they are joined with such of another type."""
        (dtype, *others) = dict.fromkeys(part.out_dtype for part in parts.values())
        if others:
            raise InputError(f"{', '.join(item.hf)} would have several types", where=self.where, hint="state a dtype")
        if all(parts[name].same_bytes_as(before[name].astype(dtype)) for name in parts):
            return whole if whole.out_dtype == dtype else whole.astype(dtype)
        if whole.out_dtype != dtype:
            whole = recast(whole, dtype, double=dtype.name == "F64")
        parts = {
            name: part if part.cast is None else recast(part, dtype, double=dtype.name == "F64")
            for name, part in parts.items()
        }
        return item.replaced(whole, parts)

    def _part(self, name: str, parts: Sequence[_Part], one: Slice, t: float) -> Tensor:
        """One Hugging Face tensor of the result."""
        tensors = [part.tensor for part in parts]
        if any(tensor.dtype.name not in CASTABLE for tensor in tensors):
            return self._alike(name, parts)
        compute = self.dtype or promoted([tensor.out_dtype for tensor in tensors])
        types = Types(compute, self.out or compute)
        shared = (one.parameters, self.recipe.parameters)

        def parameter(key: str, default: float | None = None) -> float:
            return self._required(resolved(shared, key, name, t, self.where), default, key, name)

        def own(key: str, default: float | None = None) -> Callable[[_Part], float]:
            return lambda part: self._required(
                resolved((part.parameters, *shared), key, part.name, t, self.where),
                default,
                key,
                f"{part.source.name} ({part.name})",
            )

        method = self.recipe.method
        if method == recipes.PASSTHROUGH:
            return self._passed(parts[0], shared, t, types)
        self.merged += 1
        if method == recipes.LINEAR:
            weights = [own("weight")(part) for part in parts]
            normalize = bool(parameter("normalize", 1.0))
            if normalize and not sum(weights):
                raise InputError(f"the weights of {name} add up to 0", where=self.where, hint="normalize: false")
            return methods.linear(tensors, weights, normalize, types)
        base_name = one.base or self.recipe.base
        assert base_name is not None
        base = self.inputs[base_name]
        (start,) = (part for part in parts if part.source is base)
        others = [part for part in parts if part.source is not base]
        if method == recipes.SLERP:
            return methods.slerp(start.tensor, others[0].tensor, parameter("t"), types)
        weight, density = own("weight"), own("density", 1.0)
        tasks = [
            Task(part.tensor, weight(part), density(part), f"{part.source.name} {part.name} {name}") for part in others
        ]
        options = TaskOptions(
            _SPARSE.get(method),
            method in _CONSENSUS,
            bool(parameter("normalize", float(method == recipes.TIES))),
            bool(parameter("rescale", float(method in _RESCALED))),
            parameter("lambda", 1.0),
            self.seed,
        )
        return methods.task_arithmetic(start.tensor, tasks, options, types)

    def _required(self, found: float | bool | None, default: float | None, key: str, what: str) -> float:
        value = default if found is None else found
        if value is None:
            raise InputError(f"the parameter {key} is missing for {what}", where=self.where)
        return float(value)

    def _passed(self, part: _Part, shared: Sequence[Settings], t: float, types: Types) -> Tensor:
        scale = resolved((part.parameters, *shared), "scale", part.name, t, self.where)
        if scale is not None:
            self.merged += 1
            return methods.scaled(part.tensor, float(scale), types)
        if part.tensor.out_dtype == types.compute == types.out:
            self.copied += 1
            return part.tensor
        self.merged += 1
        if types.out != types.compute and part.tensor.out_dtype != types.compute:
            return methods.scaled(part.tensor, 1.0, types)  # rounded to both, one after the other
        return part.tensor.astype(types.out)

    def _alike(self, name: str, parts: Sequence[_Part]) -> Tensor:
        """A tensor that is not of floating-point numbers: it must be the same in all models."""
        self.copied += 1
        first = parts[0]
        self.comparisons += [
            Comparison(first.tensor, part.tensor, f"{name} of {first.source.name} and of {part.source.name}")
            for part in parts[1:]
        ]
        return first.tensor


def _tower_layer(name: str) -> tuple[str, bool, int]:
    """What comes before the number of a layer in a name, whether there is one, and it."""
    found = _IN_TOWER.search(name)
    return ("", False, 0) if found is None else (name[: found.start()], True, int(found[1]))
