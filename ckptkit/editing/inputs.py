"""The models that an operation reads: how they are opened, and what of them must agree."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.config_fields import differing_fields, in_words
from ckptkit.checkpoints.prediction import COUNTS
from ckptkit.checkpoints.sources import describes_itself, open_located
from ckptkit.errors import UnsupportedError, UsageError
from ckptkit.formats.hub import locate
from ckptkit.tables.model_config import ModelConfig

DROP_PREDICTION = "--drop-prediction"
_OF_TRAINING = ("dtype", "init_std")
"""Fields that say nothing about what a model computes."""
_OF_TENSORS = ("vocab_size", "tied")
"""Fields that say which tensors there are and how large, beside those of layouts: a tied model has no head to mix."""


@dataclass(frozen=True)
class Input:
    """A model that an operation reads.

    Attributes:
        name: How the user names it, which is unique among the inputs of an operation.
        model: The opened checkpoint.
        left_out: Layers of multi-token prediction that it has and the operation does not see.
    """

    name: str
    model: Checkpoint
    left_out: int = 0


@dataclass(frozen=True)
class Opening:
    """Opens the models of an operation.

    Attributes:
        stack: Keeps fetched files until it closes.
        headers_only: Fetch no more than a plan needs.
        options: Options of `open_checkpoint`, for the models that do not describe themselves.
        drop_prediction: Leave out layers of multi-token prediction.
    """

    stack: ExitStack
    headers_only: bool
    options: dict[str, Any] = field(default_factory=dict)
    drop_prediction: bool = False

    def open(self, path: str | Path, name: str | None = None, iteration: int | None = None) -> Input:
        """Opens a model. Hugging Face directories and models on the hub describe themselves.

        Args:
            path: A directory, `org/model@revision` on the hub, or a folder in a store.
            name: How to call it; the default is its path.
            iteration: One of several iterations in the directory.

        Raises:
            UsageError: It is an adapter, or there is no such iteration.
            InputError: It is damaged or incomplete.
            UnsupportedError: No family or format of ours, or an adapter stands beside the weights.
        """
        located = self.stack.enter_context(locate(path, headers_only=self.headers_only))
        options = {} if describes_itself(located) else dict(self.options)
        reference = options.pop("hf_reference", None)
        if iteration is not None:
            options["iteration"] = iteration
        model = open_located(self.stack, located, reference, headers_only=self.headers_only, **options)
        if model.lora is not None:
            raise UsageError("an adapter, and no model", where=path, hint="give the model that it is for")
        name = str(path) if name is None else name
        return _without_prediction(name, model) if self.drop_prediction else Input(name, model)


def _without_prediction(name: str, model: Checkpoint) -> Input:
    """The model without its layers of multi-token prediction, which its config.json no longer counts either."""
    bare, raw = model.without_prediction(), deepcopy(model.sidecar.config)
    for place in (raw, raw.get("text_config")):
        if isinstance(place, dict):
            place.update({key: 0 for key in COUNTS if key in place})
    return Input(name, replace(bare, sidecar=replace(bare.sidecar, config=raw)), model.config.mtp_layers)


def left_out_of(inputs: Sequence[Input]) -> list[str]:
    """A sentence for each model of which layers of multi-token prediction are left out.

    Raises:
        UsageError: No model has any.
    """
    if not any(one.left_out for one in inputs):
        raise UsageError(
            f"{DROP_PREDICTION}: no model has layers of multi-token prediction", hint=f"drop {DROP_PREDICTION}"
        )
    return [
        f"{one.left_out} layer{'s' * (one.left_out > 1)} of multi-token prediction of {one.name}, left out"
        f" ({DROP_PREDICTION})"
        for one in inputs
        if one.left_out
    ]


def check_alike(
    inputs: Sequence[Input], *, accept_differences: bool, layers: bool = True, vocabulary: bool = True
) -> list[str]:
    """Whether the models describe the same model. Notes about what differs all the same.

    Args:
        inputs: The models.
        accept_differences: Continue if settings differ that stored bytes do not depend on.
        layers: Whether the layers are compared, too.
        vocabulary: Whether the sizes of the vocabularies are compared, too.

    Raises:
        UnsupportedError: Their tensors are not the same.
        UsageError: Their settings are not the same.
    """
    first, *others = inputs
    notes = []
    for other in others:
        if other.model.family.name != first.model.family.name:
            pair = f"{first.model.config.architecture} and {other.model.config.architecture}"
            raise UnsupportedError(f"two kinds of models: {pair}", where=other.name)
        one, two = first.model.config, other.model.config
        like = two if layers else replace(two, layers=one.layers)
        if not vocabulary:
            like = replace(like, vocab_size=one.vocab_size, per_layer_vocab_size=one.per_layer_vocab_size)
        found = differing_fields(one, like, ignored=_OF_TRAINING)
        texts = [
            f"{'' if item.layer is None else f'layer {item.layer}: '}{item.name} is {in_words(item.right)}, and"
            f" {in_words(item.left)} in {first.name}"
            for item in found
        ]
        if any(item.is_layout or item.name in _OF_TENSORS for item in found):
            hint = "resize-vocab makes vocabularies alike" if _of_vocabulary(one, two) else None
            if [item.name for item in found] == ["mtp_layers"]:
                hint = f"{DROP_PREDICTION} leaves out the layers of multi-token prediction"
            raise UnsupportedError(f"a model of other sizes: {'; '.join(texts)}", where=other.name, hint=hint)
        if texts and not accept_differences:
            hint = f"--accept-differences goes on with the settings of {first.name}"
            raise UsageError(f"a model with other settings: {'; '.join(texts)}", where=other.name, hint=hint)
        notes += [f"{other.name}: {text}, which counts" for text in texts]
    return notes


def _of_vocabulary(one: ModelConfig, two: ModelConfig) -> bool:
    return one.vocab_size != two.vocab_size
