"""Forwards and backwards as Megatron trains: its schedules, its DistributedDataParallel, its reduction of gradients.

    training = Training(pipeline)
    loss, tokens = training.run(microbatches)  # each data parallel rank's own
    training.gradients(0)["decoder.layers.0.mlp.linear_fc2.weight"]  # of this rank's first chunk, reduced

The loss is that of the next token, or of a value model the squared difference of its values from given targets. It is
summed over the tokens that count, and divided by their number over all microbatches and data parallel ranks; so are the
gradients. The losses of layers of multi-token prediction are added before that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func

from ckptkit.errors import UsageError, VerificationError
from ckptkit.megatron import DDP, DP_KINDS, FSDP2
from ckptkit.megatron.compat import trains_on
from ckptkit.megatron.context_parallel.share import Share
from ckptkit.megatron.fully_sharded import FullySharded, whole
from ckptkit.megatron.model import CausalModel, expected_tensors
from ckptkit.megatron.moe import routers
from ckptkit.megatron.packed_inputs.batch import PackedBatch
from ckptkit.megatron.pipeline import Pipeline
from ckptkit.megatron.stand_ins import replaced
from ckptkit.tables.prediction import of_0_16


@dataclass(frozen=True, eq=False)
class Microbatch:
    """Rows that go through the model together.

    Attributes:
        tokens: Token ids, int64 [batch, sequence]; packed rows are [1, tokens].
        labels: The token that follows each one, of the same shape; of no meaning where it does not count.
        counted: Whether a position counts in the loss, of the same shape.
        packed: The sequences of a packed row, or None.
        targets: What a value model should give, floating point, of the same shape; None for a language model.
        experts: Global layer number -> experts that the tokens are routed to, int64 [batch, sequence, experts per
            token]; empty for the routers' own choice.
        params: What layers are told of the sequences, once it is known what this rank's share is.
        weights: Factors of the losses of the positions, float32 of the shape of `tokens`; None for ones. The loss is
            still divided by the number of positions that count.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    counted: torch.Tensor
    packed: PackedBatch | None = None
    targets: torch.Tensor | None = None
    experts: dict[int, torch.Tensor] = field(default_factory=dict)
    params: PackedSeqParams | None = None
    weights: torch.Tensor | None = None

    def shared_out(self, chunks: Sequence[CausalModel], device: torch.device) -> Microbatch:
        """This context parallel rank's share, on its device."""
        share = Share.of(chunks, self.tokens.size(1), self.packed, device)
        return replace(
            self,
            tokens=share.part(self.tokens).to(device),
            labels=share.part(self.labels).to(device),
            counted=share.part(self.counted).to(device),
            targets=None if self.targets is None else share.part(self.targets).to(device),
            experts=share.experts(self.experts, self.tokens.size(1)),
            params=share.params,
            weights=None if self.weights is None else share.part(self.weights).to(device),
        )


