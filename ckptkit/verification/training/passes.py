"""Running a side backwards, in this process or on ranks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.megatron.run_config import RunConfig
from ckptkit.verification.passes import check_how_it_ran
from ckptkit.verification.ranks.adapters import open_laid_out
from ckptkit.verification.ranks.jobs import LogitsJob, TrainingPart, find, open_model
from ckptkit.verification.ranks.pool import Ranks
from ckptkit.verification.run_options import EXACT, RunOptions
from ckptkit.verification.sides import HF, OpenedSide
from ckptkit.verification.training import factors, names


@dataclass(frozen=True)
class TrainingRun:
    """What came of a side's run.

    Attributes:
        opened: The side.
        config: How it ran.
        folder: Its files.
        losses: Loss per token that counts before each step, and after the last one.
        tokens: How many tokens counted.
        padding: Hugging Face name of an embedding -> its `padding_idx`; transformers only.
        shapes: Name in memory -> shape; transformers only.
        moved: Tensors that changed although they are not trained.
        stray: Parameters that have gradients although they are not trained.
        seen: Facts that the ranks recorded.
        modules: Class of module -> how many of them ran.
        versions: Package -> version.
        seconds: Phase -> wall-clock seconds.
    """

    opened: OpenedSide
    config: RunConfig
    folder: Path
    losses: list[float]
    tokens: int
    padding: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    moved: list[str] = field(default_factory=list)
    stray: list[str] = field(default_factory=list)
    seen: list[dict[str, Any]] = field(default_factory=list)
    modules: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Backwards:
    """Runs sides backwards, and keeps their results in one folder.

    Attributes:
        ranks: The processes.
        folder: Where the files go.
        opener: The function that opens a Megatron checkpoint, as `module:function`.
        rows: Token ids.
        trained: Canonical names of the tensors that are trained, or None for all.
    """

    ranks: Ranks
    folder: Path
    opener: str
    rows: list[list[int]]
    trained: list[str] | None = None

    def run(
        self,
        opened: OpenedSide,
        name: str,
        options: RunOptions,
        *,
        routed_as: TrainingRun | None = None,
        attention: str = "eager",
    ) -> TrainingRun | None:
        """Runs a side.

        Args:
            opened: The side.
            name: Name of its folder.
            options: How it runs.
            routed_as: A run whose experts the tokens are sent to, where routing is replayed.
            attention: transformers' implementation of attention.

        Returns:
            What came of it; None if transformers has no such attention for this model.

        Raises:
            CkptkitError: The run could not be made.
        """
        own = self.folder / name
        replayed = options.replay and routed_as is not None
        job = LogitsJob(
            checkpoint=str(opened.side.path),
            run=options.config(opened.grid, opened.window),
            options=options,
            rows=self.rows,
            output=str(own / "logits.safetensors"),
            routing=str(own) if options.replay else None,
            replay=str(routed_as.folder) if replayed and routed_as is not None else None,
            opener=self.opener,
            opening=opened.side.opening,
            rounded=opened.side.rounding.dtypes if options.dtype in EXACT else {},
            training=TrainingPart(str(own), options.train_steps, self.trained, attention),
            adapter=opened.side.adapter,
            prediction=opened.side.prediction,
        )
        return self._in_transformers(job, opened) if opened.side.kind == HF else self._on_ranks(job, opened)

    def _in_transformers(self, job: LogitsJob, opened: OpenedSide) -> TrainingRun | None:
        def task() -> dict[str, Any]:
            from ckptkit.verification.training.reference import train_reference

            assert job.training is not None
            return train_reference(job, job.training)

        answer = self.ranks.once(task)
        if not answer.pop("found"):
            return None
        run = TrainingRun(opened, job.run, Path(job.output).parent, **answer)
        if not run.padding:
            return run
        traced = names.trace(opened.side.path, run.shapes)
        return replace(run, padding={hub: row for name, row in run.padding.items() for hub in traced.on_hub(name)})

    def _on_ranks(self, job: LogitsJob, opened: OpenedSide) -> TrainingRun:
        answers = self.ranks.run(job)
        check_how_it_ran(job, [facts for answer in answers for facts in answer["seen"]])
        modules: dict[str, int] = {}
        for answer in answers:
            for module, count in answer["modules"].items():
                modules[module] = modules.get(module, 0) + count
        first = answers[0]
        return TrainingRun(
            opened,
            job.run,
            Path(job.output).parent,
            losses=first["losses"],
            tokens=first["tokens"],
            moved=sorted({name for answer in answers for name in answer["moved"]}),
            stray=sorted({name for answer in answers for name in answer["stray"]}),
            seen=[facts for answer in answers for facts in answer["seen"]],
            modules=modules,
            versions=first["versions"],
            seconds=first["seconds"],
        )

    def named(self, run: TrainingRun, kind: str) -> names.Named:
        """What a run left under Hugging Face's names.

        Args:
            run: The run.
            kind: `files.GRADIENTS` or `files.UPDATES`.
        """
        side, grid = run.opened.side, run.opened.grid
        if side.kind == HF and side.adapter is None:
            return names.of_transformers(side.path, run.folder, kind, run.shapes)
        model = open_side_with(self.opener, run.opened)
        if side.adapter is None:
            return names.of_ranks(model, grid, run.folder, kind)
        if side.kind == HF:
            return factors.of_peft(side.adapter.path, model, run.folder, kind)
        laid = open_laid_out(side.adapter, model, grid, find(self.opener))
        return factors.of_ranks(laid, grid, run.folder, kind)


def open_side_with(opener: str, opened: OpenedSide) -> Checkpoint:
    """The model of a side, opened by the function that `module:function` names."""
    side = opened.side
    return open_model(find(opener), str(side.path), side.opening, side.adapter, side.prediction)
