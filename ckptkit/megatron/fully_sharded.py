"""FSDP2 as Megatron trains with it: model chunks sharded over data parallel ranks, behind the interface of its DDP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ckptkit.errors import VerificationError
from ckptkit.megatron.decoder import inner_layers
from ckptkit.megatron.replicas import fully_sharded


class FullySharded(_BaseDataParallel):
    """A loaded chunk sharded by FSDP2, as megatron-core's schedules and `finalize_model_grads` want a model.

    Experts are sharded over their own data parallel ranks, everything else over all data and context parallel ones.
    Gradients are summed, not averaged, as for a loss per token. Weights in half precision are kept in float32 and
    computed with as they were, so that gradients add up in float32. megatron-core's `TorchFullyShardedDataParallel`
    is for CUDA only, averages, and does not divide by the number of tokens.

    Args:
        chunk: The chunk; it is changed in place.
        device: Where it lives.

    Attributes:
        module: The chunk, its parameters now `DTensor`, whose gradients are in `grad`.

    Raises:
        VerificationError: This torch only averages.
    """

    def __init__(self, chunk: Any, device: torch.device) -> None:
        if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
            raise VerificationError(
                f"FSDP2 of torch {torch.__version__} only averages gradients",
                hint="take a newer torch, or --dp-kind ddp",
            )
        super().__init__(config=chunk.config, module=chunk)
        self.ddp_config = DistributedDataParallelConfig()
        marks = {name: dict(vars(parameter)) for name, parameter in chunk.named_parameters()}
        options: dict[str, Any] = {}
        if (dtype := chunk.config.params_dtype) in (torch.bfloat16, torch.float16):
            options["mp_policy"] = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
            for parameter in chunk.parameters():
                parameter.data = parameter.data.float()
        experts = parallel_state.get_expert_data_parallel_group()
        for layer in [*chunk.decoder.layers, *(inner for _, inner in inner_layers([chunk]))]:
            if (found := getattr(layer.mlp, "experts", None)) is not None:
                fully_shard(found, mesh=_mesh(experts, device), **options)
        everyone = parallel_state.get_data_parallel_group(with_context_parallel=True)
        fully_sharded(chunk, chunk.decoder.layers, _mesh(everyone, device), **options)
        for module in chunk.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction with a factor
        _mark(chunk, marks)

    def zero_grad_buffer(self) -> None:
        """Forgets all gradients."""
        for parameter in self._trained():
            parameter.grad = None

    def scale_gradients(self, scaling_factor: float) -> None:
        """Multiplies all gradients by a factor."""
        for parameter in self._trained():
            if parameter.grad is not None:
                parameter.grad *= scaling_factor

    def finish_grad_sync(self, *args: Any, **options: Any) -> None:
        """Nothing: FSDP2 reduces while it goes backwards. megatron-core gives arguments that its base class lacks."""

    def _trained(self) -> Iterator[torch.nn.Parameter]:
        return (parameter for parameter in self.module.parameters() if parameter.requires_grad)


def _mark(chunk: torch.nn.Module, marks: Mapping[str, Mapping[str, Any]]) -> None:
    """Puts back what Megatron notes on parameters, and FSDP2 forgets: what is split, and what is summed."""
    for name, parameter in chunk.named_parameters():
        for mark, value in marks[name].items():
            setattr(parameter, mark, value)


def _mesh(group: dist.ProcessGroup, device: torch.device) -> DeviceMesh:
    """The ranks of a group; no mesh of an earlier group is equal to it.

    torch keeps what it found out about meshes as long as the process lives, the name of their group as well.
    """
    return DeviceMesh.from_group(group, device.type, mesh_dim_names=(f"replicas_{group.group_name}",))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that FSDP2 may have sharded, gathered; then all ranks that share it must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
