"""A split Llama in vLLM's modules. Weights that are missing or unknown are errors.

vLLM itself refuses unknown ones; about missing ones it does not ask linear layers, nor parts of fused projections.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaModel
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix
from vllm.sequence import IntermediateTensors

from ckptkit.families.split_llama import SPLIT_LLAMA


@support_torch_compile(
    dynamic_arg_dims={"input_ids": {0: "b"}, "positions": {0: "b"}, "inputs_embeds": {0: "b"}},
)
class CustomSplitLLamaModel(nn.Module):
    """The model without its head. Tensor names are those of the checkpoint, but for fused projections."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        first, last = config.first_config, config.last_config
        self.kind = config.adapter
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, first.hidden_size, quant_config=quant_config)
        self.layers_first = _layers(vllm_config, first, prefix, 0)
        shape = {"bias": False, "quant_config": quant_config, "return_bias": False}
        narrow, wide = first.hidden_size, last.hidden_size
        if self.kind == "linear":
            name = maybe_prefix(prefix, "adapter")
            self.adapter = ColumnParallelLinear(narrow, wide, gather_output=True, prefix=name, **shape)
        else:
            names = [maybe_prefix(prefix, f"adapter_linear_{number}") for number in (1, 2)]
            self.adapter_linear_1 = ColumnParallelLinear(narrow, wide, prefix=names[0], **shape)
            self.adapter_linear_2 = RowParallelLinear(wide, wide, prefix=names[1], **shape)
        self.layers_last = _layers(vllm_config, last, prefix, first.num_hidden_layers)
        self.norm = RMSNorm(wide, eps=last.rms_norm_eps)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[tokens] -> [tokens, narrow]."""
        return self.embed_tokens(input_ids)

    def adapt(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[tokens, narrow] -> [tokens, wide]."""
        if self.kind == "linear":
            return self.adapter(hidden_states)
        hidden_states = self.adapter_linear_1(hidden_states)
        if self.kind == "mlp":
            hidden_states = nn.functional.relu(hidden_states)
        return self.adapter_linear_2(hidden_states)

    def forward(
        self, input_ids: torch.Tensor | None, positions: torch.Tensor, inputs_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[tokens] -> [tokens, wide]."""
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed_input_ids(input_ids)
        hidden_states = inputs_embeds
        residual: Any = None
        for layer in self.layers_first:
            hidden_states, residual = layer(positions, hidden_states, residual)
        # A layer of vLLM returns its addition and the stream separately. The adapter takes their sum.
        hidden_states, residual = self.adapt(hidden_states + residual), None
        for layer in self.layers_last:
            hidden_states, residual = layer(positions, hidden_states, residual)
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states


def _layers(vllm_config: VllmConfig, config: Any, prefix: str, start: int) -> nn.ModuleList:
    """The layers of one half. vLLM identifies layers by the number in their prefix, so numbering continues."""
    names = [maybe_prefix(prefix, f"layers.{start + number}") for number in range(config.num_hidden_layers)]
    return nn.ModuleList(LlamaDecoderLayer(vllm_config, name, config) for name in names)


class CustomSplitLLamaForCausalLM(nn.Module):
    """The model with the head of the wide Llama."""

    hf_to_vllm_mapper = LlamaModel.hf_to_vllm_mapper

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config, self.quant_config = config, vllm_config.quant_config
        self.model = CustomSplitLLamaModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.last_config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[tokens] -> [tokens, narrow]."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[tokens] -> [tokens, wide]; there are no pipeline stages."""
        return self.model(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """[tokens, wide] -> [tokens, vocabulary]."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads the tensors of a checkpoint.

        Returns:
            Names of the parameters that got a value.

        Raises:
            ValueError: A tensor is missing, or the model has no place for one.
        """
        seen: set[str] = set()
        loaded: set[str] = AutoWeightsLoader(self).load_weights(_noted(weights, seen), mapper=self.hf_to_vllm_mapper)
        missing = sorted(tensor_names(self.config) - seen)
        if missing and self.quant_config is None:  # quantised checkpoints have other tensors in their places
            raise ValueError(f"{len(missing)} tensors are missing: {', '.join(missing[:3])}")
        return loaded


def tensor_names(config: Any) -> set[str]:
    """The names of all tensors in a checkpoint of this configuration."""
    model = SPLIT_LLAMA.parse(config.to_dict())
    return {name for item in SPLIT_LLAMA.items(model) for name in item.parts}


def _noted(weights: Iterable[tuple[str, torch.Tensor]], seen: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights:
        seen.add(name)
        yield name, tensor
