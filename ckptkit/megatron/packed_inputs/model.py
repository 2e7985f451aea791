"""A whole model for packed inputs, as a module to train or to sample from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from ckptkit.checkpoints.joining import Shards, join_shards
from ckptkit.checkpoints.sidecar_contents import with_originals
from ckptkit.errors import InputError, UsageError
from ckptkit.megatron.compat import runs_on
from ckptkit.megatron.in_memory import Memory
from ckptkit.megatron.packed_inputs.batch import PackedBatch, pad, unpad
from ckptkit.megatron.replicas import fully_sharded

if TYPE_CHECKING:
    from ckptkit.checkpoints.checkpoint import Checkpoint
    from ckptkit.megatron.model import CausalModel
    from ckptkit.megatron.replicas import Seat
    from ckptkit.sharding.grid import Parallelism
    from ckptkit.tensors import Tensor

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
        grid: The grid that `chunk` is a part on.
        here: Where on it.
        originals: Hugging Face name -> tensor that Megatron has with other numbers.

    Attributes:
        model: `chunk`.
        grid: `grid`.
    """

    def __init__(
        self,
        chunk: CausalModel,
        checkpoint: Checkpoint,
        extras: Mapping[str, torch.Tensor],
        hf_names: Iterable[str],
        grid: Parallelism,
        here: Seat,
        originals: Mapping[str, torch.Tensor],
    ) -> None:
        super().__init__()
        self.model, self.grid, self._here = chunk, grid, here
        # Said by attributes of the parameters, which FSDP2 replaces.
        self._partial = [name for name, parameter in chunk.named_parameters() if _is_partial(chunk, name, parameter)]
        self.outputs = 1 if checkpoint.config.value_head else checkpoint.config.vocab_size
        # Its tensors are recipes over the transformers model, whose memory they would keep.
        self._checkpoint = replace(checkpoint, tensors={}, comparisons=())
        self._extras = dict(extras)
        self._originals = dict(originals)
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
        if self.grid.world_size > 1 and whole.requires_grad and device.type == "cpu":
            whole.register_hook(_collectives_on_cpu)
        return whole

    def reduce_gradients(self) -> None:
        """Completes the gradients after a backward pass, before the optimizer; all ranks call this.

        Of norms of heads, and under sequence parallelism of all norms, routers and biases, each tensor parallel rank
        has a part of the gradient: the parts are summed. FSDP2 and DistributedDataParallel see to replicas. Without
        tensor parallelism there is nothing to do (source: `_allreduce_non_tensor_model_parallel_grads` of
        megatron-core).
        """
        if self.grid.tp == 1:
            return
        parameters, group = dict(self.model.named_parameters()), parallel_state.get_tensor_model_parallel_group()
        for name in self._partial:
            gradient = parameters[name].grad
            if gradient is not None:
                local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
                torch.distributed.all_reduce(local, group=group)

    def to_hf_state_dict(self, state: Mapping[str, Any] | None = None) -> dict[str, torch.Tensor]:
        """The weights as the transformers model names and lays them out, bit by bit, for its `load_state_dict`.

        On a grid the parts of all ranks are joined, so all ranks must call this, and each gets the whole.

        Args:
            state: Tensors by the names of this model's `state_dict()`, e.g. read from a distributed checkpoint; None
                for the weights of this model. Tensors that FSDP2 sharded are gathered: then all ranks must call this.

        Returns:
            Name -> tensor of its own memory, in the order of the transformers model's state.

        Raises:
            InputError: `state` has not the tensors of this model.
        """
        memory = Memory()
        own = {name: _whole(value) for name, value in self._weights(state).items()}
        tensors = self._joined(memory, own) if self.grid.world_size > 1 else self._own(memory, own)
        tensors = with_originals(self._checkpoint.items, tensors, memory.add(self._originals, "originals"))
        sidecar = replace(self._checkpoint.sidecar, extras=memory.add(self._extras, "extras"))
        found = replace(self._checkpoint, tensors=tensors, sidecar=sidecar).hf_tensors(self._hf_names)
        return {name: memory.read(found[name]) for name in self._hf_names}

    def _own(self, memory: Memory, own: Mapping[str, torch.Tensor]) -> dict[str, Tensor]:
        """Canonical name -> tensor of a whole model."""
        stored = memory.add(own, "packed")
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
        return {item.key: stored[name] for name, item in expected.items()}

    def _joined(self, memory: Memory, own: Mapping[str, torch.Tensor]) -> dict[str, Tensor]:
        """Canonical name -> whole tensor, of the parts of all ranks of the first replica, in host memory."""
        part = {name: tensor.cpu() for name, tensor in own.items()} if not self._here.replica else None
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, (self._here.place, part))
        ranks = {
            (place.pp, place.tp, place.ep): {"0": memory.add(part, str(place))}
            for place, part in parts
            if part is not None
        }
        joined = join_shards(
            Shards(
                path=Path("to_hf_state_dict"),
                family=self._checkpoint.family,
                config=self._checkpoint.config,
                items=self._checkpoint.items,
                spelling=self._checkpoint.spelling,
                grid=self.grid,
                ranks=ranks,
                most_rows=None,
                padding_to=0,
            )
        )
        for copy in joined.comparisons:
            if not torch.equal(memory.read(copy.left), memory.read(copy.right)):
                raise InputError(f"ranks hold other copies: {copy.what}", where="to_hf_state_dict")
        return joined.tensors

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

    On a grid it is the ranks that hold the same part of the model among which that part is sharded. For all parameters
    but experts, expert parallel ranks are data parallel ones, too. Gradients are means over the data parallel ranks.

    Args:
        model: A model that is whole on every rank, or on a grid.
        mesh: `DeviceMesh` of the data parallel ranks; None for all ranks of the grid's.
        options: Passed on to `fully_shard`: mixed precision, CPU offload, whether to reshard after the forward pass.

    Returns:
        The same model, its parameters now `DTensor`.

    Raises:
        UsageError: A mesh is given for expert parallel ranks, which need two.
    """
    layers, grid = list(model.model.decoder.layers), model.grid
    if grid.world_size > 1:
        if grid.ep > 1:
            if mesh is not None:
                raise UsageError("experts on several ranks have a mesh of their own", hint="leave mesh out")
            _shard_experts(layers, options)
        mesh = _mesh(parallel_state.get_data_parallel_group(), layers) if mesh is None else mesh
    fully_sharded(model, layers, mesh, **options)
    return model


def _shard_experts(layers: Sequence[torch.nn.Module], options: Mapping[str, Any]) -> None:
    """Shards experts over the ranks that hold the same ones.

    An expert has the gradients of the tokens of all data parallel ranks, so its mean is over all of them.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = _mesh(parallel_state.get_expert_data_parallel_group(), layers)
    ranks = parallel_state.get_data_parallel_world_size()
    for layer in layers:
        for module in layer.modules():
            if hasattr(module, "local_experts"):
                sharded: Any = fully_shard(module, mesh=mesh, **options)
                sharded.set_gradient_divide_factor(float(ranks))
                # gloo has no sum of scaled parts; of a single part torch would take the mean twice.
                if torch.distributed.get_backend() == "gloo" and mesh.size() > 1:
                    sharded.set_force_sum_reduction_for_comms(True)


def _mesh(group: torch.distributed.ProcessGroup, layers: Sequence[torch.nn.Module]) -> Any:
    """The mesh of a group's ranks."""
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.from_group(group, next(layers[0].parameters()).device.type)


def _collectives_on_cpu(gradient: torch.Tensor) -> None:
    """Lets megatron-core's collectives allocate on the CPU until the backward pass that begins here has ended."""
    context = ExitStack()
    context.enter_context(runs_on(gradient.device))
    torch.autograd.Variable._execution_engine.queue_callback(context.close)


def _is_partial(chunk: CausalModel, name: str, parameter: torch.nn.Parameter) -> bool:
    """Whether each tensor parallel rank has a part of a parameter's gradient."""
    of_heads = "q_layernorm" in name or "k_layernorm" in name
    return of_heads or bool(chunk.config.sequence_parallel and getattr(parameter, "sequence_parallel", False))


def _whole(value: Any) -> torch.Tensor:
    """A tensor that FSDP2 may have sharded, gathered."""
    tensor: torch.Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return tensor
