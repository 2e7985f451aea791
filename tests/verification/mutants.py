"""Faults of every kind, one at a time: what a verification is for.

A fault sits in one of three places. `file`: a tensor of the candidate is damaged. `claim`: its tensors are right, and
what it says of its model is wrong. `reading`: the files are right, and what is made of them is wrong; a mistake in a
table or in the runtime is of this kind, and makes no difference to anything that only looks at files. It is put into
the ranks by the name of the function that opens the checkpoint there (`OPENER` + name of the fault).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ckptkit.sharding.grid import Parallelism
from ckptkit.tables.model_config import LayerConfig, ModelConfig, Rope

OPENER = "tests.verification.mutants:"
Tensors = dict[str, Any]
TWO = Parallelism(2)
CUT = {"cp": 2}


@dataclass(frozen=True)
class Fault:
    """A fault and who must see it.

    Attributes:
        kind: Key of `tests.models`, or one with `-value` behind it: the same with a value head.
        cheapest: The cheapest level that sees it.
        place: Where the logits level says that the models part; None where it cannot say, or sees nothing. Of a fault
            that only gradients show, the tensor that they name.
        fp32: Whether the logits level sees it in fp32.
        bf16: Whether it does in bf16.
        tensors: Changes a rank's tensors in place.
        config: Makes another model of what the checkpoint says.
        args: `claim`: what Megatron's `args` say instead.
        raw: `claim`: what config.json says instead.
        patch: `reading`: replaces something in a rank's process; (object, attribute) -> what to put there.
        grid: Grid of the candidate.
        packed: Run the candidate on packed rows.
        run: How else the candidate runs.
        sits: `file`, `claim` or `reading`.
    """

    kind: str
    cheapest: str
    place: str | None
    fp32: bool = True
    bf16: bool = True
    tensors: Callable[[Tensors], None] | None = None
    config: Callable[[ModelConfig], ModelConfig] | None = None
    args: dict[str, Any] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)
    patch: Callable[[], dict[tuple[Any, str], Any]] | None = None
    grid: Parallelism = field(default_factory=Parallelism)
    packed: bool = False
    run: dict[str, Any] = field(default_factory=dict)

    @property
    def sits(self) -> str:
        if self.args or self.raw:
            return "claim"
        return "file" if self.cheapest == "weights" else "reading"


# Tensors --------------------------------------------------------------------------------------------------------------


def put(name: str, change: Callable[[Any], Any]) -> Callable[[Tensors], None]:
    """Changes every tensor whose name matches."""

    def apply(tensors: Tensors) -> None:
        found = [key for key in tensors if re.fullmatch(rf"decoder\.layers\.{name}|{name}", key)]
        assert found, name
        for key in found:
            tensors[key] = change(tensors[key])

    return apply


def swap(first: str, second: str) -> Callable[[Tensors], None]:
    """Exchanges all tensors of two prefixes."""

    def apply(tensors: Tensors) -> None:
        pairs = [(key, key.replace(first, second)) for key in tensors if key.startswith(first)]
        assert pairs
        for one, other in pairs:
            tensors[one], tensors[other] = tensors[other], tensors[one]

    return apply


def rotate_layers(tensors: Tensors) -> None:
    """Layer i gets what belongs to layer i + 1."""
    layers = sorted({int(key.split(".")[2]) for key in tensors if key.startswith("decoder.layers.")})
    before = dict(tensors)
    for key in before:
        if key.startswith("decoder.layers."):
            _, _, number, rest = key.split(".", 3)
            tensors[key] = before[f"decoder.layers.{layers[(int(number) + 1) % len(layers)]}.{rest}"]


def halves(weight: Any) -> Any:
    return weight.roll(weight.shape[0] // 2, 0)


def in_turns(weight: Any) -> Any:
    """Rows of a first and of a second half, one of each."""
    return weight.view(2, len(weight) // 2, -1).transpose(0, 1).reshape(weight.shape)


def of_groups(order: Callable[[int], list[int]], width: int = 8, group: int = 5) -> Callable[[Any], Any]:
    """Reorders the heads of every query group of a fused projection; `group` counts its heads with key and value."""

    def change(weight: Any) -> Any:
        return weight.reshape(-1, group, width, weight.shape[-1])[:, order(group)].reshape(weight.shape)

    return change


def not_interleaved(weight: Any) -> Any:
    """All queries, then all keys, then all values."""
    import torch

    groups = weight.reshape(4, 5, 8, weight.shape[-1])
    return torch.cat([groups[:, :3].flatten(0, 2), groups[:, 3].flatten(0, 1), groups[:, 4].flatten(0, 1)])


def pairs_interleaved(weight: Any) -> Any:
    """Rows of queries and keys as for a rotary embedding that rotates neighbours."""
    groups = weight.reshape(4, 5, 8, weight.shape[-1]).clone()
    order = [channel for pair in range(4) for channel in (pair, pair + 4)]
    groups[:, :4] = groups[:, :4][:, :, order]
    return groups.reshape(weight.shape)


def cut_flat(*parts: int) -> Callable[[Any], Any]:
    """Rows that a writer cut for two ranks without looking at their parts, joined as if it had."""

    def change(weight: Any) -> Any:
        import torch

        ranks = [half.split([size // 2 for size in parts]) for half in weight.chunk(2)]
        return torch.cat([share for part in zip(*ranks, strict=True) for share in part])

    return change


def parts_exchanged(first: int, second: int, *parts: int) -> Callable[[Any], Any]:
    """Two parts of the rows, of equal size, in one another's place."""

    def change(weight: Any) -> Any:
        import torch

        found = list(weight.split(list(parts)))
        found[first], found[second] = found[second], found[first]
        return torch.cat(found)

    return change


