"""A whole model for packed inputs, as a module to train or to sample from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from ckptkit.errors import InputError, UsageError
from ckptkit.megatron.compat import runs_on
from ckptkit.megatron.in_memory import Memory
from ckptkit.megatron.packed_inputs.batch import PackedBatch, pad, unpad
from ckptkit.megatron.replicas import fully_sharded

if TYPE_CHECKING:
    from ckptkit.checkpoints.checkpoint import Checkpoint
    from ckptkit.megatron.model import CausalModel

PREFIX = "model."
"""Prefix of Megatron's names in the state of a `PackedModel`."""


class PackedModel(torch.nn.Module):
    """A model whose input is packed, or padded and packed on the way.

    It is differentiable, and can be sharded by FSDP2 (`shard`).

    Args:
        chunk: The model, one rank's whole one.
        checkpoint: What it was converted from: family, config, and as `spelling` how the names of `chunk` are spelled.
        extras: Canonical name -> tensor of the transformers model that has no place in this one.
        hf_names: All names of the transformers model's state.

    Attributes:
        model: `chunk`.
    """

    def __init__(
        self, chunk: CausalModel, checkpoint: Checkpoint, extras: Mapping[str, torch.Tensor], hf_names: Iterable[str]
    ) -> None:
        super().__init__()
        self.model = chunk
        self.outputs = 1 if checkpoint.config.value_head else checkpoint.config.vocab_size
        # Its tensors are recipes over the transformers model, whose memory they would keep.
        self._checkpoint = replace(checkpoint, tensors={}, comparisons=())
        self._extras = dict(extras)
        self._hf_names = list(hf_names)

    def forward(
        self,
        input_ids: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits, or values, of every token.

        Args:
            input_ids: Token ids, int64: packed (total_nnz,), or padded (batch, sequence).
            cu_seqlens: Packed: int32 or int64 (batch + 1,), see `PackedBatch`.
            max_seqlen: Packed: length of the longest sequence, or more; None to let it be counted.
            attention_mask: Padded: 1 where a token counts, 0 where it is padding; None if all count. See `unpad`.

        Returns:
            Packed: (total_nnz, vocab_size); padded: (batch, sequence, vocab_size), 0 where the padding is. Of a value
            model the last axis is 1. In the model's dtype.

        Raises:
            UsageError: The arguments do not fit one another.
        """
        _check_tensors(input_ids=input_ids, cu_seqlens=cu_seqlens, attention_mask=attention_mask)
        if cu_seqlens is None:
            if max_seqlen is not None:
                raise UsageError("max_seqlen was given without cu_seqlens; packed inputs need both")
            batch, places = unpad(input_ids, attention_mask)
            return pad(self._logits(batch), places, *input_ids.shape)
        if attention_mask is not None:
            raise UsageError("packed inputs have no attention_mask", hint="pass either cu_seqlens or the mask")
        if max_seqlen is None:
            max_seqlen = int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0
        return self._logits(PackedBatch(input_ids, cu_seqlens, max_seqlen))

    def _logits(self, batch: PackedBatch) -> torch.Tensor:
        config = self.model.config
        device = batch.input_ids.device
        filled = batch.filled(config.tensor_model_parallel_size if config.sequence_parallel else 1)
        with runs_on(device):
            logits = self.model(filled.input_ids[None], filled.positions[None], None, packed_seq_params=filled.params())
            if not self.model.value_head:
                logits = gather_from_tensor_model_parallel_region(logits)
        whole: torch.Tensor = logits[0, : batch.total, : self.outputs]
        return whole

    def to_hf_state_dict(self, state: Mapping[str, Any] | None = None) -> dict[str, torch.Tensor]:
        """The weights as the transformers model names and lays them out, bit by bit, for its `load_state_dict`.

        Args:
            state: Whole tensors by the names of this model's `state_dict()`, e.g. read from a distributed checkpoint;
                None for the weights of this model. Tensors that FSDP2 sharded are gathered: then all ranks must call
                this.

        Returns:
            Name -> tensor of its own memory, in the order of the transformers model's state.

        Raises:
            InputError: `state` has not the tensors of this model.
        """
        memory = Memory()
        stored = memory.add({name: _whole(value) for name, value in self._weights(state).items()}, "packed")
        expected = {self._checkpoint.spelling.written(key): item for key, item in self._checkpoint.items.items()}
        problems = {
            "missing": expected.keys() - stored.keys(),
            "unexpected": stored.keys() - expected.keys(),
            "of another shape": {
                name for name in expected.keys() & stored.keys() if stored[name].shape != expected[name].shape
            },
        }
        texts = [f"{kind}: {', '.join(sorted(names)[:4])}" for kind, names in problems.items() if names]
        if texts:
            raise InputError(f"the state does not fit the model: {'; '.join(texts)}", where="to_hf_state_dict")
        sidecar = replace(self._checkpoint.sidecar, extras=memory.add(self._extras, "extras"))
        tensors = {item.key: stored[name] for name, item in expected.items()}
        found = replace(self._checkpoint, tensors=tensors, sidecar=sidecar).hf_tensors(self._hf_names)
        return {name: memory.read(found[name]) for name in self._hf_names}

    def _weights(self, state: Mapping[str, Any] | None) -> dict[str, Any]:
        """Megatron name -> tensor, without what Megatron's modules keep beside their weights."""
        state = self.state_dict() if state is None else state
        return {name.removeprefix(PREFIX): value for name, value in state.items() if not name.endswith("_extra_state")}


def _check_tensors(**given: Any) -> None:
    for name, value in given.items():
        if value is not None and not isinstance(value, torch.Tensor):
            raise UsageError(f"{name} must be a tensor, not a {type(value).__name__}")
    dtype = given["input_ids"].dtype
    if dtype not in (torch.int64, torch.int32):
        raise UsageError(f"input_ids are token ids, int64, not {str(dtype).removeprefix('torch.')}")


def shard(model: PackedModel, mesh: Any = None, **options: Any) -> PackedModel:
    """Shard a model over data parallel ranks with FSDP2: each layer by itself, then the rest.

    Args:
        model: A model that is whole on every rank.
        mesh: `DeviceMesh` of the data parallel ranks; None for all ranks.
        options: Passed on to `fully_shard`: mixed precision, CPU offload, whether to reshard after the forward pass.

    Returns:
        The same model, its parameters now `DTensor`.
    """
    fully_sharded(model, list(model.model.decoder.layers), mesh, **options)
    return model


def _whole(value: Any) -> torch.Tensor:
    """A tensor that FSDP2 may have sharded, gathered."""
    tensor: torch.Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return tensor
