"""One rank's part of a run that goes backwards in megatron-core."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.megatron.context_parallel.share import multiple_of
from ckptkit.megatron.fully_sharded import whole
from ckptkit.megatron.model import CausalModel, expected_tensors
from ckptkit.megatron.moe import routers
from ckptkit.megatron.pipeline import Pipeline
from ckptkit.megatron.replicas import seat
from ckptkit.megatron.training import Microbatch, Training, gradient_of
from ckptkit.sharding.grid import Parallelism, Rank
from ckptkit.sharding.stages import split_layers
from ckptkit.tables.prediction import of_0_16
from ckptkit.verification.ranks.adapters import open_laid_out
from ckptkit.verification.ranks.jobs import LogitsJob, TrainingPart, find, open_model
from ckptkit.verification.ranks.what_ran import Observer, count_modules
from ckptkit.verification.reports.report import installed_versions
from ckptkit.verification.routing import can_replay, read_experts
from ckptkit.verification.training import files
from ckptkit.verification.training.batches import Sharing, values_to_learn
from ckptkit.verification.training.optimizers import make_optimizer


def train(job: LogitsJob, part: TrainingPart, pipeline: Pipeline, rank: int) -> dict[str, Any]:
    """Runs the rows forwards and backwards, and takes the steps that are asked for.

    Args:
        job: The job, the same on all its ranks.
        part: What it is to do.
        pipeline: This rank's part of the model.
        rank: Global rank.

    Returns:
        `losses` before each step and after the last one, `tokens` that count, `moved` (names of tensors that changed
        although they are not trained), `stray` (names of parameters that have gradients although they are not), and
        what `Run` has of a rank.
    """
    return _RankTraining(job, part, pipeline, rank).run()


class _RankTraining:
    """A rank's part of the model, and what it is to do."""

    def __init__(self, job: LogitsJob, part: TrainingPart, pipeline: Pipeline, rank: int) -> None:
        self.job, self.part, self.pipeline = job, part, pipeline
        self.seat = seat(job.run.grid, job.run.copies, rank)
        self.trained = self._trained()
        self.training = Training(pipeline, self.trained, job.run.dp_kind)
        self.moved: list[str] = []
        self.observer = Observer(replace(pipeline, replicated=self.training.chunks), passes=1)

    def run(self) -> dict[str, Any]:
        start = time.monotonic()
        losses = []
        with self.observer.watching():
            loss, tokens = self._run(0)
            losses.append(loss)
            stray = self._stray()
            self._write(files.GRADIENTS, self.training.gradients)
            if self.part.steps:
                losses += self._steps()
        return {
            "losses": losses,
            "tokens": tokens,
            "moved": self.moved,
            "stray": stray,
            "modules": count_modules(self.pipeline.chunks),
            "seen": [self.observer.seen],
            "versions": installed_versions(),
            "seconds": {"run": time.monotonic() - start},
        }

    def _steps(self) -> list[float]:
        """The losses before each further step, and after the last one; what they changed is written."""
        before = [_copies(chunk) for chunk in self.pipeline.chunks]
        parameters = self.training.parameters()
        optimizer = make_optimizer(self.job.options, parameters) if parameters else None
        losses = []
        for step in range(1, self.part.steps + 1):
            for parameter in parameters:
                parameter.grad = gradient_of(parameter)
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(self._run(step, backwards=step < self.part.steps)[0])
        updates = [
            {name: value - own[name] for name, value in _copies(chunk).items()}
            for chunk, own in zip(self.pipeline.chunks, before, strict=True)
        ]
        self.moved = sorted(
            name for number, own in enumerate(updates) for name in self._untrained(number) if own[name].any()
        )
        self._write(files.UPDATES, updates.__getitem__)
        return losses

    def _run(self, step: int, backwards: bool = True) -> tuple[float, int]:
        batches = self._batches(step)
        self.observer.expect(batches[0].tokens.size(1))
        return self.training.run(batches, backwards=backwards)

    def _batches(self, step: int) -> list[Microbatch]:
        run = self.job.run
        experts = read_experts(files.routing_of(self.job.replay, step)) if self.job.replay else {}
        if not all(can_replay(chosen, routers(self.pipeline.chunks)) for chosen in experts.values()):
            experts = {}
        sharing = Sharing(
            ranks=parallel_state.get_data_parallel_world_size(),
            rank=parallel_state.get_data_parallel_rank(),
            multiple=run.grid.pp if run.grid.vpp > 1 else 1,
            split=multiple_of(run.grid.tp if run.sequence_parallel else 1),
            cut=run.cp > 1,
            capacity=run.capacity if run.packed else None,
        )
        targets = [values_to_learn(row) for row in self.job.rows] if self.pipeline.chunks[0].value_head else None
        return sharing.deal(self.job.rows, experts, targets)

    def _trained(self) -> list[set[str]] | None:
        """For each chunk the names of its parameters that are trained; None for all: those of an adapter, if any."""
        job, wanted = self.job, self.part.trained
        if job.adapter is None and wanted is None:
            return None
        opener = find(job.opener)
        checkpoint = open_model(opener, job.checkpoint, job.opening, job.adapter, job.prediction)
        if job.adapter is not None:
            checkpoint = open_laid_out(job.adapter, checkpoint, job.run.grid, opener).checkpoint
        return trained_names(checkpoint, wanted, job.run.grid, self.seat.place)

    def _stray(self) -> list[str]:
        """Names of parameters that have a gradient although they are not trained."""
        if self.trained is None:
            return []
        return sorted(
            name
            for chunk, trained in zip(self.pipeline.chunks, self.trained, strict=True)
            for name, parameter in chunk.named_parameters()
            if of_0_16(name) not in trained
            and any(getattr(parameter, kind, None) is not None for kind in ("grad", "main_grad"))
        )

    def _untrained(self, number: int) -> list[str]:
        """Names of a chunk's tensors that are not trained, buffers included."""
        tensors = expected_tensors(self.pipeline.chunks[number])
        return [name for name, value in tensors.items() if not value.requires_grad]

    def _write(self, kind: str, tensors: Callable[[int], dict[str, torch.Tensor]]) -> None:
        """Writes what every chunk has. Only the first of the replicas does: all of them are equal."""
        for number in range(len(self.pipeline.chunks)):
            found = tensors(number)  # of all replicas: FSDP2's gather what they share
            if self.seat.replica:
                continue
            if self.job.adapter is not None and self.trained is not None:
                found = {name: found[name] for name in self.trained[number]}
            files.write(self.part.folder, kind, files.chunk_file(self.seat.place, number), found)


def trained_names(
    checkpoint: Checkpoint, trained: Collection[str] | None, grid: Parallelism, here: Rank
) -> list[set[str]]:
    """For each chunk of a rank the names of its parameters that are trained.

    Args:
        checkpoint: The model, or its adapter.
        trained: Canonical names of what is trained; None for all.
        grid: The grid.
        here: The rank's place there.
    """
    spelling = checkpoint.family.spelling("local", text=True)
    return [
        {name for key, name in checkpoint.names_on(stage, here, grid, spelling) if trained is None or key in trained}
        for stage in split_layers(checkpoint.config.num_layers, grid)
        if stage.pp_rank == here.pp
    ]


def _copies(chunk: CausalModel) -> dict[str, torch.Tensor]:
    return {name: whole(value.detach()).clone() for name, value in expected_tensors(chunk).items()}