def ones(weight: Any) -> Any:
    return weight * 0 + 1


def one_bit(weight: Any) -> Any:
    """The last bit of one element."""
    import torch

    changed = weight.clone()
    changed.view(torch.int32).flatten()[7] ^= 1
    return changed


def not_a_number(weight: Any) -> Any:
    changed = weight.clone()
    changed.flatten()[3] = float("nan")
    return changed


def padding_trained(weight: Any) -> Any:
    """Rows that pad the vocabulary as a training leaves them, which may be like any other."""
    import torch

    return torch.cat((weight[:250], weight[: len(weight) - 250]))


# What is said of the model --------------------------------------------------------------------------------------------


def of_layers(change: Callable[[int, LayerConfig], LayerConfig]) -> Callable[[ModelConfig], ModelConfig]:
    return lambda model: replace(model, layers=tuple(change(i, layer) for i, layer in enumerate(model.layers)))


def of_rope(change: Callable[[Rope], Rope]) -> Callable[[ModelConfig], ModelConfig]:
    return of_layers(lambda _, layer: replace(layer, rope=change(layer.rope)))


def of_model(**changes: Any) -> Callable[[ModelConfig], ModelConfig]:
    return lambda model: replace(model, **changes)


def windows_wider(by: int) -> Callable[[ModelConfig], ModelConfig]:
    return of_layers(lambda _, layer: replace(layer, window=layer.window + by if layer.window else None))


def windows_shifted(model: ModelConfig) -> ModelConfig:
    windows = [layer.window for layer in model.layers]
    return of_layers(lambda i, layer: replace(layer, window=windows[i - 1]))(model)


def thetas_swapped(model: ModelConfig) -> ModelConfig:
    """Local layers rotate as global ones, and the other way round."""
    local = next(layer.rope for layer in model.layers if layer.window)
    whole = next(layer.rope for layer in model.layers if not layer.window)
    return of_layers(lambda _, layer: replace(layer, rope=whole if layer.window else local))(model)


# The runtime ----------------------------------------------------------------------------------------------------------


def positions_run_on() -> dict[tuple[Any, str], Any]:
    """Packed sequences that see one another: the bounds between them are lost."""
    from ckptkit.megatron.packed_inputs.batch import PackedBatch

    original = PackedBatch.params

    def params(batch: PackedBatch) -> Any:
        ends = batch.cu_seqlens[[0, -1]]
        return original(PackedBatch(batch.input_ids, ends, batch.total))

    return {(PackedBatch, "params"): params}


def bound_late() -> dict[tuple[Any, str], Any]:
    """The first token of every packed sequence but the first belongs to the one before."""
    from ckptkit.megatron.packed_inputs.batch import PackedBatch

    original = PackedBatch.params

    def params(batch: PackedBatch) -> Any:
        bounds = batch.cu_seqlens.clone()
        bounds[1:-1] += 1
        return original(PackedBatch(batch.input_ids, bounds, batch.max_seqlen + 1))

    return {(PackedBatch, "params"): params}


def convolution_runs_on() -> dict[tuple[Any, str], Any]:
    """The convolutions of a DeltaNet see the last tokens of the sequence before."""
    import torch

    from ckptkit.megatron.gated_delta_net import GatedDeltaNet

    forward, convolved = GatedDeltaNet.forward, GatedDeltaNet._convolved

    def anew(self: Any, *args: Any, **options: Any) -> Any:
        self.__dict__["before"] = None
        return forward(self, *args, **options)

    def with_those_before(self: Any, qkv: Any) -> Any:
        before, self.__dict__["before"] = self.__dict__["before"], qkv[:, -3:]
        if before is None:
            return convolved(self, qkv)
        return convolved(self, torch.cat((before, qkv), dim=1))[:, before.shape[1] :]

    return {(GatedDeltaNet, "forward"): anew, (GatedDeltaNet, "_convolved"): with_those_before}


def memory_runs_on() -> dict[tuple[Any, str], Any]:
    """A DeltaNet remembers the sequences before."""
    import torch

    from ckptkit.megatron import gated_delta_net
    from ckptkit.megatron.delta_rule import gated_delta_rule
    from ckptkit.megatron.gated_delta_net import GatedDeltaNet

    forward = GatedDeltaNet.forward
    before: list[Any] = []

    def anew(self: Any, *args: Any, **options: Any) -> Any:
        before.clear()
        return forward(self, *args, **options)

    def remembering(*parts: Any) -> Any:
        before[:] = [torch.cat(pair, dim=1) for pair in zip(before, parts, strict=True)] if before else parts
        return gated_delta_rule(*before)[:, -parts[0].shape[1] :]

    return {(GatedDeltaNet, "forward"): anew, (gated_delta_net, "rule_for"): lambda value: remembering}