class Training:
    """One rank's part of a model that is trained together with the other ranks.

    Args:
        pipeline: The loaded model.
        trained: For each chunk the names of its parameters that have a gradient; None for all of them.
        kind: Wrapper of the chunks: `ddp` (megatron-core's DistributedDataParallel) or `fsdp2`.

    Attributes:
        pipeline: As given.
        chunks: The chunks, wrapped for data parallelism.
    """

    def __init__(self, pipeline: Pipeline, trained: Sequence[Collection[str]] | None = None, kind: str = DDP) -> None:
        self.pipeline = pipeline
        if trained is not None:
            for chunk, names in zip(pipeline.chunks, trained, strict=True):
                for name, parameter in chunk.named_parameters():
                    parameter.requires_grad_(of_0_16(name) in names)
        config = pipeline.chunks[0].config
        _check_wire(pipeline)
        config.calculate_per_token_loss = True
        config.finalize_model_grads_func = _finalised(pipeline.chunks[0].mtp_layers)
        config.variable_seq_lengths = True  # every microbatch is as long as its rows
        with trains_on(pipeline.device):
            self.chunks = [_wrapped(kind, chunk.train(), pipeline.device) for chunk in pipeline.chunks]

    def run(self, batches: Sequence[Microbatch], *, backwards: bool = True) -> tuple[float, int]:
        """All microbatches forwards, and backwards; gradients of a run before are forgotten.

        All ranks call this with as many microbatches; those of one data parallel rank are given to all its tensor and
        pipeline parallel ranks, and to all its context parallel ranks, which take their part. With virtual stages their
        number is a multiple of the pipeline parallel size.

        Args:
            batches: The microbatches of this data parallel rank.
            backwards: Whether gradients are wanted.

        Returns:
            The loss per token that counts, over all data parallel ranks, and the number of those tokens.

        Raises:
            UsageError: A value model has no targets, or a language model has some.
        """
        self._check_targets(batches)
        device = self.pipeline.device
        batches = [batch.shared_out(self.pipeline.chunks, device) for batch in batches]
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        with trains_on(device), ExitStack() as stack:
            for chunk in self.pipeline.chunks:
                stack.enter_context(_only_vocabulary(chunk, self.pipeline.vocab_size))
                stack.enter_context(_inputs_with_gradient(chunk))
                stack.enter_context(_routed(chunk, batches))
            found = get_forward_backward_func()(
                forward_step_func=self._forward,
                data_iterator=[iter(batches) for _ in self.chunks],
                model=self.chunks,
                num_microbatches=len(batches),
                seq_length=max(batch.tokens.size(1) for batch in batches),
                micro_batch_size=batches[0].tokens.size(0),
                forward_only=not backwards,
            )
        for chunk in self.pipeline.chunks:
            _forget(chunk)
        return self._loss(found)

    def _forward(
        self, batches: Iterator[Microbatch], chunk: Any
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, tuple[float, int]]]]:
        batch, predicts = next(batches), self.pipeline.chunks[0].mtp_layers > 0

        def loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple[float, int]]:
            losses = output if batch.targets is None else _squared_errors(output, batch.targets)
            # Where nothing counts the label may be one that has no loss at all.
            weighed = losses if batch.weights is None else losses * batch.weights
            total = weighed.sum() if predicts else torch.where(batch.counted, weighed, 0.0).sum()
            number = batch.counted.sum().to(torch.int)
            return total, number, (float(total.detach()), int(number))

        tokens = batch.tokens
        positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
        labels = batch.labels if batch.targets is None else None  # without labels the output is that of the head
        options = {"counted": batch.counted} if predicts else {}
        return chunk(tokens, positions, None, labels=labels, packed_seq_params=batch.params, **options), loss

    def _check_targets(self, batches: Sequence[Microbatch]) -> None:
        value = self.pipeline.chunks[0].value_head
        if all((batch.targets is not None) == value for batch in batches):
            return
        if value:
            raise UsageError("a value model has no next-token loss", hint="give the values that it should have")
        raise UsageError("a language model has no values that could have targets")

    def _loss(self, found: Sequence[tuple[float, int]]) -> tuple[float, int]:
        """Loss and tokens of all microbatches, data and context parallel ranks, on every rank."""
        sums = [sum(loss for loss, _ in found), float(sum(number for _, number in found))]
        totals = torch.tensor(sums, dtype=torch.float64, device=self.pipeline.device)
        dist.all_reduce(totals, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        dist.all_reduce(totals, group=parallel_state.get_pipeline_model_parallel_group())
        loss, number = totals.tolist()
        return loss / max(1.0, number), int(number)

    def parameters(self) -> list[torch.nn.Parameter]:
        """All parameters that have a gradient."""
        return [parameter for chunk in self.chunks for parameter in chunk.parameters() if parameter.requires_grad]

    def gradients(self, number: int) -> dict[str, torch.Tensor]:
        """The reduced gradients of a chunk: name -> gradient, zeros for what has none; not copied.

        What FSDP2 has sharded is gathered, so all ranks call this.

        Args:
            number: Virtual stage of the chunk.
        """
        return {name: _gradient(value) for name, value in expected_tensors(self.pipeline.chunks[number]).items()}


def _squared_errors(values: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Squared differences [batch, sequence] of values [batch, sequence, 1] from their targets, in float32 or wider."""
    values = values.float().squeeze(-1)
    return (values - targets.to(values.dtype)).square()


def _check_wire(pipeline: Pipeline) -> None:
    """Whether megatron-core's schedules can send from stage to stage.

    Raises:
        VerificationError: They cannot.
    """
    if pipeline.grid.pp > 1 and pipeline.device.type == "cuda" and dist.get_backend() == "gloo":
        raise VerificationError(
            "gloo does not send tensors on GPUs from stage to stage, as megatron-core's schedules want it to",
            hint="use a GPU for each rank, where NCCL does, or --device cpu",
        )


def _gradient(value: torch.Tensor) -> torch.Tensor:
    if not value.requires_grad:
        return torch.zeros_like(whole(value.detach()))
    found = gradient_of(value)
    return torch.zeros_like(whole(value.detach())) if found is None else whole(found)


def gradient_of(parameter: torch.Tensor) -> torch.Tensor | None:
    """The reduced gradient of a parameter: where DDP keeps it, or where FSDP2 does; None if FSDP2 has none."""
    found: torch.Tensor | None = getattr(parameter, "main_grad", parameter.grad)
    return found


def _finalised(mtp_layers: int) -> Callable[..., None]:
    """megatron-core's `finalize_model_grads`, told of layers of multi-token prediction.

    Only then does it add up the gradients of the two copies of the embedding. In a forward pass, where our model runs
    these layers, no config may speak of them.
    """

    def finalise(model: Sequence[Any], *args: Any, **options: Any) -> None:
        with replaced([(model[0].config, "mtp_num_layers", mtp_layers or None)]):
            finalize_model_grads(model, *args, **options)

    return finalise


def _wrapped(kind: str, chunk: CausalModel, device: torch.device) -> Any:
    if kind == FSDP2:
        return FullySharded(chunk, device)
    if kind != DDP:
        raise UsageError(f"no data parallelism by {kind!r}", hint=f"choose {' or '.join(DP_KINDS)}")
    half = chunk.config.params_dtype in (torch.bfloat16, torch.float16)
    return DistributedDataParallel(chunk.config, DistributedDataParallelConfig(grad_reduce_in_fp32=half), chunk)


def _forget(chunk: CausalModel) -> None:
    """Drops what dispatchers of tokens keep of the last forward pass.

    It ends the graph of that pass, in which hooks of the gradients refer to the chunk again: a circle through C++,
    which no garbage collector sees. The chunk and all its process groups, with their threads, would stay.
    """
    for module in chunk.modules():
        dispatcher = getattr(module, "token_dispatcher", None)
        if dispatcher is None:
            continue
        for name, value in list(vars(dispatcher).items()):
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                setattr(dispatcher, name, None)


@contextmanager
def _only_vocabulary(chunk: CausalModel, vocab_size: int) -> Iterator[None]:
    """Takes the rows that pad the vocabulary out of the softmax: the model that is compared with has none."""
    if not chunk.post_process or chunk.value_head:
        yield
        return
    head: Any = chunk.output_layer

    def hide(module: torch.nn.Module, inputs: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        logits, bias = output
        width = logits.size(-1)
        first = width * parallel_state.get_tensor_model_parallel_rank()
        if first + width <= vocab_size:
            return output
        padding = torch.arange(first, first + width, device=logits.device) >= vocab_size
        return logits.masked_fill(padding, float("-inf")), bias

    handle = head.register_forward_hook(hide)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _inputs_with_gradient(chunk: CausalModel) -> Iterator[None]:
    """Lets what follows a frozen embedding have gradients: schedules go back through every stage, as recompute does."""
    if not chunk.pre_process:
        yield
        return

    def mark(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        needed = torch.is_grad_enabled() and not output.requires_grad
        return output.requires_grad_() if needed else output

    handle = chunk.embedding.register_forward_hook(mark)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _routed(chunk: CausalModel, batches: Sequence[Microbatch]) -> Iterator[None]:
    """Prescribes the experts of every microbatch.

    The schedules let each chunk see the microbatches in their order, and go backwards in that order, too. What is
    recomputed runs a second time, with gradients, when later microbatches may have run forwards.
    """
    handles, found = [], routers([chunk])
    recompute = chunk.config.recompute_granularity is not None

    def turns(layer: int) -> Callable[[Any, Any], None]:
        first, again = iter(batches), iter(batches)

        def prescribe(router: Any, inputs: Any) -> None:
            batch = next(again if recompute and torch.is_grad_enabled() else first)
            router.replay = batch.experts[layer] if batch.experts else None

        return prescribe

    for layer, router in found.items():
        handles.append(router.register_forward_pre_hook(turns(layer)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for router in found.values():
            router.replay = None
