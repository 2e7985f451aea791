"""One rank's part of a run that learns."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from ckptkit.megatron.context_parallel.share import multiple_of
from ckptkit.megatron.model import CausalModel, expected_tensors
from ckptkit.megatron.pipeline import Pipeline
from ckptkit.megatron.replicas import seat
from ckptkit.megatron.training import Microbatch, Training
from ckptkit.sharding.stages import split_layers
from ckptkit.steps import Counted, Step, Tell
from ckptkit.verification.ranks.jobs import LogitsJob, TrainabilityPart, find, open_model
from ckptkit.verification.ranks.what_ran import Observer, count_modules
from ckptkit.verification.reports.report import installed_versions
from ckptkit.verification.trainability.goal import (
    GROUP,
    SEEDS,
    SHARE,
    advantages_of,
    error_of,
    prompts_of,
    rewards_of,
)
from ckptkit.verification.trainability.sampling import Completions, NotFiniteError, sample
from ckptkit.verification.training.batches import Sharing
from ckptkit.verification.training.candidate import trained_names
from ckptkit.verification.training.optimizers import Masters

EXPERT = ".experts.local_experts."
"""In names: the number of the expert follows."""
EVALUATION = -1
"""The step whose prompts and draws an evaluation has."""


@dataclass
class Learnt:
    """What came of a run, the same on every rank.

    Attributes:
        initial_error: Mean distance from the target before the first step, in tokens.
        final_error: The same after the last one, over the same prompts and draws; None if it was not reached.
        errors: Mean distance of what each step sampled, before it.
        lengths: Mean length of what each step sampled.
        varied: Share of the prompts of each step whose completions differ in their reward.
        losses: Loss of each step.
        sampled: Tokens that were sampled.
        finite: Whether all logits, losses and gradients were numbers.
    """

    initial_error: float = 0.0
    final_error: float | None = None
    errors: list[float] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)
    varied: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    sampled: int = 0
    finite: bool = True


def learn(job: LogitsJob, part: TrainabilityPart, pipeline: Pipeline, rank: int, tell: Tell) -> dict[str, Any]:
    """Samples, rewards and takes steps, until the error is small enough or the steps are used up.

    Args:
        job: The job, the same on all its ranks.
        part: What it is to do.
        pipeline: This rank's part of the model.
        rank: Global rank.
        tell: Told which step it is.

    Returns:
        The fields of `Learnt`; by canonical names `silent` (what never had a gradient), `idle` (experts of that kind
        beside others that had), `still` (what had one and did not move), `moved` (what is not trained and moved) and
        `prints` (see `_Learner._prints`); and what `Run` has of a rank.
    """
    return _Learner(job, part, pipeline, rank, tell).run()


class _Learner:
    """A rank's part of the model, and what it is to learn."""

    def __init__(self, job: LogitsJob, part: TrainabilityPart, pipeline: Pipeline, rank: int, tell: Tell) -> None:
        self.job, self.part, self.pipeline, self.tell = job, part, pipeline, tell
        self.seat = seat(job.run.grid, job.run.copies, rank)
        grid, place = job.run.grid, self.seat.place
        self.checkpoint = open_model(find(job.opener), job.checkpoint, job.opening, None)
        self.spelling = self.checkpoint.family.spelling("local", text=True)
        stages = [stage for stage in split_layers(self.checkpoint.config.num_layers, grid) if stage.pp_rank == place.pp]
        self.names = [
            {name: key for key, name in self.checkpoint.names_on(stage, place, grid, self.spelling)} for stage in stages
        ]
        parameters = [{name for name, _ in chunk.named_parameters()} for chunk in pipeline.chunks]
        wanted = trained_names(self.checkpoint, part.trained, grid, place)
        self.trained = [chosen & there for chosen, there in zip(wanted, parameters, strict=True)]
        self.before = [_copies(chunk) for chunk in pipeline.chunks]
        self.training = Training(pipeline, None if part.trained is None else self.trained)
        self.masters = Masters(self.training.parameters(), part.rate)
        self.largest = [dict.fromkeys(names, 0.0) for names in self.trained]
        self.learnt = Learnt()
        self.observer = Observer(replace(pipeline, replicated=self.training.chunks), passes=1)

    def run(self) -> dict[str, Any]:
        start = time.monotonic()
        try:
            self._learn()
        except NotFiniteError:
            self.learnt.finite = False
        return {
            **asdict(self.learnt),
            **self._gradients(),
            **self._movements(),
            "prints": self._prints(),
            "modules": count_modules(self.pipeline.chunks),
            "seen": [self.observer.seen],
            "versions": installed_versions(),
            "seconds": {"run": time.monotonic() - start},
        }

    def _learn(self) -> None:
        learnt = self.learnt
        self.tell(Step("sampling before the first step"))
        learnt.initial_error = self._evaluate()
        wanted = SHARE * learnt.initial_error
        counted = Counted("learning", self.part.steps, "steps", self.tell)
        for step in range(self.part.steps):
            found = self._step(step)
            counted.add(1)
            if found > wanted and step < self.part.steps - 1:
                continue
            learnt.final_error = self._evaluate()
            if learnt.final_error <= wanted:
                return

    def _evaluate(self) -> float:
        return error_of(self._sample(EVALUATION).lengths)

    def _sample(self, step: int) -> Completions:
        part, size = self.part, self.pipeline.vocab_size
        prompts = prompts_of(part.prompts, size, part.seed, step)
        found = sample(self.pipeline, prompts, (part.seed * 1009 + step) % SEEDS)
        self.learnt.sampled += sum(found.lengths)
        return found

    def _step(self, step: int) -> float:
        """Samples, and takes a step of policy gradient; returns the error of what was sampled."""
        found, learnt = self._sample(step), self.learnt
        rewards = rewards_of(found.lengths)
        advantages = advantages_of(rewards)
        groups = [advantages[at : at + GROUP] for at in range(0, len(advantages), GROUP)]
        batches = self._batches(found, advantages)
        self.observer.expect(batches[0].tokens.size(1))
        with self.observer.watching():
            loss, _ = self.training.run(batches)
        learnt.errors.append(error_of(found.lengths))
        learnt.lengths.append(sum(found.lengths) / len(found.lengths))
        learnt.varied.append(sum(any(group) for group in groups) / len(groups))
        learnt.losses.append(loss)
        self._look(loss)
        self.masters.step()
        return learnt.errors[-1]

    def _batches(self, found: Completions, advantages: list[float]) -> list[Microbatch]:
        """This rank's microbatches, at least as many as there are stages where there are rows enough."""
        run = self.job.run
        ranks = parallel_state.get_data_parallel_world_size()
        each = -(-len(found.rows) // (ranks * run.grid.pp))
        longest = max(map(len, found.rows))
        sharing = Sharing(
            ranks=ranks,
            rank=parallel_state.get_data_parallel_rank(),
            multiple=run.grid.pp if run.grid.vpp > 1 else 1,
            split=multiple_of(run.grid.tp if run.sequence_parallel else 1),
            cut=run.cp > 1,
            capacity=min(run.capacity, each * longest) if run.packed else None,
            together=max(1, min(run.capacity // longest, each)),
        )
        return sharing.deal(found.rows, {}, weights=found.weighted(advantages))

    def _look(self, loss: float) -> None:
        """Keeps how large the gradients are.

        Raises:
            NotFiniteError: The loss or a gradient is no number, on every rank.
        """
        worst = 0.0 if abs(loss) < float("inf") else float("nan")
        for number, largest in enumerate(self.largest):
            gradients = self.training.gradients(number)
            for name in largest:
                found = float(gradients[name].abs().max())
                largest[name] = max(largest[name], found)
                worst += found
        total = torch.tensor([worst], dtype=torch.float64, device=self.pipeline.device)
        dist.all_reduce(total)
        if not bool(total.isfinite().all()):
            raise NotFiniteError("a gradient is no number")

    def _gradients(self) -> dict[str, list[str]]:
        """Canonical names of what had no gradient."""
        silent: set[str] = set()
        idle: set[str] = set()
        for names, largest in zip(self.names, self.largest, strict=True):
            loud = {_experts_of(name) for name, value in largest.items() if value}
            for name in (name for name, value in largest.items() if not value):
                others = _experts_of(name)
                (idle if others is not None and others in loud else silent).add(names[name])
        return {"silent": sorted(silent), "idle": sorted(idle)}

    def _movements(self) -> dict[str, list[str]]:
        """Canonical names of what had a gradient and did not move, and of what is not trained and moved."""
        still: set[str] = set()
        moved: set[str] = set()
        for number, chunk in enumerate(self.pipeline.chunks):
            for name, value in expected_tensors(chunk).items():
                now = self.masters.of(value).detach().cpu()
                same = torch.equal(now, self.before[number][name].to(now.dtype))
                key = self.names[number].get(name, name)
                if not same and name not in self.trained[number]:
                    moved.add(key)
                elif same and self.largest[number].get(name):
                    still.add(key)
        return {"still": sorted(still), "moved": sorted(moved)}

    def _prints(self) -> list[list[Any]]:
        """Of every parameter: its canonical name, which shard this is, its sum, and the square root of its squares'."""
        found = []
        for names, chunk in zip(self.names, self.pipeline.chunks, strict=True):
            for name, value in chunk.named_parameters():
                if (key := names.get(name)) is not None:
                    sums = value.detach().sum(dtype=torch.float64), value.detach().float().norm()
                    found.append([key, self._shard(key), *map(float, sums)])
        return found

    def _shard(self, key: str) -> int:
        """Number of the shard of a tensor that this rank has."""
        split, place = self.checkpoint.items[key].split(self.spelling), self.seat.place
        if split.replicated:
            return 0
        return place.etp if split.expert else place.tp


def _experts_of(name: str) -> tuple[str, str] | None:
    """What the tensors of one name of all experts of a layer have in common; None for others."""
    before, found, after = name.partition(EXPERT)
    return (before, after.partition(".")[2]) if found else None


def _copies(chunk: CausalModel) -> dict[str, torch.Tensor]:
    """The tensors of a chunk, in host memory."""
    return {name: value.detach().cpu().clone() for name, value in expected_tensors(chunk).items()}