def masked(hide: Callable[[Any, range, int, int | None], None]) -> Callable[[], dict[tuple[Any, str], Any]]:
    """Masks that are changed after they are made: `hide` is given block, tokens, first token and window."""

    def patch() -> dict[tuple[Any, str], Any]:
        from ckptkit.megatron import attention, masks
        from ckptkit.megatron.context_parallel import plan

        original = masks.causal_block

        def block(at: int, tokens: range, first: int, window: int | None, device: Any) -> Any:
            found = original(at, tokens, first, window, device)
            hide(found, tokens, first, window)
            return found

        return {(module, "causal_block"): block for module in (attention, plan)}

    return patch


def first_token_hidden(block: Any, tokens: range, first: int, window: int | None) -> None:
    """A causal mask that is off by one: nobody sees the first position but itself."""
    if block.keys.start == first:
        block.hidden[max(0, first + 1 - tokens.start) :, 0] = True


def gates_open() -> dict[tuple[Any, str], Any]:
    """The outputs of attention as they are."""
    from ckptkit.megatron.attention import GroupedQueryAttention

    return {(GroupedQueryAttention, "_apply_output_gate"): lambda self, x, gate: x}


# Context parallelism --------------------------------------------------------------------------------------------------


def zigzag_forgotten() -> dict[tuple[Any, str], Any]:
    """Each rank is fed neighbouring tokens, and attends as if it had a chunk from the front and one from the back."""
    from ckptkit.megatron.context_parallel.cut import Cut

    return {(Cut, "part"): lambda cut, whole, rank, dim: whole.chunk(cut.ranks, dim)[rank]}


