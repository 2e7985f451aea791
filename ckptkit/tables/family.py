"""A family: everything that ckptkit knows about one kind of model, as data."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from ckptkit.dtypes import DType
from ckptkit.errors import UsageError
from ckptkit.tables import prediction
from ckptkit.tables.bridge import BridgeProvider
from ckptkit.tables.items import Item, Kind, number
from ckptkit.tables.model_config import LayerConfig, ModelConfig
from ckptkit.tables.prediction import NUMBERED, Archive
from ckptkit.tables.rows import Buffer, Raw, Replica, Row
from ckptkit.tables.spelling import GROUPED, HUB, LOCAL, SEQUENTIAL, TE, HfSpelling, Spelling, template
from ckptkit.tensors import Tensor

_ROTARY = re.compile(
    r"(?:language_model\.|model\.)*(?:layers\w*\.(0|[1-9][0-9]{0,8})\.self_attn\.)?rotary_emb\w*\.(?:\w+_)?inv_freq"
)

Complete = Callable[[Raw, Mapping[str, tuple[int, ...]], Callable[[str], Raw | None]], tuple[dict[str, Any], list[str]]]
"""See `HfDirectory.complete`."""


@dataclass(frozen=True)
class FusedRow:
    """A row in place of several others, which the ranks of some models of Megatron have.

    Distributed checkpoints of these models have the usual rows.

    Attributes:
        row: The row; its Hugging Face tensors are those of the others, in order.
        replaced: Endings of the Megatron names of the others.
        spelling: The names of these ranks, by which `--spec` asks for them.
        args: The entry of `args` that says so.
        when: Whether Megatron builds such a model.
    """

    row: Row
    replaced: tuple[str, ...]
    spelling: Spelling
    args: str
    when: Callable[[ModelConfig], bool]

    @property
    def ending(self) -> str:
        """Ending of the Megatron names of the row."""
        return "." + self.row.megatron.rpartition("{i}.")[2]

    def is_in(self, names: Iterable[str]) -> bool:
        """Whether names are those of such ranks."""
        return any(name.endswith(self.ending) for name in names)

    def usual(self, names: Iterable[str]) -> set[str]:
        """The canonical names in place of those of such ranks."""
        found = {self.spelling.canonical(name) for name in names}
        stems = {name.removesuffix(self.ending) for name in found if name.endswith(self.ending)}
        kept = {name for name in found if not name.endswith(self.ending)}
        return kept | {stem + ending for stem in stems for ending in self.replaced}

    def table(self, family: Family) -> Family:
        """The family with this row in place of the others, and with the names of such ranks."""
        rows = [row for row in family.rows if not row.megatron.endswith(self.replaced)]
        return replace(family, rows=(*rows, self.row), spellings=(self.spelling,))


@dataclass(frozen=True)
class MegatronQuirks:
    """Differences between Megatron's form of a family and its form of all others.

    Attributes:
        to_args: Model -> entries of Megatron's `args` that only this family has.
        from_args: (`args`, window of each layer) -> the keys of config.json that `to_args` covers.
        attention_of: Layer -> the suffix that torch_dist keys add to `self_attention`. Megatron stacks layers with
            different attention separately, and the suffix keeps these stacks apart.
        local_only: Whether Megatron builds a model from the local layer spec even if the norms have the names of `te`.
        plain: Endings of modules that no layer spec builds from Transformer Engine.
        parallel: Endings of parallel linear layers that only this family has.
        local_keys: Whether a distributed checkpoint of the local spec has that spec's names. Elsewhere Megatron maps
            them to those of `te`.
        foreign: Piece of a Megatron name -> the layout it gives away. Such a layout is refused by this name: no table
            reads it.
        fused: A row in place of several others that the ranks of some models have, or None.
    """

    to_args: Callable[[ModelConfig], dict[str, Any]] | None = None
    from_args: Callable[[Mapping[str, Any], Sequence[int | None]], dict[str, Any]] | None = None
    attention_of: Callable[[LayerConfig], str] | None = None
    local_only: Callable[[ModelConfig], bool] = lambda config: False
    plain: tuple[str, ...] = ()
    parallel: tuple[str, ...] = ()
    local_keys: bool = False
    foreign: Mapping[str, str] = field(default_factory=dict)
    fused: FusedRow | None = None


@dataclass(frozen=True)
class HfDirectory:
    """Differences between the Hugging Face directories of a family and those of all others.

    Attributes:
        complete: Makes a config.json self-contained. Arguments: the raw config.json; names and shapes of the tensors
            beside it; a function that reads the config.json of another directory. Returns: the complete config.json,
            and notes for the user.
        legacy_config: Raw config.json -> the config.json of the published layout of the same tensors.
        code: Files with the model's Python code. Every output directory gets a copy.
        auto_map: `auto_map` of config.json: auto class of transformers -> module in `code` and class.
    """

    complete: Complete | None = None
    legacy_config: Callable[[Raw], dict[str, Any]] | None = None
    code: tuple[Path, ...] = ()
    auto_map: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name: Short name.
        architectures: Hugging Face class names.
        rows: The table.
        parse: Raw config.json -> `ModelConfig`.
        unparse: (`ModelConfig` read from Megatron's `args`, base config.json) -> raw config.json with these values.
        replicas: Redundant copies that some Hugging Face files hold.
        extras: Hugging Face tensors without a place in Megatron; they go into the sidecar. `{i}` in a name stands for
            every layer, a `*` at its end for any ending.
        predicts: Whether checkpoints may hold layers of multi-token prediction (`tables/prediction.py`).
        prediction: How Hugging Face archives hold these.
        buffers: Extras that can be made again where the source lacks them.
        marks: Canonical Megatron names (without numbers) by which a checkpoint of this family is recognised.
        spellings: Megatron names of different writers; the first is canonical.
        hf_spellings: Hugging Face names of different writers; a new model gets the first.
        value_architectures: Hugging Face class names of the same layers with a value head. `--head value` turns a
            language model into the first.
        value_directory: Differences in the Hugging Face directories of these.
        prefix: Beginning of all Megatron names of this family's models. `--layout text` writes none.
        towers: Extras that other writers keep in a Megatron checkpoint, each whole on every rank that has it: beginning
            of their Megatron names -> beginning of the extras' names.
        text_only: Multimodal families: raw config.json -> raw config.json of the text model alone. Both models have the
            same canonical names.
        sizes_in: Key of config.json that holds the sizes of the text model, or None for the top level.
        quirks: Differences in Megatron's form of the family.
        directory: Differences in its Hugging Face directories.
        bridge: How Megatron-Bridge builds this family's models, or None if it does not.
    """

    name: str
    architectures: tuple[str, ...]
    rows: tuple[Row, ...]
    parse: Callable[[Raw], ModelConfig]
    unparse: Callable[[ModelConfig, Raw], dict[str, Any]]
    replicas: tuple[Replica, ...] = ()
    extras: tuple[str, ...] = ()
    predicts: bool = False
    prediction: Archive = NUMBERED
    buffers: tuple[Buffer, ...] = ()
    marks: tuple[str, ...] = ()
    spellings: tuple[Spelling, ...] = (TE, LOCAL)
    hf_spellings: tuple[HfSpelling, ...] = (HUB,)
    value_architectures: tuple[str, ...] = ()
    value_directory: HfDirectory = HfDirectory()
    prefix: str = ""
    towers: Mapping[str, str] = field(default_factory=dict)
    text_only: Callable[[Raw], dict[str, Any]] | None = None
    sizes_in: str | None = None
    quirks: MegatronQuirks = MegatronQuirks()
    directory: HfDirectory = HfDirectory()
    bridge: BridgeProvider | None = None

    def items(self, config: ModelConfig) -> Iterator[Item]:
        """Every Megatron tensor of a model with this config: those outside of layers, then layer by layer."""
        kind = lru_cache(maxsize=None)(lambda at, layer: Kind(self.rows[at], layer, config))
        for at, row in enumerate(self.rows):
            if "{i}" not in row.megatron and row.when(config, config.layers[0]):
                yield from kind(at, config.layers[0]).items(None)
        for index, layer in enumerate(config.layers):
            for at, row in enumerate(self.rows):
                if "{i}" in row.megatron and row.when(config, layer):
                    experts = range(config.num_experts) if "{e}" in row.megatron else (None,)
                    yield from kind(at, layer).items(index, experts)
        for row in prediction.rows_of(self.rows, config, config.mtp_layers, self.prediction):
            experts = range(config.num_experts) if "{e}" in row.megatron else (None,)
            yield from Kind(row, prediction.inner_layer(config), config).items(None, experts)

    def attention_groups(self, config: ModelConfig) -> list[str]:
        """The suffix of `self_attention` in each layer's torch_dist keys; empty where all layers stack together."""
        suffix = self.quirks.attention_of
        return [] if suffix is None else [suffix(layer) for layer in config.layers]

    @cached_property
    def hf_ends(self) -> frozenset[str]:
        """The Hugging Face names, in every spelling, of tensors that are in no layer."""
        names = [name for row in self.rows for name in row.hf if "{" not in name]
        return frozenset(spelling.written(name) for spelling in self.hf_spellings for name in names)

    def is_extra(self, name: str, config: ModelConfig) -> bool:
        """Whether a Hugging Face tensor belongs to the model, although Megatron has no place for it.

        Frequencies of rotary embeddings do so in every family: old releases of transformers kept them, though they
        follow from config.json.
        """
        if self.follows_from_config(name, config):
            return True
        return any(_matches(pattern, name, config.num_layers) for pattern in self.extras)

    def follows_from_config(self, name: str, config: ModelConfig) -> bool:
        """Whether an extra is a number that the code of the model knows: files with and without it mean the same."""
        if rotary := _ROTARY.fullmatch(name):
            return int(rotary[1] or 0) < config.num_layers + config.mtp_layers
        return any(_matches(buffer.hf, name, config.num_layers) for buffer in self.buffers if buffer.when(config))

    def copies(self, config: ModelConfig) -> tuple[Replica, ...]:
        """The redundant copies that Hugging Face files of a model may hold."""
        own = tuple(replica for replica in self.replicas if replica.when(config))
        return (*own, *prediction.copies_of(config, self.prediction))

    def extra_of_layer(self, name: str, config: ModelConfig) -> int | None:
        """The number of the layer that an extra belongs to, or None: towers have layers of their own."""
        if rotary := _ROTARY.fullmatch(name):
            return None if rotary[1] is None else int(rotary[1])
        patterns = [*self.extras, *(buffer.hf for buffer in self.buffers)]
        found = (_layer_in(pattern, name) for pattern in patterns if not pattern.endswith("*"))
        return next((layer for layer in found if layer is not None and layer < config.num_layers), None)

    def missing_buffers(self, present: Collection[str], config: ModelConfig, dtype: DType) -> dict[str, Tensor]:
        """The buffers of a model that `present` lacks, with the values of the class of transformers.

        Args:
            present: Hugging Face names at hand.
            config: The model.
            dtype: Element type to make them in, that of the weights.

        Raises:
            UnsupportedError: `dtype` is no floating-point type that torch rounds numbers to.
        """
        names = {
            buffer.hf.format(i=index): buffer.value
            for buffer in self.buffers
            if buffer.when(config)
            for index in range(config.num_layers)
        }
        return {name: number(value, dtype) for name, value in names.items() if name not in present}

    def unfuse(
        self, tensors: Mapping[str, Tensor], config: ModelConfig, items: Collection[Item] = ()
    ) -> tuple[dict[str, Tensor], str]:
        """Hugging Face tensors under the names of any writer -> canonical names, and the name of the writer's spelling.

        Args:
            tensors: Everything in the files.
            config: The model.
            items: Its items, if they are at hand.

        Raises:
            InputError: Stacked experts are missing, or their shape contradicts the config.
        """
        items = items or list(self.items(config))
        spelling = self.hf_spelling(tensors, config, items)
        if spelling.canonical_as_is:
            return dict(tensors), spelling.name
        shapes = {name: shape for item in items for name, shape in item.parts.items()}
        return spelling.split(tensors, shapes, config), spelling.name

    def fuse(self, tensors: Mapping[str, Tensor], config: ModelConfig, spelling: str) -> dict[str, Tensor]:
        """Hugging Face tensors under canonical names -> the names of a spelling.

        Raises:
            UsageError: The family has no such spelling.
            InputError: Experts that should be one tensor differ in dtype.
        """
        found = next((found for found in self.hf_spellings if found.name == spelling), None)
        if found is None:
            raise UsageError(f"{self.name} has no spelling {spelling!r}", hint=_names(self.hf_spellings))
        return dict(tensors) if found.canonical_as_is else found.join(tensors, config)

    def hf_spelling(self, names: Collection[str], config: ModelConfig, items: Collection[Item] = ()) -> HfSpelling:
        """The spelling in which most of these Hugging Face names occur.

        Args:
            names: The names.
            config: The model.
            items: Its items, if they are at hand.
        """
        first = self.hf_spellings[0]
        if len(self.hf_spellings) == 1:
            return first
        canonical = [name for item in items or self.items(config) for name in item.hf]
        present = set(names)
        if first.canonical_as_is and present.issuperset(canonical):  # no spelling has more names
            return first
        return max(self.hf_spellings, key=lambda spelling: len(spelling.names(canonical, config) & present))

    def spelling(self, name: str, experts: str | None = None, *, text: bool = False) -> Spelling:
        """The Megatron spelling called `name`.

        Args:
            name: `te`, `local`, or another that the family has.
            experts: `grouped` or `sequential`; None for the spelling's own.
            text: Without the prefix of a multimodal family, as a text model alone is named.

        Raises:
            UsageError: The family has no such spelling.
        """
        found = next((found for found in self.spellings if found.name == name), None)
        if found is None or experts not in (None, GROUPED, SEQUENTIAL):
            wrong = f"spec {name!r}" if found is None else f"naming of experts {experts!r}"
            hint = _names(self.spellings) if found is None else f"{GROUPED} or {SEQUENTIAL}"
            raise UsageError(f"{self.name} has no {wrong}", hint=hint)
        return replace(found, experts=experts or found.experts, prefix="" if text else found.prefix or self.prefix)

    def spelling_of(self, names: Iterable[str], config: ModelConfig | None = None) -> Spelling:
        """The spelling of Megatron names: the one in which most of these names occur.

        Args:
            names: The names.
            config: If given, tensors of this model that are missing from `names` also count against a spelling.
        """
        written = {template(name) for name in names}
        if config is None:
            return min(self._variants(), key=lambda spelling: len(written - self._templates(spelling, self._all_rows)))
        rows = [row for row in self.rows if any(row.when(config, layer) for layer in config.layers)]
        rows += prediction.rows_of(self.rows, config, config.mtp_layers, self.prediction)
        return min(self._variants(), key=lambda spelling: len(written ^ self._templates(spelling, rows)))

    def fits(self, names: Iterable[str]) -> bool:
        """Whether the table has all of these Megatron names, and they include the marks of the family."""
        written = {template(name) for name in names}
        spelling = self.spelling_of(written)
        marks = {spelling.written(mark) for mark in self.marks}
        return marks <= written <= self._templates(spelling, self._all_rows)

    @cached_property
    def _all_rows(self) -> tuple[Row, ...]:
        """The rows, and those of layers of multi-token prediction whatever a model has."""
        if not self.predicts:
            return self.rows
        return (*self.rows, *prediction.every_row(self.rows))

    def _variants(self) -> Iterator[Spelling]:
        """Every way to write the Megatron names, the usual ones first."""
        for other in (False, True):
            for base in self.spellings:
                usual = base.experts
                experts = usual if not other else SEQUENTIAL if usual == GROUPED else GROUPED
                for prefix in dict.fromkeys((base.prefix or self.prefix, "")):
                    yield replace(base, experts=experts, prefix=prefix)

    def _templates(self, spelling: Spelling, rows: Iterable[Row]) -> set[str]:
        """The names of rows without numbers, as a spelling writes them."""
        return {template(spelling.written(row.megatron.format(i=0, e=0))) for row in rows}


def _names(spellings: Iterable[Spelling | HfSpelling]) -> str:
    return f"one of {', '.join(spelling.name for spelling in spellings)}"


def _matches(pattern: str, name: str, num_layers: int) -> bool:
    if pattern.endswith("*"):
        return name.startswith(pattern[:-1])
    layer = _layer_in(pattern, name)
    return layer is not None and layer < num_layers


def _layer_in(pattern: str, name: str) -> int | None:
    """The number in a name in place of the `{i}` of a pattern."""
    head, _, tail = pattern.partition("{i}")
    match = re.fullmatch(f"{re.escape(head)}(0|[1-9][0-9]*){re.escape(tail)}", name)
    return None if match is None else int(match[1])
