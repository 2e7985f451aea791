"""The router of a mixture of experts, and its decisions: recorded, or prescribed.

Experts and their exchange of tokens are megatron-core's. Routing is what two implementations of one model part over
first: where two experts are nearly equal, a rounding error sends a token elsewhere, and everything after it differs.
To compare such models, let one of them replay what the other chose, and compare the router logits by themselves:

    with record_routing(chunks, length) as routing:
        pipeline.forward(tokens)
    routing.logits[layer], routing.experts[layer]  # of the layers that this rank holds

    pipeline.forward(tokens, replay={layer: experts})  # or, around a chunk that is run by hand:
    with replay_routing(chunks, {layer: experts}):
        chunk(tokens, positions, None)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from ckptkit.errors import UsageError
from ckptkit.megatron.context_parallel.share import whole_sequence
from ckptkit.megatron.decoder import inner_layers


@dataclass
class Routing:
    """Inputs and choices of the routers in one rank's layers.

    Attributes:
        logits: Global layer number, from 0 -> router logits, fp32 [batch, sequence, experts] in host memory.
        experts: Global layer number, from 0 -> numbers of the chosen experts, int64 [batch, sequence, experts per
            token] in host memory, the most likely one first; replayed ones in the order in which they were given.
        own: As `experts`, what the routers would have chosen had nothing been replayed.
    """

    logits: dict[int, torch.Tensor] = field(default_factory=dict)
    experts: dict[int, torch.Tensor] = field(default_factory=dict)
    own: dict[int, torch.Tensor] = field(default_factory=dict)

    def add(self, layer: int, logits: torch.Tensor, experts: torch.Tensor, own: torch.Tensor) -> None:
        """Append the rows of one forward pass of one layer."""
        for known, new in ((self.logits, logits.float()), (self.experts, experts), (self.own, own)):
            new = new.detach().cpu()
            known[layer] = torch.cat((known[layer], new)) if layer in known else new


class ExpertChoice:
    """Chooses the experts of a router: the prescribed ones, otherwise the most likely ones.

    megatron-core takes it for its own `RouterReplay`.

    Attributes:
        prescribed: int64 [tokens, experts per token] of the tokens of this call, or None. A token with a negative
            number is left to the router.
        chosen: The last choice, in that shape.
        own: The choice that the router would have made by itself, in that shape.
    """

    prescribed: torch.Tensor | None = None
    chosen: torch.Tensor | None = None
    own: torch.Tensor | None = None

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[torch.Tensor, torch.Tensor]] = torch.topk,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The scores of the chosen experts and their numbers, [tokens, experts per token] each.

        Args:
            scores: Logits or probabilities, fp32 [tokens, experts].
            topk: Experts per token.
            num_groups: Passed on.
            group_topk: Passed on.
            default_compute_topk: megatron-core's own choice.
        """
        best, experts = default_compute_topk(scores, topk, num_groups, group_topk)
        self.own = experts
        if self.prescribed is not None:
            experts = torch.where((self.prescribed >= 0).all(-1, keepdim=True), self.prescribed, experts)
            best = scores.gather(1, experts)
        self.chosen = experts
        return best, experts


class Router(TopKRouter):
    """megatron-core's `TopKRouter` with logits from a plain linear layer, on any device.

    megatron-core's own needs a GPU. The logits are rounded to the model's dtype, then chosen and weighed in fp32, as in
    transformers (source: `Qwen3MoeTopKRouter`, `MixtralTopKRouter`); with `moe_router_dtype` fp32 they are not rounded
    (source: `Glm4MoeTopkRouter`).

    Attributes:
        replay: Experts that the tokens of every forward pass are routed to, int64 [batch, sequence, experts per token],
            or None. All tensor parallel ranks are given the whole sequence, also where each of them holds a part of it;
            context parallel ranks are given theirs. Tokens beyond its end, which are padding, and tokens with a
            negative number are left to the router.
        record: Called in every forward pass with the logits, fp32 [batch, sequence, experts], the chosen experts, and
            those that the router would have chosen by itself, int64 [batch, sequence, experts per token], of the whole
            sequence; or None.
        adapted: The logits and the hidden states -> the logits with an adapter; or None.
    """

    adapted: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    replay: torch.Tensor | None = None
    record: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.router_replay = ExpertChoice()

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Logits, fp32 [..., experts], of hidden states [..., hidden]."""
        dtype = torch.float32 if self.config.moe_router_dtype == "fp32" else input.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        logits = F.linear(input.to(dtype), self.weight.to(dtype), bias)
        return (logits if self.adapted is None else self.adapted(logits, input)).float()

    def routing(self, logits: torch.Tensor, *args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights [tokens, experts], zero for those not chosen, and which were chosen, of logits [s, b, experts]."""
        sequence, batch = logits.shape[:2]
        self.router_replay.prescribed = self._prescribed(sequence, batch, logits.device)
        weights, chosen = super().routing(logits, *args, **options)
        if self.record is not None:
            assert self.router_replay.chosen is not None and self.router_replay.own is not None
            numbers = [part.view(sequence, batch, -1) for part in (self.router_replay.chosen, self.router_replay.own)]
            self.record(*(self._whole(part).transpose(0, 1) for part in (logits, *numbers)))
        return weights, chosen

    def _prescribed(self, sequence: int, batch: int, device: torch.device) -> torch.Tensor | None:
        """This call's part of `replay`, [tokens, experts per token], tokens ordered as megatron-core orders them."""
        if self.replay is None:
            return None
        parts = parallel_state.get_tensor_model_parallel_world_size() if self.config.sequence_parallel else 1
        rows, length, width = self.replay.shape
        if (rows, width) != (batch, self.topk) or length > sequence * parts:
            raise UsageError(
                f"replayed experts are {list(self.replay.shape)} for {batch} rows of {sequence * parts} tokens with "
                f"{self.topk} experts each"
            )
        if (self.replay >= self.num_experts).any():
            raise UsageError(f"replayed experts name expert {int(self.replay.max())} of {self.num_experts}")
        whole = F.pad(self.replay, (0, 0, 0, sequence * parts - length), value=-1)
        first = sequence * parallel_state.get_tensor_model_parallel_rank() if parts > 1 else 0
        return whole[:, first : first + sequence].transpose(0, 1).flatten(0, 1).to(device)

    def _whole(self, part: torch.Tensor) -> torch.Tensor:
        """The whole sequence [sequence, batch, width] from every rank's part of it."""
        return whole_sequence(part, self.config.sequence_parallel)