def local_positions() -> dict[tuple[Any, str], Any]:
    """Each rank counts its own tokens."""
    import torch

    from ckptkit.megatron.context_parallel.cut import Cut

    return {(Cut, "positions"): lambda cut, rank: torch.arange(cut.bounds[-1] // cut.ranks)}


def farthest_hidden_at_the_edge(block: Any, tokens: range, first: int, window: int | None) -> None:
    """The window of the first token of a chunk is one too narrow."""
    if window is not None and tokens.start - first >= window:
        block.hidden[0, 0] = True


def sequence_mask_lost() -> dict[tuple[Any, str], Any]:
    """Tokens of a packed row see whatever comes before them in it."""
    from ckptkit.megatron.context_parallel import plan

    original = plan.causal_block

    def block(at: int, tokens: range, first: int, window: int | None, device: Any) -> Any:
        return original(at, tokens, 0, window, device)

    return {(plan, "causal_block"): block}


def context_summed_twice() -> dict[tuple[Any, str], Any]:
    """Gradients that are reduced once more over context parallel ranks."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel

    original = DistributedDataParallel.finish_grad_sync

    def again(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        for parameter in self.module.parameters():
            dist.all_reduce(parameter.main_grad, group=parallel_state.get_context_parallel_group())

    return {(DistributedDataParallel, "finish_grad_sync"): again}


def keys_not_summed() -> dict[tuple[Any, str], Any]:
    """The gradients of keys and values are those of the rank's own queries."""
    from ckptkit.megatron.context_parallel import attention

    name = "gather_from_sequence_parallel_region"
    original = getattr(attention, name)
    return {(attention, name): functools.partial(original, tensor_parallel_output_grad=False)}


def experts_before_weights() -> dict[tuple[Any, str], Any]:
    """Weights of experts that are not applied: every chosen one counts the same."""
    from ckptkit.megatron.moe import Router

    original = Router.routing

    def routing(self: Any, logits: Any, *args: Any, **options: Any) -> Any:
        weights, chosen = original(self, logits, *args, **options)
        return weights.mean(-1, keepdim=True) * (weights.shape[-1] / self.topk) * chosen, chosen

    return {(Router, "routing"): routing}


def last_expert_preferred() -> dict[tuple[Any, str], Any]:
    """A choice that is not by the logits alone, as by a bias that balances the load."""
    import torch

    from ckptkit.megatron.moe import ExpertChoice

    original = ExpertChoice.get_replay_topk

    def choose(self: Any, scores: Any, topk: int, *args: Any) -> Any:
        biased = torch.cat((scores[:, :-1], scores[:, -1:] + 1), dim=1)
        _, experts = original(self, biased, topk, *args)
        return scores.gather(1, experts), experts

    return {(ExpertChoice, "get_replay_topk"): choose}


# Gradients ------------------------------------------------------------------------------------------------------------


def reductions() -> Any:
    """megatron-core's module of that name, which its own package hides behind a function."""
    import importlib
    import sys

    importlib.import_module("megatron.core.distributed")
    return sys.modules["megatron.core.distributed.finalize_model_grads"]


def left_out(name: str) -> Callable[[], dict[tuple[Any, str], Any]]:
    """A reduction of gradients that is not made."""
    return lambda: {(reductions(), name): lambda *args, **options: None}


def twice(name: str) -> Callable[[], dict[tuple[Any, str], Any]]:
    """A reduction of gradients that is made again."""

    def patch() -> dict[tuple[Any, str], Any]:
        module = reductions()
        original = getattr(module, name)

        def again(*args: Any, **options: Any) -> None:
            original(*args, **options)
            original(*args, **options)

        return {(module, name): again}

    return patch


def replicas_not_summed() -> dict[tuple[Any, str], Any]:
    """Each data parallel rank keeps the gradients of its own rows."""
    from megatron.core.distributed import DistributedDataParallel

    return {(DistributedDataParallel, "finish_grad_sync"): lambda *args, **options: None}


def averaged_by_fsdp2() -> dict[tuple[Any, str], Any]:
    """FSDP2's own division by the number of replicas, on top of that by the number of tokens."""
    from torch.distributed.fsdp import FSDPModule

    return {(FSDPModule, "set_gradient_divide_factor"): lambda *args: None}


def marks_lost_by_fsdp2() -> dict[tuple[Any, str], Any]:
    """Parameters under FSDP2 that no longer say that each rank has a part of their gradient."""
    from ckptkit.megatron import fully_sharded

    return {(fully_sharded, "_mark"): lambda *args: None}


def value_head_not_marked() -> dict[tuple[Any, str], Any]:
    """A value head that does not say that each rank has a part of its gradient."""
    from ckptkit.megatron.heads import ValueHead

    original = ValueHead.__init__

    def unmarked(self: Any, *args: Any) -> None:
        original(self, *args)
        for parameter in self.parameters():
            del parameter.sequence_parallel

    return {(ValueHead, "__init__"): unmarked}


def targets_late() -> dict[tuple[Any, str], Any]:
    """Values that should have been those of one token earlier."""
    from ckptkit.verification.training import candidate

    original = candidate.values_to_learn
    return {(candidate, "values_to_learn"): lambda row: [0.0, *original(row)[:-1]]}


def values_detached() -> dict[tuple[Any, str], Any]:
    """A branch that is cut off from its gradient: the values of all attention."""
    from ckptkit.megatron.attention import ExactAttention

    original = ExactAttention.forward

    def forward(self: Any, query: Any, key: Any, value: Any, *args: Any, **options: Any) -> Any:
        return original(self, query, key, value.detach(), *args, **options)

    return {(ExactAttention, "forward"): forward}


def shared_detached() -> dict[tuple[Any, str], Any]:
    """Keys and values that other layers attend to do not learn from those."""
    from ckptkit.megatron.gemma4.layer import Gemma4Layer

    original = Gemma4Layer._keep

    def keep(self: Any, hidden: Any, context: Any) -> Any:
        attention = self.self_attention.core_attention
        attention.kept = None if attention.kept is None else attention.kept.detach()
        return original(self, hidden, context)

    return {(Gemma4Layer, "_keep"): keep}


def weights_of_experts_detached() -> dict[tuple[Any, str], Any]:
    """Routers that do not learn: the weights that they give are taken as constants."""
    from ckptkit.megatron.moe import Router

    original = Router.routing

    def routing(self: Any, logits: Any, *args: Any, **options: Any) -> Any:
        weights, chosen = original(self, logits, *args, **options)
        return weights.detach(), chosen

    return {(Router, "routing"): routing}


def bias_added_by_every_rank() -> dict[tuple[Any, str], Any]:
    """The bias behind an expert as megatron-core's own linear has it, however many ranks share the expert."""
    from megatron.core.tensor_parallel import RowParallelLinear

    from ckptkit.megatron.moe import ExpertOutput

    def forward(self: Any, input_: Any) -> Any:
        output, bias = RowParallelLinear.forward(self, input_)
        return output.clone(), bias

    return {(ExpertOutput, "forward"): forward}


def bias_summed_over_ranks() -> dict[tuple[Any, str], Any]:
    """The bias behind an expert with megatron-core's mark, by which its gradients are summed over tensor ranks."""
    from ckptkit.megatron.moe import ExpertOutput

    original = ExpertOutput.__init__

    def marked(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        self.bias.sequence_parallel = self.sequence_parallel

    return {(ExpertOutput, "__init__"): marked}


def gated_norms_not_summed() -> dict[tuple[Any, str], Any]:
    """Each tensor parallel rank keeps the gradient of the gated norm that its own heads give."""
    from ckptkit.megatron import gated_delta_net

    return {(gated_delta_net, "copy_to_tensor_model_parallel_region"): lambda weight, group: weight}


def decays_detached() -> dict[tuple[Any, str], Any]:
    """DeltaNets that do not learn what to forget."""
    from ckptkit.megatron import gated_delta_net
    from ckptkit.megatron.delta_rule import gated_delta_rule

    def rule(query: Any, key: Any, value: Any, decay: Any, rate: Any) -> Any:
        return gated_delta_rule(query, key, value, decay.detach(), rate)

    return {(gated_delta_net, "rule_for"): lambda value: rule}


def sinks_detached() -> dict[tuple[Any, str], Any]:
    """Sinks that do not learn."""
    from ckptkit.megatron.attention import ExactAttention

    original = ExactAttention._block

    def block(self: Any, *args: Any) -> Any:
        learned = self.softmax_offset
        del self.softmax_offset
        self.softmax_offset = None if learned is None else learned.detach()
        try:
            return original(self, *args)
        finally:
            del self.softmax_offset
            self.register_parameter("softmax_offset", learned)

    return {(ExactAttention, "_block"): block}


def padding_counted() -> dict[tuple[Any, str], Any]:
    """The rows that pad the vocabulary are part of the softmax of the loss."""
    import contextlib

    from ckptkit.megatron import training

    return {(training, "_only_vocabulary"): lambda chunk, vocab_size: contextlib.nullcontext()}


def prompts_learned() -> dict[tuple[Any, str], Any]:
    """The mask of the loss is lost: prompts are learned, too."""
    from ckptkit.verification.training import batches

    return {(batches, "counted"): lambda row: [at < len(row) - 1 for at in range(len(row))]}


def backwards(kind: str, tensor: str, patch: Any, **how: Any) -> Fault:
    """A fault that only gradients show, in `tensor` among others."""
    return Fault(kind, "gradients", tensor, fp32=False, bf16=False, patch=patch, **how)


QKV, PROJ = r"\d+.self_attention.linear_qkv.weight", r"\d+.self_attention.linear_proj.weight"
FC1, FC2 = r"1.mlp.linear_fc1.weight", r"1.mlp.linear_fc2.weight"
ROUTER = r"1.mlp.router.weight"
SINKS, EXPERTS = ".self_attention.core_attention.softmax_offset", r"\d+.mlp.experts.local_experts.\d+."
EXPERT = "decoder.layers.1.mlp.experts.local_experts."
DELTA, IN_PROJ = r"\d+.self_attention.", (64, 64, 96, 96, 8, 8)
"""Queries, keys, values, gates, rates and decays of `qwen3_next`."""

FAULTS: dict[str, Fault] = {
    # Layouts.
    "one bit of a weight": Fault("gqa", "weights", None, fp32=False, bf16=False, tensors=put(FC2, one_bit)),
    "a weight that is not a number": Fault("gqa", "weights", "layer 1 mlp", tensors=put(FC2, not_a_number)),
    "gate and up exchanged in one layer": Fault("gqa", "weights", "layer 1 mlp", tensors=put(FC1, halves)),
    "two layers exchanged": Fault(
        "gqa", "weights", "layer 1 self_attention", tensors=swap("decoder.layers.1.", "decoder.layers.2.")
    ),
    "embedding shifted by a row": Fault(
        "gqa", "weights", "embedding", tensors=put("embedding.word_embeddings.weight", lambda w: w.roll(1, 0))
    ),
    "head shifted by a row": Fault(
        "gqa", "weights", "head", tensors=put("output_layer.weight", lambda w: w.roll(1, 0))
    ),
    "bias of queries, keys and values shifted": Fault(
        "qwen2",
        "weights",
        "layer 1 self_attention",
        tensors=put("1.self_attention.linear_qkv.bias", lambda b: b.roll(1)),
    ),
    "two experts exchanged": Fault("qwen3_moe", "weights", "layer 1 mlp", tensors=swap(EXPERT + "0.", EXPERT + "1.")),
    "rows of a router shifted": Fault(
        "mixtral", "weights", "layer 1 router", tensors=put(ROUTER, lambda w: w.roll(1, 0))
    ),
    "a router one per cent larger": Fault(
        "mixtral", "weights", "layer 1 router", bf16=False, tensors=put(ROUTER, lambda w: w * 1.01)
    ),
    "a norm 0.1 per cent larger": Fault(
        "gqa", "weights", "layer 1 mlp", bf16=False, tensors=put("1.pre_mlp_layernorm.weight", lambda w: w * 1.001)
    ),
    "norms of queries and keys exchanged": Fault(
        "qwen3",
        "weights",
        "layer 1 self_attention",
        tensors=swap("decoder.layers.1.self_attention.q_layernorm", "decoder.layers.1.self_attention.k_layernorm"),
    ),
    "norm after the MLP without effect": Fault(
        "gemma3_text", "weights", "layer 1 mlp", tensors=put("1.mlp.linear_fc2.post_layernorm.weight", lambda w: w * 0)
    ),
    "padding read as vocabulary": Fault("gqa", "structure", None, raw={"vocab_size": 256}),
    "queries, keys and values not interleaved": Fault(
        "gqa", "logits", "layer 0 self_attention", tensors=put(QKV, not_interleaved)
    ),
    "keys and values exchanged": Fault(
        "gqa",
        "logits",
        "layer 0 self_attention",
        tensors=put(QKV, of_groups(lambda size: [*range(size - 2), size - 1, size - 2])),
    ),
    "queries of a group in reverse": Fault(
        "gqa",
        "logits",
        "layer 0 self_attention",
        tensors=put(QKV, of_groups(lambda size: [*reversed(range(size - 2)), size - 2, size - 1])),
    ),
    "gate and up exchanged everywhere": Fault(
        "gqa", "logits", "layer 0 mlp", tensors=put(r"\d+.mlp.linear_fc1.weight", halves)
    ),
    "layers shifted by one": Fault("gqa", "logits", "layer 0 self_attention", tensors=rotate_layers),
    "head tied to the embedding": Fault(
        "gqa",
        "logits",
        "head",
        tensors=lambda tensors: tensors.update(
            {"output_layer.weight": tensors["embedding.word_embeddings.weight"].clone()}
        ),
    ),
    # Norms.
    "eps of the norms 1e-3 for 1e-5": Fault(
        "gqa", "structure", "layer 0 self_attention", bf16=False, args={"norm_epsilon": 1e-3}
    ),
    "eps of the norms 1e-4 for 1e-5": Fault(
        "gqa", "logits", "layer 0 self_attention", bf16=False, config=of_model(norm_eps=1e-4)
    ),
    "weights of norms not zero-centred": Fault(
        "gemma3_text", "structure", "layer 0 self_attention", args={"apply_layernorm_1p": False}
    ),
    # Rotary embeddings.
    "rotary base 20000 for 10000": Fault("gqa", "structure", "layer 0 self_attention", args={"rotary_base": 20000}),
    "rotary base one per cent larger": Fault(
        "gqa",
        "logits",
        "layer 0 self_attention",
        bf16=False,
        config=of_rope(lambda rope: replace(rope, theta=rope.theta * 1.01)),
    ),
    "neighbouring channels rotated, not halves": Fault(
        "gqa", "logits", "layer 0 self_attention", tensors=put(QKV, pairs_interleaved)
    ),
    "linear scaling of positions left out": Fault(
        "gemma3_text", "logits", "layer 2 self_attention", config=of_rope(lambda rope: replace(rope, factor=1.0))
    ),
    "llama3 scaling left out": Fault(
        "llama3",
        "logits",
        "layer 0 self_attention",
        bf16=False,
        config=of_rope(lambda rope: replace(rope, kind="default")),
    ),
    "bases of local and global layers exchanged": Fault(
        "gemma3_text", "logits", "layer 0 self_attention", config=thetas_swapped
    ),
    "partial rotation left out": Fault(
        "gemma4_text-dense",
        "logits",
        "layer 1 self_attention",
        config=of_rope(lambda rope: replace(rope, kind="default") if rope.kind == "proportional" else rope),
    ),
    # Windows and masks.
    "window one wider": Fault("mistral", "structure", "layer 0 self_attention", args={"window_size": (16, 0)}),
    "window one narrower": Fault("mistral", "logits", "layer 0 self_attention", config=windows_wider(-1)),
    "windows on the wrong layers": Fault("ministral", "logits", "layer 0 self_attention", config=windows_shifted),
    "first position not seen": Fault("gqa", "logits", "layer 0 self_attention", patch=masked(first_token_hidden)),
    # Routing.
    "one expert more per token": Fault("mixtral", "structure", "layer 0 mlp", args={"moe_router_topk": 3}),
    "one expert fewer per token": Fault(
        "qwen3_moe-mixed", "logits", "layer 0 mlp", config=of_model(experts_per_token=1)
    ),
    "weights of experts not renormalised": Fault(
        "qwen3_moe", "logits", "layer 0 mlp", config=of_model(norm_topk_prob=False)
    ),
    "weights of experts renormalised": Fault(
        "qwen3_moe-mixed", "logits", "layer 0 mlp", config=of_model(norm_topk_prob=True)
    ),
    "weights of experts all the same": Fault("mixtral", "logits", "layer 0 mlp", patch=experts_before_weights),
    "scales of experts left out": Fault(
        "gemma4_text-moe", "logits", "layer 0 mlp", tensors=put(r"\d+.mlp.router.per_expert_scale", ones)
    ),
    "experts chosen by more than their logits": Fault("mixtral", "logits", None, patch=last_expert_preferred),
    "scale of a router's input left out": Fault(
        "gemma4_text-moe", "logits", "layer 0 router", tensors=put(r"\d+.mlp.router.scale", ones)
    ),
    # Heads, scales, activations.
    "sinks left out": Fault(
        "gpt_oss", "logits", "layer 0 self_attention", tensors=put(r"\d+" + SINKS, lambda sinks: sinks - 1e4)
    ),
    "sinks of other heads": Fault(
        "gpt_oss-plain", "logits", "layer 0 self_attention", tensors=put(r"\d+" + SINKS, lambda sinks: sinks.roll(1))
    ),
    "windows one layer later": Fault("gpt_oss", "logits", "layer 0 self_attention", config=windows_shifted),
    "bounds of yarn rounded": Fault(
        "gpt_oss",
        "logits",
        "layer 0 self_attention",
        bf16=False,
        config=of_rope(lambda rope: replace(rope, truncate=True)),
    ),
    "clamp of gate and up forgotten": Fault("gpt_oss", "logits", "layer 0 mlp", config=of_model(activation_clamp=None)),
    "gate and up as halves for every other row": Fault(
        "gpt_oss", "logits", "layer 0 mlp", tensors=put(EXPERTS + "linear_fc1.weight", in_turns)
    ),
    "bias behind experts lost": Fault(
        "gpt_oss", "logits", "layer 0 mlp", tensors=put(EXPERTS + "linear_fc2.bias", lambda bias: bias * 0)
    ),
    "bias behind experts added by every rank": Fault(
        "gpt_oss", "logits", "layer 0 mlp", patch=bias_added_by_every_rank, grid=TWO
    ),
    "bias of the router lost": Fault(
        "gpt_oss", "logits", "layer 0 router", tensors=put(r"\d+.mlp.router.bias", lambda bias: bias * 0)
    ),
    "parts of a DeltaNet's projection cut flat": Fault(
        "qwen3_next", "logits", "layer 0 self_attention", tensors=put(DELTA + "in_proj.weight", cut_flat(*IN_PROJ))
    ),
    "parts of a DeltaNet's convolution cut flat": Fault(
        "qwen3_next", "logits", "layer 0 self_attention", tensors=put(DELTA + "conv1d.weight", cut_flat(*IN_PROJ[:3]))
    ),
    "rates and decays of a DeltaNet exchanged": Fault(
        "qwen3_next",
        "logits",
        "layer 0 self_attention",
        tensors=put(DELTA + "in_proj.weight", parts_exchanged(4, 5, *IN_PROJ)),
    ),
    "norm of a DeltaNet one more": Fault(
        "qwen3_next", "logits", "layer 0 self_attention", tensors=put(DELTA + "out_norm.weight", lambda w: w + 1)
    ),
    "biases of decays left out": Fault(
        "qwen3_next", "logits", "layer 0 self_attention", tensors=put(DELTA + "dt_bias", lambda bias: bias * 0)
    ),
    "gates of attention exchanged with queries": Fault(
        "qwen3_next",
        "logits",
        "layer 1 self_attention",
        tensors=put(QKV, of_groups(lambda size: [3, 4, 5, 0, 1, 2, 6, 7], width=16, group=8)),
    ),
    "gates of attention left out": Fault("qwen3_next", "logits", "layer 1 self_attention", patch=gates_open),
    "gate of a shared expert left out": Fault(
        "qwen3_next", "logits", "layer 0 mlp", tensors=put(r"\d+.mlp.shared_experts.gate_weight", lambda w: w * 0)
    ),
    "scalars of layers left out": Fault(
        "gemma4_text-dense", "logits", "layer 0 output", tensors=put(r"\d+.layer_scalar", ones)
    ),
    "no cap on the logits": Fault("gemma3_text-capped", "structure", "head", raw={"final_logit_softcapping": None}),
    "cap of the logits twice as high": Fault(
        "gemma3_text-capped", "logits", "head", config=of_model(logit_softcap=10.0)
    ),
    "embedding not scaled": Fault("gemma3_text", "logits", "embedding", config=of_model(scaled_embedding=False)),
    "queries scaled by the width of a head": Fault(
        "gemma3_text", "logits", "layer 0 self_attention", config=of_model(softmax_scale=None)
    ),
    "GELU by erf for tanh": Fault(
        "gemma3_text", "logits", "layer 0 mlp", bf16=False, config=of_model(activation="gelu")
    ),
    # Parallelism and packing.
    "output projection of one tensor rank lost": Fault(
        "gqa", "weights", "layer 0 self_attention", tensors=put(PROJ, lambda w: w * 0), grid=TWO
    ),
    "packed sequences see one another": Fault("mistral", "logits", None, patch=positions_run_on, packed=True),
    "convolutions see the packed sequence before": Fault(
        "qwen3_next", "logits", None, patch=convolution_runs_on, packed=True
    ),
    "DeltaNets remember the packed sequence before": Fault(
        "qwen3_next", "logits", None, patch=memory_runs_on, packed=True
    ),
    "packed sequences begin one token late": Fault("gqa", "logits", None, patch=bound_late, packed=True),
    "zigzag forgotten": Fault("gqa", "logits", "embedding", patch=zigzag_forgotten, run=CUT),
    "positions counted on each context parallel rank": Fault(
        "gqa", "logits", "layer 0 self_attention", patch=local_positions, run=CUT
    ),
    "window one narrower at the edge of a chunk": Fault(
        "mistral", "logits", "layer 0 self_attention", patch=masked(farthest_hidden_at_the_edge), run=CUT
    ),
    "packed sequences see one another across the cut": Fault(
        "gqa", "logits", None, patch=sequence_mask_lost, packed=True, run=CUT
    ),
    # Gradients.
    "gradients of norms not summed under sequence parallelism": backwards(
        "gqa",
        "model.layers.0.input_layernorm.weight",
        left_out("_allreduce_non_tensor_model_parallel_grads"),
        grid=TWO,
        run={"sequence_parallel": True},
    ),
    "gradients of norms summed twice": backwards(
        "gqa",
        "model.layers.0.input_layernorm.weight",
        twice("_allreduce_non_tensor_model_parallel_grads"),
        grid=TWO,
        run={"sequence_parallel": True},
    ),
    "gradients of norms of queries and keys not summed": backwards(
        "qwen3",
        "model.layers.0.self_attn.k_norm.weight",
        left_out("_allreduce_non_tensor_model_parallel_grads"),
        grid=TWO,
    ),
    "tied gradients of first and last stage not summed": backwards(
        "tied", "model.embed_tokens.weight", left_out("_allreduce_word_embedding_grads"), grid=Parallelism(1, 2)
    ),
    "tied gradients summed twice": backwards(
        "tied", "model.embed_tokens.weight", twice("_allreduce_word_embedding_grads"), grid=Parallelism(1, 2)
    ),
    "gradients of replicas not summed": backwards("gqa", "lm_head.weight", replicas_not_summed, run={"dp": 2}),
    "values of attention cut off": backwards("gqa", "model.layers.0.self_attn.v_proj.weight", values_detached),
    "gradients of gated norms not summed": backwards(
        "qwen3_5_text", "model.layers.0.linear_attn.norm.weight", gated_norms_not_summed, grid=TWO
    ),
    "decays of DeltaNets cut off": backwards("qwen3_next", "model.layers.0.linear_attn.A_log", decays_detached),
    "sinks cut off": backwards("gpt_oss", "model.layers.0.self_attn.sinks", sinks_detached),
    "gradients of the bias behind experts summed over tensor ranks": backwards(
        "gpt_oss",
        "model.layers.0.mlp.experts.0.down_proj.bias",
        bias_summed_over_ranks,
        grid=TWO,
        run={"sequence_parallel": True},
    ),
    "keys and values for later layers cut off": backwards(
        "gemma4_text-e2b", "model.layers.2.self_attn.v_proj.weight", shared_detached
    ),
    "weights of experts cut off": backwards(
        "mixtral", "model.layers.0.block_sparse_moe.gate.weight", weights_of_experts_detached
    ),
    "padding of the vocabulary in the loss": backwards(
        "gqa", "lm_head.weight", padding_counted, tensors=put("output_layer.weight", padding_trained)
    ),
    "gradients of context parallel ranks not summed": backwards("gqa", "lm_head.weight", replicas_not_summed, run=CUT),
    "gradients of context parallel ranks summed twice": backwards(
        "gqa", "lm_head.weight", context_summed_twice, run=CUT
    ),
    "gradients of keys and values not summed over the cut": backwards(
        "mistral", "model.layers.0.self_attn.k_proj.weight", keys_not_summed, run=CUT
    ),
    "gradients of FSDP2 averaged": backwards(
        "gqa", "lm_head.weight", averaged_by_fsdp2, run={"dp": 2, "dp_kind": "fsdp2"}
    ),
    "gradients of norms not summed under FSDP2": backwards(
        "gqa",
        "model.layers.0.input_layernorm.weight",
        marks_lost_by_fsdp2,
        grid=TWO,
        run={"sequence_parallel": True, "dp_kind": "fsdp2"},
    ),
    "gradients of a value head not summed under sequence parallelism": backwards(
        "gqa-value", "score.weight", value_head_not_marked, grid=TWO, run={"sequence_parallel": True}
    ),
    "values learn from the tokens before them": backwards("gqa-value", "score.weight", targets_late),
    "prompts in the loss": backwards("gqa", "lm_head.weight", prompts_learned),
}


# In the ranks ---------------------------------------------------------------------------------------------------------

_patched: list[tuple[Any, str, Any]] = []


def __getattr__(name: str) -> Callable[[str], Any]:
    """The opener that puts the fault `name` into what it opens; any other name is an AttributeError."""
    if name not in FAULTS:
        raise AttributeError(name)
    return functools.partial(_open, FAULTS[name])


def sound(path: str) -> Any:
    """Opens a checkpoint without any fault, and takes back what the last one did to this process."""
    from ckptkit import open_checkpoint

    while _patched:
        thing, attribute, original = _patched.pop()
        setattr(thing, attribute, original)
    return open_checkpoint(path)


def _open(fault: Fault, path: str) -> Any:
    checkpoint = sound(path)
    if fault.sits != "reading":
        return checkpoint
    if fault.config is not None:
        checkpoint = replace(checkpoint, config=fault.config(checkpoint.config))
    for (thing, attribute), new in (fault.patch() if fault.patch is not None else {}).items():
        _patched.append((thing, attribute, getattr(thing, attribute)))
        setattr(thing, attribute, new)
    return Misread(checkpoint, fault) if fault.tensors is not None else checkpoint


class Misread:
    """A checkpoint whose shards arrive changed."""

    def __init__(self, checkpoint: Any, fault: Fault) -> None:
        self._checkpoint, self._fault = checkpoint, fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def without_prediction(self) -> Misread:
        return Misread(self._checkpoint.without_prediction(), self._fault)

    def shard(self, **place: Any) -> Tensors:
        tensors: Tensors = self._checkpoint.shard(**place)
        assert self._fault.tensors is not None
        self._fault.tensors(tensors)
        return tensors


def damage(candidate: Path, fault: Fault) -> None:
    """Puts a fault of a file or a claim where it belongs; of several ranks' files only the last is damaged."""
    from tests.megatron.test_families_against_transformers import lie, rewrite, shards

    if fault.sits == "file" and fault.tensors is not None:
        change = fault.tensors
        rewrite(shards(candidate)[-1], lambda content: change(content["model"]))
    elif fault.sits == "claim":
        lie(candidate, fault.args, fault.raw)
