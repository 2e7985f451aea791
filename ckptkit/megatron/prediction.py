"""Layers of multi-token prediction: megatron-core's block, behind the decoder on the last pipeline stage."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import multi_token_prediction
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    get_mtp_layer_spec_for_backend,
    roll_tensor,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from ckptkit.megatron.context_parallel.plan import plan_of
from ckptkit.megatron.layers import layer_spec
from ckptkit.megatron.norms import RMSNorm
from ckptkit.megatron.parallel import gather_over_context_ranks
from ckptkit.megatron.stand_ins import replaced
from ckptkit.tables.model_config import ModelConfig


def prediction_block(
    config: TransformerConfig, model: ModelConfig, groups: ProcessGroupCollection, vp_stage: int | None = None
) -> MultiTokenPredictionBlock:
    """megatron-core's block of a model's layers of multi-token prediction.

    Each is like the last decoder layer with attention.

    It keeps its activations in training: megatron-core 0.16 cannot compute those of packed rows again.

    Args:
        config: Megatron's model-wide config.
        model: The model.
        groups: The process groups of the model.
        vp_stage: Number of the last virtual stage, where there are such.
    """
    own = copy.copy(config)
    last = max(number for number, layer in enumerate(model.layers) if layer.delta is None)
    own.mtp_num_layers = model.mtp_layers
    own.recompute_granularity = None
    specs = []
    for _ in range(model.mtp_layers):
        inner = layer_spec(model, last, range(last + 1), config.context_parallel_size)
        spec = get_mtp_layer_spec_for_backend(inner, LocalSpecProvider())
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
    packed_seq_params: PackedSeqParams | None = None,
) -> list[torch.Tensor]:
    """Hidden states behind each layer of multi-token prediction.

    The layer with number k sees, at each position, the k-th token after it, and the token 0 behind the end of a
    sequence.

    Args:
        block: The block.
        embedding: Embedding of the tokens.
        tokens: Token ids, int64 [batch, sequence]; this rank's under context parallelism.
        positions: Their positions, of the same shape.
        states: Hidden states behind the final norm, [sequence, batch, hidden], or this rank's part of the sequence.
        packed_seq_params: Where the sequences of a packed row begin and end, and the plan of the batch.

    Returns:
        As `states`, for each layer.
    """
    # megatron-core sends tokens from GPU to GPU, and takes all that comes with a plan for packed.
    stand_ins = [(multi_token_prediction, "roll_tensor", _rolled)] if plan_of(packed_seq_params) else []
    with replaced(stand_ins) if stand_ins else nullcontext():
        found = block(
            input_ids=tokens,
            position_ids=positions,
            hidden_states=states,
            attention_mask=None,
            embedding=embedding,
            packed_seq_params=packed_seq_params,
        )
    every: torch.Tensor = found[0] if isinstance(found, tuple) else found
    return list(every.chunk(1 + len(block.layers))[1:])


def following(held: torch.Tensor, params: PackedSeqParams | None) -> torch.Tensor:
    """What a row holds for the token after each one; 0 behind the end of a sequence.

    Args:
        held: Integers of this rank's tokens, [batch, sequence].
        params: What layers are told of the batch.

    Returns:
        Of the same shape.
    """
    plan = plan_of(params)
    if plan is None:
        rolled: torch.Tensor = roll_tensor(held, packed_seq_params=params)[0]
        return rolled
    return F.pad(gather_over_context_ranks(held, 1), (0, 1)).index_select(1, plan.following)


def _rolled(
    held: torch.Tensor, *args: Any, packed_seq_params: PackedSeqParams | None = None, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`following` in place of megatron-core's `roll_tensor`, which returns the sum, too."""
    found = following(held, packed_seq_params)
    return found, found.sum()


def prediction_loss(
    states: Sequence[torch.Tensor],
    labels: torch.Tensor,
    counted: torch.Tensor,
    params: PackedSeqParams | None,
    losses_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """The mean over the layers of multi-token prediction of their losses at each position.

    The layer with number k predicts, at each position, the token after the k-th one after it. A position counts if that
    one does in the model's own loss (source: `GPTModel._postprocess` of megatron-core 0.16.1).

    Args:
        states: From `predicted_states`.
        labels: The token that follows each one, int64 [batch, sequence]; this rank's under context parallelism.
        counted: Whether a position counts in the model's own loss, of the same shape.
        params: What layers are told of the batch.
        losses_of: (labels, states) -> losses [batch, sequence].

    Returns:
        [batch, sequence], 0 where nothing counts.
    """
    parts, counts = [], counted.long()
    for state in states:
        labels, counts = following(labels, params), following(counts, params)
        parts.append(torch.where(counts.bool(), losses_of(labels, state), 0.0))
    return torch.stack(parts).mean(0)
