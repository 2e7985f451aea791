"""The value head, which replaces the language model head: one value for each token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig


class ValueHead(torch.nn.Module):
    """One output per token, whole on every tensor parallel rank, as trainers of value models put it into a `GPTModel`.

    Args:
        config: Megatron's config: width, dtype, sequence parallelism.
        bias: Whether it has one.
    """

    def __init__(self, config: TransformerConfig, bias: bool) -> None:
        super().__init__()
        self.sequence_parallel: bool = config.sequence_parallel
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(1, dtype=config.params_dtype)) if bias else None
        for parameter in self.parameters():
            # Each rank sees a part of the tokens: this mark makes Megatron sum the gradients.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(
        self, hidden_states: torch.Tensor, weight: None = None, runtime_gather_output: bool | None = None
    ) -> tuple[torch.Tensor, None]:
        """Values [sequence, batch, 1] of the whole sequence, from hidden states that may be split over it.

        Args:
            hidden_states: [sequence, batch, hidden], or this rank's part of the sequence.
            weight: None; a value head shares no weights.
            runtime_gather_output: Unused, there is nothing to gather along the last axis.
        """
        values = F.linear(hidden_states, self.weight, self.bias)
        if self.sequence_parallel:
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False)
        return values, None
