"""A run that goes backwards in transformers."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F

from ckptkit.verification.delta_nets import rounded_once
from ckptkit.verification.prediction import Prediction
from ckptkit.verification.ranks.jobs import LogitsJob, TrainingPart
from ckptkit.verification.reference import OTHER_ATTENTION, outputs_of, use_attention, with_model
from ckptkit.verification.routing import Record, hf_routers, hf_routing, read_experts
from ckptkit.verification.run_options import PREDICTION_WEIGHT
from ckptkit.verification.tokens import group_by_length
from ckptkit.verification.training import files
from ckptkit.verification.training.batches import counted, tokens_that_count, values_to_learn
from ckptkit.verification.training.factors import is_factor, stored_name
from ckptkit.verification.training.names import trace
from ckptkit.verification.training.optimizers import make_optimizer


def train_reference(job: LogitsJob, part: TrainingPart) -> dict[str, Any]:
    """Runs the rows forwards and backwards in transformers, and takes the steps that are asked for.

    Args:
        job: The rows, and how they run; it has no grid here.
        part: What is to be done.

    Returns:
        `losses` before each step and after the last one, `tokens` that count, `padding` (name of an embedding in memory
        -> its `padding_idx`), `shapes` of all tensors by their names in memory (with an adapter both are empty), and
        whether there is the attention that was asked for (`found`).

    Raises:
        CkptkitError: As `reference.with_model`.
    """
    return with_model(job, lambda model: _ReferenceTraining(model, job, part).run())


class _ReferenceTraining:
    """A loaded model, and what to do with it."""

    def __init__(self, model: Any, job: LogitsJob, part: TrainingPart) -> None:
        self.model, self.job, self.part = model, job, part
        self.value = hasattr(model, "score")
        count = job.prediction
        self.prediction = Prediction(model, job.checkpoint, count, job.rounded) if count else None
        further = [] if self.prediction is None else [layer.mtp_block for layer in self.prediction.model.layers]
        self.routers = hf_routers(model, further) if job.routing or job.replay else {}
        self.total = tokens_that_count(job.rows)
        of_length = group_by_length(job.rows)
        self.places = {at: place for numbers in of_length.values() for place, at in enumerate(numbers)}

    def run(self) -> dict[str, Any]:
        if not use_attention(self.model, self.part.attention):
            return {"losses": [], "tokens": 0, "padding": {}, "found": False, "shapes": {}}
        if self.prediction is not None:
            self.prediction.use_attention(self.part.attention)
        # Gated DeltaNets have no other implementation: theirs is another place to round at.
        with rounded_once(self.model) if self.part.attention == OTHER_ATTENTION else contextlib.nullcontext():
            return self._run()

    def _run(self) -> dict[str, Any]:
        padding = _take_padding(self.model)
        self._freeze()
        named = {name: parameter for name, parameter in self._parameters().items() if parameter.requires_grad}
        shapes = self._shapes() if self.job.adapter is None else {}
        optimizer = make_optimizer(self.job.options, named.values()) if self.part.steps else None
        before = {name: value.detach().clone() for name, value in named.items()} if self.part.steps else {}
        losses = []
        for step in range(self.part.steps + 1):
            last = step == self.part.steps
            loss, gradients = self._backwards(step, named, backwards=step == 0 or not last)
            losses.append(loss)
            if step == 0:
                self._write(files.GRADIENTS, gradients)
            if optimizer is not None and not last:
                for name, parameter in named.items():
                    parameter.grad = gradients.get(name)
                optimizer.step()
                optimizer.zero_grad()
        if self.part.steps:
            self._write(files.UPDATES, {name: value.detach() - before[name] for name, value in named.items()})
        return {
            "losses": losses,
            "tokens": self.total,
            "padding": padding if shapes else {},
            "found": True,
            "shapes": shapes,
        }

    def _parameters(self) -> dict[str, torch.nn.Parameter]:
        """Those of the model, and of its layers of multi-token prediction as if it had them."""
        further = {} if self.prediction is None else self.prediction.tensors()
        named = {name: value for name, value in further.items() if isinstance(value, torch.nn.Parameter)}
        return {**dict(self.model.named_parameters()), **named}

    def _shapes(self) -> dict[str, list[int]]:
        """Name in memory -> shape of all of its tensors, buffers included."""
        further = {} if self.prediction is None else self.prediction.tensors()
        return {**_shapes(self.model), **{name: list(value.shape) for name, value in further.items()}}

    def _freeze(self) -> None:
        named = self._parameters()
        if self.job.adapter is not None:
            for name, parameter in named.items():
                parameter.requires_grad_(is_factor(name))
            return
        if self.part.trained is None:
            return
        trained = trace(self.job.checkpoint, self._shapes()).made_of(self.part.trained)
        for name, parameter in named.items():
            parameter.requires_grad_(name in trained)

    def _backwards(
        self, step: int, named: dict[str, torch.nn.Parameter], backwards: bool
    ) -> tuple[float, dict[str, torch.Tensor]]:
        """The loss per token that counts, and the gradients of it, summed over the rows in float32 or wider."""
        record, loss = Record(), 0.0
        prescribed = read_experts(files.routing_of(self.job.replay, step)) if self.job.replay else {}
        sums: dict[str, torch.Tensor] = {}
        for number, row in enumerate(self.job.rows):
            place = self.places[number]
            experts = {layer: e[place : place + 1] for layer, e in prescribed.get(len(row), {}).items()} or None
            with hf_routing(self.routers, 1, len(row), record, experts), torch.set_grad_enabled(backwards):
                part = self._loss(row)
            loss += float(part.detach())
            if not backwards or not part.requires_grad:
                continue
            part.backward()
            for name, parameter in named.items():
                if parameter.grad is not None:
                    wide = parameter.grad if parameter.dtype == torch.float64 else parameter.grad.float()
                    sums[name] = sums[name] + wide if name in sums else wide
                    parameter.grad = None
        if self.job.routing:
            record.save(files.routing_of(self.job.routing, step))
        return loss, sums

    def _loss(self, row: list[int]) -> torch.Tensor:
        """This row's part of the loss per token that counts."""
        tokens = torch.tensor([row], device=self.model.device)
        counts = torch.tensor(counted(row), device=tokens.device)
        if self.prediction is not None:
            every = self.prediction.every_logits(tokens)
            own, *further = (
                _next_token_loss(logits[0], tokens[0], counts, after) for after, logits in enumerate(every)
            )
            return (own + PREDICTION_WEIGHT * torch.stack(further).mean()) / max(1, self.total)
        outputs = outputs_of(self.model, tokens)[0].float()
        if self.value:
            wanted = torch.tensor(values_to_learn(row), dtype=outputs.dtype, device=outputs.device)
            losses = F.mse_loss(outputs[:-1, 0], wanted[:-1], reduction="none")
            return (losses * counts[:-1]).sum() / max(1, self.total)
        return _next_token_loss(outputs, tokens[0], counts) / max(1, self.total)

    def _write(self, kind: str, tensors: dict[str, torch.Tensor]) -> None:
        if self.job.adapter is not None:
            tensors = {stored_name(name): tensor for name, tensor in tensors.items()}
        files.write(self.part.folder, kind, files.WHOLE, tensors)


def _next_token_loss(logits: torch.Tensor, row: torch.Tensor, counts: torch.Tensor, after: int = 0) -> torch.Tensor:
    """The sum of the losses of a row, in float32 or wider.

    Args:
        logits: [sequence, vocabulary].
        row: Token ids, int64 [sequence].
        counts: Whether a position counts, of the same shape.
        after: How many tokens further on the logits are: they predict the token after the one so many after theirs,
            and count if that one's do.
    """
    last = max(0, len(row) - 1 - after)
    losses = F.cross_entropy(logits[:last].float(), row[1 + after :], reduction="none")
    return (losses * counts[after : after + last]).sum()


def _shapes(model: Any) -> dict[str, list[int]]:
    """Name in memory -> shape of parameters and persistent buffers; a tied one has the name of its parameter only."""
    named = dict(model.named_parameters())
    own = {id(parameter) for parameter in named.values()}
    return {
        name: list(value.shape)
        for name, value in model.state_dict(keep_vars=True).items()
        if name in named or id(value) not in own
    }


def _take_padding(model: Any) -> dict[str, int]:
    """Lets padding tokens have gradients, as in Megatron: name of an embedding -> the row that had none."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            found[f"{name}.weight"] = module.padding_idx
            module.padding_idx = None
    return found
