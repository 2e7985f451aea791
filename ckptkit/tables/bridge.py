"""How Megatron-Bridge builds a family's models: the class of its model provider, and the fields special to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptkit.tables.model_config import QUICK_GELU, ModelConfig

VERSION = "0.6.2"
"""Release of Megatron-Bridge whose providers are described."""

GPT_PROVIDER = "megatron.bridge.models.gpt_provider.GPTModelProvider"
MLA_PROVIDER = "megatron.bridge.models.mla_provider.MLAModelProvider"
LOCAL_SPEC = "megatron.bridge.models.gpt_provider.local_layer_spec"
BLOCK_SPEC = "megatron.core.models.gpt.gpt_layer_specs.get_gpt_decoder_block_spec"
"""The spec of all layers, where some have experts and others do not."""


@dataclass(frozen=True)
class Named:
    """The dotted name of a Python object, as a value of a field.

    Attributes:
        name: The name.
        bound: Arguments that are bound to the function of that name, if there are any.
    """

    name: str
    bound: Mapping[str, Any] = field(default_factory=dict)


ACTIVATIONS = {
    "silu": Named("torch.nn.functional.silu"),
    "gelu_pytorch_tanh": Named("megatron.core.activations.fast_gelu"),
    QUICK_GELU: Named("megatron.core.fusions.fused_bias_geglu.quick_gelu"),
}
"""Hugging Face's name of an activation -> the function that a provider names."""


@dataclass(frozen=True)
class OwnAttention:
    """Fields for ropes and windows of a provider that does not use those of `GPTModelProvider`.

    Attributes:
        mark: A field that only this provider and classes derived from it have.
        problem: (model, whether its layers are those of the local spec) -> a feature that the class lacks, or None.
        values: Model -> the fields.
        args: All fields of a stored provider -> Megatron-LM's arguments with the same meaning. May raise
            UnsupportedError; raises TypeError, ValueError or KeyError if the fields make no sense.
        lacks: A field that classes of another family have beside `mark`, or None.
    """

    mark: str
    problem: Callable[[ModelConfig, bool], str | None]
    values: Callable[[ModelConfig], dict[str, Any]]
    args: Callable[[Mapping[str, Any]], dict[str, Any]]
    lacks: str | None = None


@dataclass(frozen=True)
class BridgeProvider:
    """The class of model provider that Megatron-Bridge makes from a family's config.json.

    Attributes:
        target: Dotted name of the class.
        activation: Hugging Face's name of the MLP's activation that the family's bridge sets, a key of `ACTIVATIONS`.
        ropes: Kinds of rotary embeddings that the family's bridge sets.
        values: Further fields that it sets for every model.
        with_windows: Further fields that it sets for a model with windows.
        with_experts: Fields that it sets beside, or otherwise than, other families' for a model with experts.
        attention: Ropes and windows of a class that does not use the fields of `GPTModelProvider`, or None.
        blocks: Whether it asks for the spec of a whole block, in which dense layers and others may stand together.
        block_spec: Dotted name of the function that makes that spec of a config, if it is another than `BLOCK_SPEC`;
            there is none without Transformer Engine.
        when: Model -> whether the class is for it.
        other: The class for the other models of the family, or None.
    """

    target: str = GPT_PROVIDER
    activation: str = "silu"
    ropes: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
    values: Mapping[str, Any] = field(default_factory=dict)
    with_windows: Mapping[str, Any] = field(default_factory=dict)
    with_experts: Mapping[str, Any] = field(default_factory=dict)
    attention: OwnAttention | None = None
    blocks: bool = False
    block_spec: str | None = None
    when: Callable[[ModelConfig], bool] = lambda config: True
    other: BridgeProvider | None = None

    def all(self) -> Iterator[BridgeProvider]:
        """This class and the others of the family."""
        yield self
        if self.other is not None:
            yield from self.other.all()