class ExpertOutput(RowParallelLinear):
    """The second linear of an expert with a bias, which all ranks that share the expert add up to one.

    megatron-core adds the whole bias on each of them before it sums their outputs, and so refuses more than one.
    Under sequence parallelism it would sum the bias's gradients over tensor parallel ranks, although these have the
    gradients of all tokens, or biases of different experts.

    Args:
        input_size: Width of the input over all ranks.
        output_size: Width of the output.
        config: Megatron's config.
        options: Passed on.
    """

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        if self.bias is not None:
            self.bias.sequence_parallel = False

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output, and this rank's share of the bias, whose gradient is that of the whole."""
        output, bias = super().forward(input_)
        if not self.explicit_expert_comm:  # autograd forbids to add the bias in place, as megatron-core does next
            output = output.clone()
        ranks = self.tp_group.size()
        if bias is None or ranks == 1:
            return output, bias
        return output, bias.detach() / ranks + (bias - bias.detach())


def routers(chunks: Iterable[torch.nn.Module]) -> dict[int, Router]:
    """Global layer number, from 0 -> router, of the layers with experts that some model chunks hold.

    Layers of multi-token prediction have numbers behind those of the model's layers.
    """
    parts = list(chunks)
    own = ((layer.layer_number - 1, layer) for chunk in parts for layer in chunk.decoder.layers)  # type: ignore[union-attr]
    return {
        number: module
        for number, layer in (*own, *inner_layers(parts))
        for module in layer.modules()
        if isinstance(module, Router)
    }


@contextmanager
def record_routing(chunks: Iterable[torch.nn.Module], length: int | None = None) -> Iterator[Routing]:
    """Record what routers see and choose in the forward passes inside.

    Every rank of the grid must record together: under sequence parallelism the parts of the ranks are gathered. With
    activation recomputation the backward pass belongs outside, it would run the routers again.

    Args:
        chunks: Model chunks of this rank.
        length: Tokens of a sequence that are kept; what follows them is padding. None keeps all.

    Yields:
        The record, empty at first. Rows of later passes follow those of earlier ones.
    """
    routing, found = Routing(), routers(chunks)

    def recorder(layer: int) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]:
        return lambda *parts: routing.add(layer, *(part[:, :length] for part in parts))

    for layer, router in found.items():
        router.record = recorder(layer)
    try:
        yield routing
    finally:
        for router in found.values():
            router.record = None


@contextmanager
def replay_routing(chunks: Iterable[torch.nn.Module], experts: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """Route the tokens of each forward pass inside to given experts.

    Their weights are still the router's own. With activation recomputation the backward pass belongs inside, it routes
    again.

    Args:
        chunks: Model chunks of this rank.
        experts: Global layer number, from 0 -> numbers of the experts, int64 [batch, sequence, experts per token] of
            the tokens of one pass (packed rows: [1, tokens, experts per token]), the same on all ranks; see
            `Router.replay`. Layers that this rank does not hold are left out of account.

    Raises:
        UsageError: A layer with experts is missing; inside, the shape is not that of the tokens.
    """
    found = routers(chunks)
    if missing := sorted(found.keys() - experts.keys()):
        raise UsageError(f"no experts to replay for layer {', '.join(map(str, missing))}")
    for layer, router in found.items():
        router.replay = experts[layer]
    try:
        yield
    finally:
        for router in found.values():
            router.replay = None
