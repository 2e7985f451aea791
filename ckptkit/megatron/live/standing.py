"""Where the chunks of a running model stand: on which grid, on which rank of it, and which layers they hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from ckptkit.errors import UnsupportedError, UsageError
from ckptkit.formats.torch_legacy import RankKey
from ckptkit.megatron.model import expected_tensors, layer_numbers
from ckptkit.sharding.grid import Parallelism, Rank
from ckptkit.sharding.stages import Stage, split_layers

_MOST_WRAPPERS = 8


@dataclass(frozen=True)
class Standing:
    """This rank's part of a running model.

    Attributes:
        chunks: megatron-core's modules, one per virtual stage, without what wraps them.
        grid: The grid.
        rank: This rank's places on it.
        stages: The stages of the chunks.
        replica: Number of this rank among those that hold the same (data and context parallel ones), from 0.
        replicas: How many these are.
    """

    chunks: Sequence[Any]
    grid: Parallelism
    rank: Rank
    stages: Sequence[Stage]
    replica: int = 0
    replicas: int = 1

    @property
    def key(self) -> RankKey:
        """The places as mp_rank files name them."""
        return (self.rank.pp, self.rank.tp, self.rank.ep)

    @property
    def names(self) -> list[str]:
        """The keys of the chunks in a state of Megatron-LM."""
        return ["model"] if len(self.chunks) == 1 else [f"model{number}" for number in range(len(self.chunks))]

    def tensors(self) -> list[dict[str, torch.Tensor]]:
        """For each chunk the parameters and persistent buffers by name; they share the model's memory.

        Raises:
            UnsupportedError: One is of a class of its own, as those of Transformer Engine in FP8 are.
        """
        found = [expected_tensors(chunk) for chunk in self.chunks]
        for name, tensor in (item for tensors in found for item in tensors.items()):
            if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
                raise UnsupportedError(f"{name} is a {type(tensor).__name__}, whose memory is not its values")
        return found

    @classmethod
    def of(cls, model: Any) -> Standing:
        """Where a model stands; every rank calls this.

        Args:
            model: A GPTModel of megatron-core or a list of its chunks, in whatever Megatron wraps them (DDP,
                Float16Module).

        Raises:
            UsageError: torch.distributed or megatron-core's groups are not there, or this is no such model.
            UnsupportedError: Its layers are not where a grid that checkpoints know has them, or its ETP is larger
                than its TP.
        """
        from megatron.core import parallel_state

        if not dist.is_initialized() or not parallel_state.model_parallel_is_initialized():
            raise UsageError(
                "no running model: torch.distributed and megatron-core's groups are needed",
                hint="call this in the training program, on every rank",
            )
        chunks = [_unwrapped(chunk) for chunk in (model if isinstance(model, Sequence) else [model])]
        grid = _grid(chunks)
        if (grid.etp or grid.tp) > grid.tp:
            raise UnsupportedError(f"{grid}: ranks are told apart by TP, PP and EP rank, and these would collide")
        place = Rank(
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_expert_model_parallel_rank(),
            parallel_state.get_expert_tensor_parallel_rank(),
        )
        stages = [stage for stage in split_layers(chunks[0].config.num_layers, grid) if stage.pp_rank == place.pp]
        for chunk, stage in zip(chunks, stages, strict=True):
            if layer_numbers(chunk) != list(stage.layers):
                raise UnsupportedError(
                    f"pipeline rank {place.pp} holds layers {layer_numbers(chunk)}, {grid} has {list(stage.layers)}"
                )
        standing = cls(chunks, grid, place, stages)
        keys: list[RankKey | None] = [None] * dist.get_world_size()
        dist.all_gather_object(keys, standing.key)
        return replace(standing, replica=keys[: dist.get_rank()].count(standing.key), replicas=keys.count(standing.key))


def prepare(model: Any) -> None:
    """Has parameters that are gathered on demand (`overlap_param_gather`) gathered, before they are read."""
    for chunk in model if isinstance(model, Sequence) else [model]:
        for wrapper in _wrappers(chunk):
            config = getattr(wrapper, "ddp_config", None)
            if getattr(config, "overlap_param_gather", False):
                wrapper.start_param_sync(force_sync=True)


def _wrappers(model: Any) -> Iterable[Any]:
    for _ in range(_MOST_WRAPPERS):
        yield model
        if hasattr(model, "decoder") or not hasattr(model, "module"):
            return
        model = model.module


def _unwrapped(model: Any) -> Any:
    *_, inner = _wrappers(model)
    if not all(hasattr(inner, name) for name in ("decoder", "config", "state_dict")):
        raise UsageError(
            f"{type(inner).__name__} is no GPTModel of megatron-core", hint="pass the model, or the list of its chunks"
        )
    return inner


def _grid(chunks: Sequence[Any]) -> Parallelism:
    from megatron.core import parallel_state

    config = chunks[0].config
    layout = getattr(config, "pipeline_model_parallel_layout", None)
    if layout is not None and not isinstance(layout, str):
        layout = getattr(layout, "input_data", layout)
        if not isinstance(layout, str):
            raise UnsupportedError(
                "a pipeline layout that is no text", hint="give it as --pipeline-model-parallel-layout"
            )
    ep, tp = (
        parallel_state.get_expert_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    etp = parallel_state.get_expert_tensor_parallel_world_size()
    return Parallelism(
        tp=tp,
        pp=parallel_state.get_pipeline_model_parallel_world_size(),
        vpp=len(chunks),
        ep=ep,
        etp=None if etp == tp else etp,
        first_stage_layers=getattr(config, "num_layers_in_first_pipeline_stage", None),
        last_stage_layers=getattr(config, "num_layers_in_last_pipeline_stage", None),
        embedding_in_split=bool(getattr(config, "account_for_embedding_in_pipeline_split", False)),
        loss_in_split=bool(getattr(config, "account_for_loss_in_pipeline_split", False)),
        pipeline_layout=layout,
    )
