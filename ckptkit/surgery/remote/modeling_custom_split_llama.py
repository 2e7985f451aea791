"""A split Llama: embedding and first layers of a narrow Llama, an adapter, last layers, norm and head of a wide one.

Layers count through from the first group to the second, so that a cache has one slot for each and no gaps.
"""

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_custom_split_llama import CustomSplitLLamaConfig


class CustomSplitLLamaPreTrainedModel(LlamaPreTrainedModel):
    """What the classes here have in common."""

    config_class = CustomSplitLLamaConfig
    config: CustomSplitLLamaConfig  # type: ignore[assignment]
    base_model_prefix = "model"


class CustomSplitLLamaModel(CustomSplitLLamaPreTrainedModel):
    """The model without its head."""

    def __init__(self, config: CustomSplitLLamaConfig) -> None:
        super().__init__(config)
        first, last = config.first_config, config.last_config
        for half in (first, last):  # the layers look here; without it they would take eager attention
            half._attn_implementation = config._attn_implementation
        before = first.num_hidden_layers
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, first.hidden_size, self.padding_idx)
        self.layers_first = nn.ModuleList(LlamaDecoderLayer(first, number) for number in range(before))
        if config.adapter == "linear":
            self.adapter = nn.Linear(first.hidden_size, last.hidden_size, bias=False)
        else:
            self.adapter_linear_1 = nn.Linear(first.hidden_size, last.hidden_size, bias=False)
            self.adapter_linear_2 = nn.Linear(last.hidden_size, last.hidden_size, bias=False)
        self.layers_last = nn.ModuleList(
            LlamaDecoderLayer(last, before + number) for number in range(last.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(last.hidden_size, eps=last.rms_norm_eps)
        self.rotary_emb_first = LlamaRotaryEmbedding(config=first)
        self.rotary_emb_last = LlamaRotaryEmbedding(config=last)
        self.gradient_checkpointing = False
        self.post_init()

    def adapt(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., narrow] -> [..., wide]."""
        if self.config.adapter == "linear":
            return self.adapter(hidden_states)
        hidden_states = self.adapter_linear_1(hidden_states)
        if self.config.adapter == "mlp":
            hidden_states = nn.functional.relu(hidden_states)
        return self.adapter_linear_2(hidden_states)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As of `LlamaModel`; `inputs_embeds` are narrow, `last_hidden_state` is wide."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0) + seen
        seen_by = {"attention_mask": attention_mask, "past_key_values": past_key_values, "position_ids": position_ids}
        halves = (
            (self.config.first_config, self.layers_first, self.rotary_emb_first),
            (self.config.last_config, self.layers_last, self.rotary_emb_last),
        )
        # Masks are made before any layer fills the cache, in the form that each half's attention wants.
        masks = [create_causal_mask(config=half, inputs_embeds=inputs_embeds, **seen_by) for half, _, _ in halves]
        hidden_states = inputs_embeds
        for number, ((_, layers, rotary_emb), mask) in enumerate(zip(halves, masks, strict=True)):
            if number:
                hidden_states = self.adapt(hidden_states)
            positions = rotary_emb(hidden_states, position_ids=position_ids)
            for layer in layers:
                hidden_states = layer(
                    hidden_states,
                    attention_mask=mask,
                    position_ids=position_ids,
                    past_key_values=past_key_values,
                    use_cache=use_cache,
                    position_embeddings=positions,
                    **kwargs,
                )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class CustomSplitLLamaForCausalLM(CustomSplitLLamaPreTrainedModel, GenerationMixin):
    """The model with the head of the wide Llama."""

    _tied_weights_keys = {}  # noqa: RUF012  embedding and head have different widths

    def __init__(self, config: CustomSplitLLamaConfig) -> None:
        super().__init__(config)
        self.model = CustomSplitLLamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.last_config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    forward = LlamaForCausalLM.forward  # the same over another `self.model`


class CustomSplitLLamaForTokenClassification(GenericForTokenClassification, CustomSplitLLamaPreTrainedModel):
    """A label for every token, from the wide layers; with a single label, its value."""

    def __init__(self, config: CustomSplitLLamaConfig) -> None:
        # Not the generic constructor: it asks `AutoModel`, which does not know this model.
        CustomSplitLLamaPreTrainedModel.__init__(self, config)
        self.num_labels: int = config.num_labels  # type: ignore[assignment]
        self.model = CustomSplitLLamaModel(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        bias = getattr(config, "token_classification_bias", True)
        self.score = nn.Linear(config.last_config.hidden_size, self.num_labels, bias=bias)
        self.post_init()


class CustomSplitLLamaForSequenceClassification(GenericForSequenceClassification, CustomSplitLLamaPreTrainedModel):
    """A label for every sequence, read at its last token."""

    def __init__(self, config: CustomSplitLLamaConfig) -> None:
        CustomSplitLLamaPreTrainedModel.__init__(self, config)
        self.num_labels: int = config.num_labels  # type: ignore[assignment]
        self.model = CustomSplitLLamaModel(config)
        self.score = nn.Linear(config.last_config.hidden_size, self.num_labels, bias=False)
        self.post_init()


__all__ = [
    "CustomSplitLLamaForCausalLM",
    "CustomSplitLLamaForSequenceClassification",
    "CustomSplitLLamaForTokenClassification",
    "CustomSplitLLamaModel",
    "CustomSplitLLamaPreTrainedModel",
]
