"""Process groups of a grid, and the few transfers that the runtime makes itself."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from ckptkit.megatron.compat import runs_on
from ckptkit.sharding.grid import Parallelism


def initialize(
    grid: Parallelism,
    rank: int,
    *,
    store: dist.Store,
    device: torch.device,
    timeout_seconds: float = 600.0,
    replicas: int = 1,
    cp: int = 1,
) -> None:
    """Join the process group of `grid` and create Megatron's groups.

    Args:
        grid: The parallel grid; its world size, times the replicas, is the size of the group.
        rank: Global rank; tensor parallel ranks are neighbours.
        store: Where the ranks meet; a fresh one (or a fresh prefix) for every call.
        device: `cpu`, or the CUDA device of this rank.
        timeout_seconds: How long a collective may wait.
        replicas: How many times the grid is there, for data and context parallelism.
        cp: Context parallel size.
    """
    world_size = grid.world_size * replicas
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend(device, world_size), store=store, rank=rank, world_size=world_size, timeout=timeout)
    create_groups(grid, device=device, timeout_seconds=timeout_seconds, cp=cp)


def create_groups(grid: Parallelism, *, device: torch.device, timeout_seconds: float = 600.0, cp: int = 1) -> None:
    """Create Megatron's groups inside the process group that is there; ranks beyond the grid's are replicas.

    Args:
        grid: The parallel grid; its world size divides that of the process group.
        device: Where this rank computes.
        timeout_seconds: How long a collective may wait.
        cp: Context parallel size.
    """
    with runs_on(device):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=grid.tp,
            pipeline_model_parallel_size=grid.pp,
            virtual_pipeline_model_parallel_size=grid.vpp if grid.vpp > 1 else None,
            context_parallel_size=cp,
            expert_model_parallel_size=grid.ep,
            expert_tensor_parallel_size=grid.expert_tp,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=max(1, round(timeout_seconds / 60)),
        )
    # The tracker that does nothing: nothing here draws random numbers, and the other one needs CUDA.
    tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True)


def finalize() -> None:
    """Leave the process group, so that the process can join another."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def backend(device: torch.device, world_size: int) -> str:
    """`nccl` where every rank has a GPU of its own, else `gloo`, whose ranks may share one."""
    return "nccl" if device.type == "cuda" and torch.cuda.device_count() >= world_size else "gloo"


def device_of(kind: str, rank: int) -> torch.device:
    """The device of a rank: `cpu`, or one of the GPUs in turn."""
    return torch.device("cpu") if kind == "cpu" else torch.device(kind, rank % torch.cuda.device_count())


def send(tensor: torch.Tensor, rank: int) -> None:
    """Send to a global rank. Over gloo GPU tensors travel through host memory, which is all it can send."""
    dist.send(tensor.contiguous().to(_wire(tensor.device)), dst=rank)


def receive(shape: Sequence[int], dtype: torch.dtype, device: torch.device, rank: int) -> torch.Tensor:
    """Receive what `send` sent from a global rank."""
    tensor = torch.empty(tuple(shape), dtype=dtype, device=_wire(device))
    dist.recv(tensor, src=rank)
    return tensor.to(device)


def broadcast(tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """`tensor` of a global rank, on every rank and on the device of its own argument."""
    wire = tensor.contiguous().to(_wire(tensor.device))
    dist.broadcast(wire, src=rank)
    return wire.to(tensor.device)


def gather_over_tensor_ranks(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """The shards of all tensor parallel ranks joined along `dim`, on each of them."""
    return _gather(tensor, dim, parallel_state.get_tensor_model_parallel_group())


def gather_over_context_ranks(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """What all context parallel ranks hold joined along `dim`, on each of them."""
    return _gather(tensor, dim, parallel_state.get_context_parallel_group())


def _gather(tensor: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    if group.size() == 1:
        return tensor
    wire = tensor.contiguous().to(_wire(tensor.device))
    parts = [torch.empty_like(wire) for _ in range(group.size())]
    dist.all_gather(parts, wire, group=group)
    return torch.cat(parts, dim=dim).to(tensor.device)


def agree(problem: str | None) -> list[tuple[int, str]]:
    """Tell every rank what went wrong on any of them, so that none waits for a rank that gave up.

    Args:
        problem: The problem on this rank, or None.

    Returns:
        (rank, problem) of the ranks that have one.
    """
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return [(rank, text) for rank, text in enumerate(problems) if text is not None]


def _wire(device: torch.device) -> torch.device:
    return torch.device("cpu") if dist.get_backend() == "gloo" else device
