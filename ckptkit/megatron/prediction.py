"""Layers of multi-token prediction: megatron-core's block, behind the decoder on the last pipeline stage."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    get_mtp_layer_spec_for_backend,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from ckptkit.megatron.layers import layer_spec
from ckptkit.megatron.norms import RMSNorm
from ckptkit.tables.model_config import ModelConfig


def prediction_block(
    config: TransformerConfig, model: ModelConfig, groups: ProcessGroupCollection, vp_stage: int | None = None
) -> MultiTokenPredictionBlock:
    """megatron-core's block of a model's layers of multi-token prediction.

    Each is like the last decoder layer with attention.

    Args:
        config: Megatron's model-wide config.
        model: The model.
        groups: The process groups of the model.
        vp_stage: Number of the last virtual stage, where there are such.
    """
    own = copy.copy(config)
    last = max(number for number, layer in enumerate(model.layers) if layer.delta is None)
    own.mtp_num_layers = model.mtp_layers
    specs = []
    for _ in range(model.mtp_layers):
        spec = get_mtp_layer_spec_for_backend(layer_spec(model, last, range(last + 1)), LocalSpecProvider())
        norms = spec.submodules
        norms.enorm = norms.hnorm = norms.layer_norm = RMSNorm
        specs.append(spec)
    return MultiTokenPredictionBlock(own, MultiTokenPredictionBlockSubmodules(specs), vp_stage, groups)


def predicted_states(
    block: MultiTokenPredictionBlock,
    embedding: Callable[..., torch.Tensor],
    tokens: torch.Tensor,
    positions: torch.Tensor,
    states: torch.Tensor,
    **options: object,
) -> torch.Tensor:
    """Hidden states behind the last layer of multi-token prediction.

    The layer with number k sees, at each position, the k-th token after it, and the token 0 behind the end of a row.

    Args:
        block: The block.
        embedding: Embedding of the tokens.
        tokens: Token ids, int64 [batch, sequence].
        positions: Their positions, of the same shape.
        states: Hidden states behind the final norm, [sequence, batch, hidden], or this rank's part of the sequence.
        options: Passed on.

    Returns:
        As `states`.
    """
    found = block(
        input_ids=tokens,
        position_ids=positions,
        hidden_states=states,
        attention_mask=None,
        embedding=embedding,
        **options,
    )
    every: torch.Tensor = found[0] if isinstance(found, tuple) else found
    return every.chunk(1 + len(block.layers))[-1]
