"""Building the model chunks of one rank, and loading them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.parallel_state import get_pipeline_model_parallel_rank

from ckptkit.errors import InputError, VerificationError
from ckptkit.families.config import ModelConfig
from ckptkit.megatron.compat import runs_on
from ckptkit.megatron.config import check_grid, transformer_config
from ckptkit.megatron.layers import block_spec
from ckptkit.sharding.grid import Parallelism
from ckptkit.sharding.stages import Stage, split_layers

NAMED = 6
"""How many tensors an error message names before it counts the rest."""


class CausalModel(GPTModel):
    """megatron-core's `GPTModel` with what it lacks before the first and after the last layer.

    A tied copy of the embedding is loaded, not copied from the first stage: that would go through CUDA, and strict
    loading overwrites it anyway.

    Args:
        model: The model: scale of the embedding and cap of the logits.
        options: Passed on.
    """

    def __init__(self, *, model: ModelConfig, **options: Any) -> None:
        super().__init__(**options)
        # On the modules' outputs, not in `forward`: the loss must see the capped logits, too.
        if self.pre_process and model.scaled_embedding:
            scale = _rounded(model.embedding_scale, self.config.params_dtype)
            self.embedding.register_forward_hook(lambda module, inputs, output: output * scale)
        if self.post_process and model.logit_softcap is not None:
            cap = model.logit_softcap
            self.output_layer.register_forward_hook(
                lambda module, inputs, output: (torch.tanh(output[0] / cap) * cap, output[1])
            )

    def _is_in_embd_group(self) -> bool:
        return False


def _rounded(value: float, dtype: torch.dtype) -> float:
    """`value` as a tensor of `dtype` holds it."""
    return float(torch.tensor(value, dtype=dtype))


def build_chunks(
    config: ModelConfig,
    grid: Parallelism,
    padded_vocab_size: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    sequence_parallel: bool = False,
) -> list[CausalModel]:
    """The model chunks of this rank, one per virtual stage, in evaluation mode; parameters hold no values yet.

    `parallel.initialize` must have been called for `grid`.

    Args:
        config: The model.
        grid: The parallel grid.
        padded_vocab_size: Rows of the embedding over all ranks, padding included.
        dtype: Dtype of parameters and activations.
        device: Where the parameters live.
        sequence_parallel: Split the sequence over tensor parallel ranks outside of the linears.

    Raises:
        UsageError: The model does not divide over the grid.
        UnsupportedError: megatron-core or this runtime has no module for it.
        VerificationError: megatron-core placed other layers on this rank than `sharding.stages` does.
    """
    check_grid(config, grid, padded_vocab_size)
    stages = [s for s in split_layers(config.num_layers, grid) if s.pp_rank == get_pipeline_model_parallel_rank()]
    with warnings.catch_warnings(), runs_on(device):
        warnings.simplefilter("ignore")
        megatron_config = transformer_config(
            config, grid, dtype=dtype, device=device, sequence_parallel=sequence_parallel
        )
        chunks = [
            CausalModel(
                model=config,
                config=megatron_config,
                transformer_layer_spec=block_spec(config, stage.layers),
                vocab_size=padded_vocab_size,
                max_sequence_length=config.max_position_embeddings,
                pre_process=stage.first,
                post_process=stage.last,
                share_embeddings_and_output_weights=config.tied,
                position_embedding_type="none",  # each layer rotates by itself
                vp_stage=stage.vp_stage if grid.vpp > 1 else None,
            )
            for stage in stages
        ]
    for chunk, stage in zip(chunks, stages, strict=True):
        _check_placement(chunk, stage)
        chunk.to(device).eval()
    return chunks


def _check_placement(chunk: CausalModel, stage: Stage) -> None:
    built = layer_numbers(chunk)
    if built != list(stage.layers):
        raise VerificationError(
            f"megatron-core placed layers {built} where {list(stage.layers)} belong",
            where=f"pipeline rank {stage.pp_rank}, virtual stage {stage.vp_stage}",
        )


def layer_numbers(chunk: CausalModel) -> list[int]:
    """Global numbers, from 0, of the decoder layers of a chunk."""
    return [layer.layer_number - 1 for layer in chunk.decoder.layers]


def expected_tensors(chunk: CausalModel) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers of a chunk by name, as Megatron saves them; `_extra_state` left out."""
    return {
        name: value
        for name, value in chunk.state_dict(keep_vars=True).items()
        if isinstance(value, torch.Tensor) and not name.endswith("_extra_state")
    }


def load_strict(chunk: CausalModel, state: Mapping[str, torch.Tensor], *, where: object = None) -> None:
    """Copy `state` into a chunk, cast to its dtype.

    Args:
        chunk: From `build_chunks`.
        state: Megatron's local-spec names, layers numbered from 0 within the chunk; `_extra_state` is ignored.
        where: What to call the source of `state` in an error.

    Raises:
        InputError: Tensors are missing, unexpected, or of another shape.
    """
    state = {name: value for name, value in state.items() if not name.endswith("_extra_state")}
    expected = expected_tensors(chunk)
    shapes = [
        f"{name} is {list(state[name].shape)}, the model has {list(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    problems = {
        "missing": sorted(expected.keys() - state.keys()),
        "unexpected": sorted(state.keys() - expected.keys()),
        "of another shape": shapes,
    }
    text = "; ".join(f"{kind}: {_some(names)}" for kind, names in problems.items() if names)
    if text:
        raise InputError(f"the shard does not fit the model: {text}", where=where)
    with torch.no_grad():
        for name, value in expected.items():
            value.copy_(state[name])


def _some(names: list[str]) -> str:
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")
