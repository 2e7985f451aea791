"""Value models: the body of a language model, and a head with one output per token.

Hugging Face stores them as classifiers with a single label, of tokens or of sequences. Both have `score.weight` [1, D].
A classifier of tokens also has a bias, unless config.json sets `token_classification_bias` to false. A classifier of
sequences is the same model, read at the last token. Where transformers has no such class, the directory of the model
holds one of ours.

Trainers on Megatron replace the output layer by a plain linear layer, whole on every tensor parallel rank:
`output_layer.weight` [1, D]. Source: `LinearForLastLayer` of verl and mbridge.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ckptkit.errors import UnsupportedError
from ckptkit.sharding.rules import REPLICATED
from ckptkit.tables.dims import ONE, Dim
from ckptkit.tables.family import Family
from ckptkit.tables.model_config import LayerConfig, ModelConfig
from ckptkit.tables.rows import Raw, once

OF_TOKENS = "ForTokenClassification"
_WEIGHT, _BIAS = "output_layer.weight", "output_layer.bias"


def _has_bias(config: ModelConfig, layer: LayerConfig) -> bool:
    return config.value_bias


_WIDTH = Dim("hidden_size", lambda config, layer: config.hidden_size)
"""The width after the last layer, whatever that of the first one is."""

ROWS = (
    once(_WEIGHT, "score.weight", (ONE, _WIDTH), REPLICATED),
    once(_BIAS, "score.bias", (ONE,), when=_has_bias),
)
"""The head of a value model."""


def value_families(families: Iterable[Family]) -> list[Family]:
    """The value models of the families that have Hugging Face classes for them.

    A family derived from another one (`dataclasses.replace`) may still name the other's classes: these stay with the
    family that comes first.

    Raises:
        UnsupportedError: Two families name the same class, and each has others as well.
    """
    families = tuple(families)
    owners: dict[str, str] = {}
    found = []
    for family in families:
        taken = {name: owners[name] for name in family.value_architectures if name in owners}
        if len(taken) < len(family.value_architectures):
            if taken:
                name, owner = next(iter(taken.items()))
                raise UnsupportedError(f"the families {owner} and {family.name} both have the value model {name}")
            found.append(_value_family(family, families))
        for name in family.value_architectures:
            owners.setdefault(name, family.name)
    return found


def name_of_value_family(family: Family) -> str:
    """The name of the family of a family's value models."""
    return f"{family.name}_value"


def _value_family(family: Family, families: Iterable[Family]) -> Family:
    """A family of language models with the head replaced.

    Args:
        family: The language models.
        families: All of them, among which the text part of a multimodal model has its own.
    """
    name = name_of_value_family(family)

    def parse(raw: Raw) -> ModelConfig:
        architecture = (raw.get("architectures") or family.value_architectures)[0]
        if "architectures" in raw:
            _check_labels(raw, architecture)
        bias = architecture.endswith(OF_TOKENS) and bool(raw.get("token_classification_bias", True))
        return replace(
            family.parse(raw),
            family=name,
            architecture=architecture,
            tied=False,  # config.json may describe the language model head, which is not there
            value_head=True,
            value_bias=bias,
        )

    def unparse(config: ModelConfig, base: Raw) -> dict[str, Any]:
        tied = family.parse(base).tied if base else False
        body = replace(
            config,
            family=family.name,
            architecture=family.architectures[0],
            tied=tied,
            value_head=False,
            value_bias=False,
        )
        auto_map = {} if base else family.value_directory.auto_map
        return as_value_config(family.unparse(body, base), config.architecture, config.value_bias, auto_map)

    def text_only(raw: Raw) -> dict[str, Any]:
        assert family.text_only is not None
        labels = {key: raw[key] for key in ("id2label", "label2id") if key in raw}
        text = {**family.text_only(raw), **labels}
        (own,) = (other for other in families if text["architectures"][0] in other.architectures)
        return as_value_config(text, own.value_architectures[0], parse(raw).value_bias, own.value_directory.auto_map)

    return replace(
        family,
        name=name,
        architectures=family.value_architectures,
        value_architectures=(),
        directory=family.value_directory,
        text_only=None if family.text_only is None else text_only,
        rows=(*(row for row in family.rows if row.megatron != _WEIGHT), *ROWS),
        parse=parse,
        unparse=unparse,
        replicas=tuple(replica for replica in family.replicas if not replica.hf.endswith("lm_head.weight")),
        marks=(*family.marks, _BIAS),
    )


def as_value_config(
    raw: Raw, architecture: str, bias: bool, auto_map: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The config.json of a value model.

    Args:
        raw: The config.json of a model with the same body.
        architecture: Its class.
        bias: Whether its head has a bias.
        auto_map: Auto class of transformers -> where the class is, of a model that brings its code.
    """
    changed = {**raw, "architectures": [architecture]}
    if auto_map:
        changed["auto_map"] = dict(auto_map)
    if _labels(raw) != 1:
        changed |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    if architecture.endswith(OF_TOKENS) and bool(raw.get("token_classification_bias", True)) != bias:
        changed["token_classification_bias"] = bias
    return changed


def _labels(raw: Raw) -> int:
    """How many labels a classifier has; transformers assumes two where config.json names none."""
    names = raw.get("id2label")
    count = len(names) if isinstance(names, Mapping) else raw.get("num_labels", 2)
    return count if type(count) is int else 2


def _check_labels(raw: Raw, architecture: str) -> None:
    if (count := _labels(raw)) != 1:
        raise UnsupportedError(
            f"{architecture} with {count} labels",
            hint="a value model has one: id2label of config.json must name a single label",
        )
