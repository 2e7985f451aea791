"""Building the model chunks of one rank, and loading them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.parallel_state import get_pipeline_model_parallel_rank
from megatron.core.transformer.transformer_config import TransformerConfig

from ckptkit.errors import InputError, VerificationError
from ckptkit.megatron.adapter import add_adapter, received_width
from ckptkit.megatron.compat import runs_on
from ckptkit.megatron.config import transformer_config
from ckptkit.megatron.gemma4.carried import Carried
from ckptkit.megatron.gemma4.per_layer_inputs import add_per_layer_inputs, per_layer_inputs
from ckptkit.megatron.heads import ValueHead
from ckptkit.megatron.layers import block_spec
from ckptkit.megatron.prediction import predicted_states, prediction_block, prediction_loss
from ckptkit.sharding.grid import Parallelism
from ckptkit.sharding.stages import Stage, holds_cut, split_layers
from ckptkit.tables.divisibility import check_divides
from ckptkit.tables.model_config import Adapter, ModelConfig
from ckptkit.tables.prediction import of_0_16

NAMED = 6
"""How many tensors an error message names before it counts the rest."""


class CausalModel(GPTModel):
    """megatron-core's `GPTModel` with what it lacks before the first and after the last layer.

    With layers of multi-token prediction its logits are those of the last of these layers, and not the model's own:
    `GPTModel` itself has nothing but a loss for them. Its loss is its own with theirs added, as Megatron weighs it.

    A tied copy of the embedding is loaded, not copied from the first stage: that would go through CUDA, and strict
    loading overwrites it anyway.

    Args:
        model: The model: scale of the embedding, cap of the logits, per-layer inputs, adapter.
        stage: Which part of it this chunk is.
        has_adapter: Whether the adapter between layers of two widths is on this stage.
        options: Passed on.

    Attributes:
        input_width: Columns of what a stage that is not the first receives: the hidden state, and what is carried
            beside it (see `Carried`).
        value_head: Whether the output is one value per token, on every tensor parallel rank.
        mtp: The layers of multi-token prediction; only on a stage that has them, because megatron-core 0.19 looks for
            layers in it.
        mtp_layers: How many of them the model has, on every stage.
    """

    embedding: Any
    mtp: Any

    def __init__(self, *, model: ModelConfig, stage: Stage, has_adapter: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.value_head = model.value_head
        self.mtp_layers = model.mtp_layers
        if self.post_process and model.value_head:
            self.output_layer = ValueHead(self.config, model.value_bias)
        carried = Carried.under(self.config, model)
        entering = carried.width(carried.entering(stage.layers.start))
        self.input_width = received_width(model, stage, has_adapter) + entering
        if model.adapter is not None and self.pre_process:
            self._embed_narrow(model.adapter)
        if model.adapter is not None and has_adapter:
            add_adapter(self.decoder, model.adapter, stage)
        if self.post_process and model.mtp_layers:
            self.mtp = prediction_block(self.config, model, self.pg_collection, self.vp_stage)
            if not self.pre_process:
                self.embedding = self._embedding(self.config)
                if model.tied:  # one parameter, as on a first stage: the head takes the embedding of the predictions
                    self.output_layer.weight = self.embedding.word_embeddings.weight
        self.inputs_of = model if self.pre_process and model.per_layer_input_size else None
        if self.inputs_of is not None:
            add_per_layer_inputs(self, model, self.config)
        # On the modules' outputs, not in `forward`: the loss must see the capped logits, too.
        if self.pre_process and model.scaled_embedding:
            scale = _rounded(model.embedding_scale, self.config.params_dtype)
            self.embedding.register_forward_hook(lambda module, inputs, output: output * scale)
        if self.post_process and model.logit_softcap is not None and not model.value_head:
            cap = model.logit_softcap
            self.output_layer.register_forward_hook(
                lambda module, inputs, output: (torch.tanh(output[0] / cap) * cap, output[1])
            )

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        decoder_input: torch.Tensor | None = None,
        *args: Any,
        counted: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Logits, the loss, or, before the last stage, what the next one receives; as `GPTModel`.

        Args:
            input_ids: Token ids, int64 [batch, sequence].
            position_ids: Unused, layers count positions themselves.
            attention_mask: None: attention is causal by itself.
            decoder_input: Embeddings in place of those of `input_ids`, [sequence, batch, hidden].
            args: Passed on.
            counted: Whether a position counts in the loss, bool [batch, sequence]; needed where layers of multi-token
                prediction have a loss, too, and all that does not count is 0 then.
            options: Passed on.
        """
        if self.inputs_of is not None:
            if decoder_input is None:
                decoder_input = self.embedding(input_ids=input_ids, position_ids=position_ids)
            inputs = per_layer_inputs(self, self.inputs_of, input_ids, decoder_input)
            decoder_input = torch.cat((decoder_input, inputs), dim=-1)
        if hasattr(self, "mtp"):
            return self._predict(input_ids, position_ids, decoder_input, counted, **options)
        output: torch.Tensor = super().forward(input_ids, position_ids, attention_mask, decoder_input, *args, **options)
        return output

    def _predict(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None,
        decoder_input: torch.Tensor | None,
        counted: torch.Tensor | None,
        labels: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Logits of the last layer of multi-token prediction, or the losses of the model and of all of these layers."""
        assert positions is not None
        with last_output(self.decoder) as states:
            own = super().forward(
                tokens, positions, None, decoder_input, labels=labels, packed_seq_params=packed_seq_params
            )
        # Not through the module: what is recorded of it is the model's own pass.
        found = predicted_states(
            self.mtp, self.embedding.forward, tokens, positions, states[0], packed_seq_params=packed_seq_params
        )
        if labels is None:
            logits = self._logits(found[-1])
            return logits.transpose(0, 1).contiguous()
        assert counted is not None
        further = prediction_loss(found, labels, counted, packed_seq_params, self._losses)
        total: torch.Tensor = torch.where(counted, own, 0.0) + self.config.mtp_loss_scaling_factor * further
        return total

    def _losses(self, labels: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Losses [batch, sequence] of hidden states that the head has not seen."""
        losses: torch.Tensor = self.compute_language_model_loss(labels, self._logits(states))
        return losses

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [sequence, batch, vocabulary] of hidden states."""
        tied = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits: torch.Tensor = self.output_layer(states, weight=tied)[0]
        return logits

    def shared_embedding_or_output_weight(self) -> torch.Tensor:
        """The weight whose gradients the first and the last stage add up: with multi-token prediction the embedding."""
        if hasattr(self, "mtp"):
            weight: torch.Tensor = self.embedding.word_embeddings.weight
            return weight
        shared: torch.Tensor = super().shared_embedding_or_output_weight()
        return shared

    def _embed_narrow(self, adapter: Adapter) -> None:
        """Embeddings of the width of the first layers, where megatron-core made those of the model's."""
        narrow = copy.copy(self.config)
        narrow.hidden_size = adapter.hidden_size
        del self.embedding  # before there is another one: its memory
        self.embedding = self._embedding(narrow)
        weight = self.embedding.word_embeddings.weight
        weight.is_embedding_or_output_parameter = True  # what `setup_embeddings_and_output_layer` had marked
        if self.config.recompute_granularity is not None:
            # Recomputed layers have gradients only if their input has: an adapter behind frozen layers would get none.
            self.embedding.register_forward_hook(lambda module, inputs, output: _with_gradient(output))

    def _embedding(self, config: TransformerConfig) -> LanguageModelEmbedding:
        """An embedding of this model's vocabulary."""
        return LanguageModelEmbedding(
            config,
            self.vocab_size,
            self.max_sequence_length,
            position_embedding_type="none",
            tp_group=self.pg_collection.tp,
        )

    def _is_in_embd_group(self) -> bool:
        return False


@contextmanager
def last_output(module: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """The output of a module's last pass inside, alone in a list."""
    kept: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        kept[:] = [output]

    handle = module.register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


def _with_gradient(states: torch.Tensor) -> torch.Tensor:
    """`states`, where gradients are kept as something that has one."""
    return states.requires_grad_() if torch.is_grad_enabled() and not states.requires_grad else states


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
    recompute: bool = False,
    cp: int = 1,
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
        recompute: In training, keep only the inputs of layers and compute their activations again backwards.
        cp: Context parallel size.

    Raises:
        UsageError: The model does not divide over the grid.
        UnsupportedError: megatron-core or this runtime has no module for it.
        VerificationError: megatron-core placed other layers on this rank than `sharding.stages` does.
    """
    check_divides(config, grid, padded_vocab_size)
    stages = [s for s in split_layers(config.num_layers, grid) if s.pp_rank == get_pipeline_model_parallel_rank()]
    with warnings.catch_warnings(), runs_on(device):
        warnings.simplefilter("ignore")
        megatron_config = transformer_config(
            config, grid, dtype=dtype, device=device, sequence_parallel=sequence_parallel, recompute=recompute, cp=cp
        )
        chunks = [
            CausalModel(
                model=config,
                stage=stage,
                has_adapter=config.adapter is not None and holds_cut(stage, config.adapter.after, grid),
                config=megatron_config,
                transformer_layer_spec=block_spec(config, stage.layers, cp),
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
        of_0_16(name): value
        for name, value in chunk.state_dict(keep_vars=True).items()
        if isinstance(value, torch.Tensor) and not name.endswith("_extra_state")
    }


def load_strict(
    chunk: CausalModel,
    state: Mapping[str, Any],
    *,
    where: object = None,
    read: Callable[[Any], torch.Tensor] = lambda value: value,
) -> None:
    """Copy `state` into a chunk, cast to its dtype.

    Args:
        chunk: From `build_chunks`.
        state: Megatron's local-spec names, layers numbered from 0 within the chunk; `_extra_state` is ignored.
        where: Name of the source of `state` in an error.
        read: Makes a tensor of a value of `state`, which has a `shape`; called for one at a time.

    Raises:
        InputError: Tensors are missing, unexpected, or of another shape.
    """
    state = {name: value for name, value in state.items() if not name.endswith("_extra_state")}
    expected = expected_tensors(chunk)
    check_fit(expected, state, where=where)
    with torch.no_grad():
        for name, value in expected.items():
            value.copy_(read(state[name]))


def check_fit(expected: Mapping[str, torch.Tensor], state: Mapping[str, Any], *, where: object = None) -> None:
    """Whether a state has the tensors of a model, and no others.

    Args:
        expected: The model's tensors by name.
        state: Values with a `shape`, by name.
        where: Name of the source of `state` in an error.

    Raises:
        InputError: Tensors are missing, unexpected, or of another shape.
    """
    shapes = [
        f"{name} is {list(state[name].shape)}, the model has {list(value.shape)}"
        for name, value in expected.items()
        if name in state and tuple(state[name].shape) != tuple(value.shape)
    ]
    problems = {
        "missing": sorted(expected.keys() - state.keys()),
        "unexpected": sorted(state.keys() - expected.keys()),
        "of another shape": shapes,
    }
    text = "; ".join(f"{kind}: {_some(names)}" for kind, names in problems.items() if names)
    if text:
        raise InputError(f"the shard does not fit the model: {text}", where=where)


def _some(names: list[str]) -> str:
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")
