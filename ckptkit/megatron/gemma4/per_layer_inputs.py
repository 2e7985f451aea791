"""Per-layer inputs: every layer of Gemma 4's small models gets an embedding of the tokens beside the hidden state."""

from __future__ import annotations

import math

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from ckptkit.megatron.norms import RMSNorm
from ckptkit.tables.model_config import ModelConfig


def add_per_layer_inputs(owner: MegatronModule, model: ModelConfig, config: TransformerConfig) -> None:
    """Give `owner` the modules that `per_layer_inputs` uses, under Megatron-Bridge's names.

    Args:
        owner: The model chunk with the embedding.
        model: The model; the rows of its per-layer embedding are not padded.
        config: Megatron's config.
    """
    width = model.num_layers * model.per_layer_input_size
    owner.per_layer_embedding = VocabParallelEmbedding(
        model.per_layer_vocab_size,
        width,
        init_method=config.init_method,
        reduce_scatter_embeddings=config.sequence_parallel,
        config=config,
    )
    owner.per_layer_model_proj = ColumnParallelLinear(
        model.hidden_size, width, config=config, init_method=config.init_method, bias=False
    )
    owner.per_layer_proj_norm = RMSNorm(config, model.per_layer_input_size, config.layernorm_epsilon)


def per_layer_inputs(
    owner: MegatronModule, model: ModelConfig, tokens: torch.Tensor, embedded: torch.Tensor
) -> torch.Tensor:
    """The inputs of all layers, side by side.

    Source: `get_per_layer_inputs` and `project_per_layer_inputs` of transformers' `Gemma4TextModel`.

    Args:
        owner: As for `add_per_layer_inputs`.
        model: The model.
        tokens: Token ids, int64 [batch, sequence].
        embedded: Their scaled embeddings, [sequence, batch, hidden]; this rank's part of the sequence under sequence
            parallelism.

    Returns:
        [sequence, batch, layers * per_layer_input_size], split over the sequence as `embedded` is.
    """
    return (_projected(owner, model, embedded) + _looked_up(owner, model, tokens)) * math.sqrt(0.5)


def _looked_up(owner: MegatronModule, model: ModelConfig, tokens: torch.Tensor) -> torch.Tensor:
    """The half that depends on the token alone; the scale is rounded to the dtype of the weights."""
    rows: torch.Tensor = owner.per_layer_embedding(tokens)
    if not owner.config.sequence_parallel:
        rows = rows.transpose(0, 1)
    return rows * float(torch.tensor(model.per_layer_input_size**0.5, dtype=rows.dtype))


def _projected(owner: MegatronModule, model: ModelConfig, embedded: torch.Tensor) -> torch.Tensor:
    """The half that is projected from the embedding, and normalised for each layer."""
    part, _ = owner.per_layer_model_proj(embedded)
    columns: torch.Tensor = gather_from_tensor_model_parallel_region(part)
    if owner.config.sequence_parallel:
        columns = scatter_to_sequence_parallel_region(columns)
    scaled = (columns * model.hidden_size**-0.5).unflatten(-1, (model.num_layers, model.per_layer_input_size))
    normed: torch.Tensor = owner.per_layer_proj_norm(scaled)
    return normed.flatten(-2)
