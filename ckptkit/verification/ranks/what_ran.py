"""Observes how a run on ranks really ran. The facts come from the modules that ran, not from the request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ckptkit.errors import VerificationError
from ckptkit.megatron import DDP, FSDP2

if TYPE_CHECKING:
    import torch

    from ckptkit.megatron.pipeline import Pipeline

_HINT = "this is a mistake in ckptkit"

Seen = dict[str, Any]
"""`packed`, `sequence_parallel` and `context_parallel` (ranks) of the last pass, `replication` (`ddp`, `fsdp2` or
None), `device` in words."""


class Observer:
    """Looks at what enters a rank's first layer.

    Args:
        pipeline: The pipeline that runs.
        passes: Look at this many passes only, or None for all.

    Attributes:
        seen: Of the last pass; without what is seen in layers on a rank that has none.
    """

    def __init__(self, pipeline: Pipeline, passes: int | None = None) -> None:
        self._left = passes
        self._layers = [layer for chunk in pipeline.chunks for layer in chunk.decoder.layers]
        self._length = 0
        self.seen: Seen = {"replication": _replication(pipeline), "device": _name(pipeline.device)}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at the passes inside."""
        handles = [layer.register_forward_pre_hook(self._look, with_kwargs=True) for layer in self._layers[:1]]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def expect(self, length: int) -> None:
        """Rows that come next have this many tokens, unless they are packed."""
        self._length = length

    def _look(self, layer: torch.nn.Module, inputs: Sequence[Any], named: Mapping[str, Any]) -> None:
        if self._left is not None:
            if not self._left:
                return
            self._left -= 1
        from ckptkit.megatron.context_parallel.plan import is_packed, plan_of

        states = named["hidden_states"] if "hidden_states" in named else inputs[0]
        params = named.get("packed_seq_params")
        packed, plan = is_packed(params), plan_of(params)
        length = int(params.cu_seqlens_q[-1]) if params is not None and packed else self._length
        if plan is not None:
            length = len(plan.positions)
        self.seen["packed"] = packed
        self.seen["context_parallel"] = 1 if plan is None else len(plan.order) // len(plan.positions)
        if length > 1:  # one token cannot be split
            self.seen["sequence_parallel"] = len(states) < length


def count_modules(chunks: Sequence[torch.nn.Module]) -> dict[str, int]:
    """Classes of megatron-core and of ckptkit among the modules of model chunks -> how many."""
    counts: dict[str, int] = {}
    for chunk in chunks:
        for module in chunk.modules():
            name = f"{type(module).__module__}.{type(module).__qualname__}"
            if name.startswith(("megatron.", "ckptkit.")):
                counts[name] = counts.get(name, 0) + 1
    return counts


def _replication(pipeline: Pipeline) -> str | None:
    from megatron.core.distributed import DistributedDataParallel
    from torch.distributed.tensor import DTensor

    if any(isinstance(parameter, DTensor) for chunk in pipeline.chunks for parameter in chunk.parameters()):
        return FSDP2
    wrapped = [isinstance(run, DistributedDataParallel) for run in pipeline.replicated]
    return DDP if wrapped and all(wrapped) else None


def _name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def check_ran(asked: Mapping[str, Any], seen: Sequence[Seen]) -> None:
    """Checks that every rank ran as requested.

    Args:
        asked: `packed`, `sequence_parallel`, `context_parallel`, and `replication` or None.
        seen: The facts that an `Observer` recorded on each rank.

    Raises:
        VerificationError: A rank ran differently, or no rank recorded the facts. The logits would then prove nothing.
    """
    if not any("packed" in facts for facts in seen):
        raise VerificationError("no rank saw what went through its layers", hint=_HINT)
    for rank, facts in enumerate(seen):
        for name, value in asked.items():
            if facts.get(name, value) != value:
                raise VerificationError(
                    f"rank {rank} ran with {name} {facts[name]!r}, asked for was {value!r}",
                    hint=_HINT,
                )
