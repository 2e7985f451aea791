"""Data parallelism: the same grid several times over, by megatron-core's DistributedDataParallel or by FSDP2.

Replicas of a pipeline stage are neighbours: global rank = ((pipeline rank x replicas) + replica) x stage size + rank in
the stage (source: `RankGenerator` of megatron-core, order `tp-cp-ep-dp-pp`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ckptkit.errors import UsageError, VerificationError
from ckptkit.megatron import DDP, DP_KINDS, FSDP2
from ckptkit.megatron.compat import runs_on
from ckptkit.sharding.grid import Parallelism, Rank

TOLERANCE = 1e-5
"""Largest difference of two replicas' logits over the largest logit; more than kernels in another order make."""


class Seat(NamedTuple):
    """Where a global rank sits among the replicas of a grid.

    Attributes:
        place: Its places in the grid.
        number: Its number in the grid, from 0.
        replica: Its replica, from 0.
    """

    place: Rank
    number: int
    replica: int


def seat(grid: Parallelism, replicas: int, rank: int) -> Seat:
    """The seat of a global rank."""
    pp_rank, rest = divmod(rank, replicas * grid.stage_size)
    replica, inside = divmod(rest, grid.stage_size)
    number = pp_rank * grid.stage_size + inside
    return Seat(list(grid.ranks())[number], number, replica)


def replica_group(grid: Parallelism, replicas: int, rank: int) -> dist.ProcessGroup:
    """The ranks that hold the same part of the model as `rank`; every rank must call this."""
    mine: dist.ProcessGroup | None = None
    for pp_rank in range(grid.pp):
        for inside in range(grid.stage_size):
            members = [(pp_rank * replicas + replica) * grid.stage_size + inside for replica in range(replicas)]
            group = dist.new_group(members)
            mine = group if rank in members else mine
    assert mine is not None
    return mine


def replicate(
    kind: str, chunks: Sequence[Any], group: dist.ProcessGroup, device: torch.device
) -> list[Callable[..., torch.Tensor]]:
    """Loaded model chunks, wrapped for data parallel training.

    Args:
        kind: `ddp` or `fsdp2`.
        chunks: From `build_chunks`; FSDP2 shards them in place.
        group: From `replica_group`.
        device: Where they live.

    Raises:
        UsageError: `kind` is neither.
    """
    if kind == DDP:
        return [_ddp(chunk, device) for chunk in chunks]
    if kind == FSDP2:
        from torch.distributed.device_mesh import DeviceMesh

        mesh = DeviceMesh.from_group(group, device.type)
        return [fully_sharded(chunk, chunk.decoder.layers, mesh) for chunk in chunks]
    raise UsageError(f"no data parallelism by {kind!r}", hint=f"choose {' or '.join(DP_KINDS)}")


def _ddp(chunk: Any, device: torch.device) -> Any:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    with runs_on(device):
        wrapped = DistributedDataParallel(chunk.config, DistributedDataParallelConfig(), chunk)
        wrapped.broadcast_params()
    return wrapped


def fully_sharded(model: Any, layers: Sequence[torch.nn.Module], mesh: Any = None, **options: Any) -> Any:
    """A model sharded over data parallel ranks with FSDP2: each layer by itself, then the rest.

    Args:
        model: Whole on every rank; it is changed in place.
        layers: Its layers.
        mesh: `DeviceMesh` of the ranks, or None for all ranks.
        options: Passed on to `fully_shard`: mixed precision, CPU offload, whether to reshard after the forward pass.

    Returns:
        `model`, its parameters now `DTensor`.
    """
    from torch.distributed.fsdp import fully_shard

    for layer in layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def check_same_weights(chunks: Sequence[Any], group: dist.ProcessGroup) -> None:
    """Whether all replicas loaded the same, before anything that makes replicas copies the first one over the others.

    Args:
        chunks: Loaded model chunks of this rank.
        group: From `replica_group`.

    Raises:
        VerificationError: A parameter differs, on every rank of the group that differs.
    """
    source, differing = dist.get_global_rank(group, 0), []
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            first = parameter.detach().clone()
            dist.broadcast(first, src=source, group=group)
            if not torch.equal(first, parameter):
                differing.append(name)
    if differing:
        raise VerificationError(
            f"replica {dist.get_rank(group)} loaded another {differing[0]} than the first one"
            + (f", and {len(differing) - 1} more" if len(differing) > 1 else "")
        )


def check_alike(logits: torch.Tensor | None, group: dist.ProcessGroup, device: torch.device) -> None:
    """Whether all replicas computed what the first one did.

    Args:
        logits: In host memory on the ranks of the last stage; None elsewhere.
        group: From `replica_group`.
        device: Where this rank computes.

    Raises:
        VerificationError: They did not, on every rank of the group that differs.
    """
    if logits is None or not logits.numel():
        return
    nccl = dist.get_backend(group) == "nccl"
    first = logits.to(device) if nccl else logits.clone()
    dist.broadcast(first, src=dist.get_global_rank(group, 0), group=group)
    error = (first.cpu() - logits).abs().max().item() / max(first.abs().max().item(), 1e-30)
    if not error <= TOLERANCE:
        raise VerificationError(
            f"replica {dist.get_rank(group)} computes other logits than the first one (largest difference {error:.1e}"
            " of the largest logit)"
        )
