"""Running a side over rows of tokens, in this process or on ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ckptkit.steps import Step, Tell, nobody
from ckptkit.verification.ranks.jobs import LogitsJob
from ckptkit.verification.ranks.pool import Ranks
from ckptkit.verification.ranks.what_ran import Seen, check_ran
from ckptkit.verification.run_options import EXACT, RunOptions
from ckptkit.verification.runs import Run
from ckptkit.verification.sides import HF, OpenedSide

_SIDES = {
    "reference": "reference",
    "low_reference": "reference",
    "candidate": "candidate",
    "probe_reference": "reference",
    "probe_candidate": "candidate",
    "replayed": "candidate with the engine's routing",
    "low_candidate": "candidate",
    "exact_candidate": "candidate",
}
"""Name of a pass -> the side that runs."""


@dataclass(frozen=True)
class Passes:
    """Runs sides, and keeps their results in one folder.

    Attributes:
        ranks: The processes.
        folder: Where the files go.
        opener: The function that opens a Megatron checkpoint, as `module:function`.
        tell: Told what runs.
    """

    ranks: Ranks
    folder: Path
    opener: str
    tell: Tell = nobody

    def run(
        self,
        opened: OpenedSide,
        rows: list[list[int]],
        name: str,
        options: RunOptions,
        *,
        greedy: int = 0,
        whole_layers: bool = True,
        routed_as: Run | None = None,
        twice: bool = False,
        scored: Sequence[float] = (),
    ) -> Run:
        """Runs a side over rows.

        Args:
            opened: The side.
            rows: Token ids.
            name: Name of its files, one of `_SIDES`.
            options: How it runs.
            greedy: Tokens to append to every row.
            whole_layers: Keep hidden states between layers only, not within them.
            routed_as: A run whose experts the tokens are sent to, where routing is replayed.
            twice: Run again with another implementation of attention, where there is one.
            scored: Inverse temperatures, if not logits and hidden states are kept but scores (see `rollouts.scores`).

        Raises:
            CkptkitError: The run could not be made.
        """
        hf = opened.side.kind == HF
        job = LogitsJob(
            checkpoint=str(opened.side.path),
            run=options.config(opened.grid, opened.window),
            options=options,
            rows=rows,
            output=str(self.folder / f"{name}.safetensors"),
            greedy=greedy,
            again=str(self.folder / f"{name}.again.safetensors") if twice and hf else None,
            probes=None if scored else str(self.folder / name),
            whole_layers=whole_layers,
            routing=str(self.folder / f"{name}.routers") if options.replay else None,
            replay=str(routed_as.routing) if routed_as is not None and routed_as.routing is not None else None,
            opener=self.opener,
            opening=opened.side.opening,
            rounded=opened.side.rounding.dtypes if options.dtype in EXACT else {},
            adapter=opened.side.adapter,
            prediction=opened.side.prediction,
            scored=list(scored),
        )
        where = "transformers" if hf else f"{job.run.world_size} rank{'s' if job.run.world_size > 1 else ''}"
        title = f"{_SIDES[name]} ({where}, {options.dtype})"

        def tell(step: Step) -> None:
            self.tell(replace(step, what=f"{title}: {step.what}"))

        return self._run_hf(job, tell) if hf else self._run_megatron(job, tell)

    def _run_hf(self, job: LogitsJob, tell: Tell) -> Run:
        from ckptkit.verification.reference import run_reference

        def task() -> dict[str, Any]:
            known = {*job.files, "config"}
            return {key: value for key, value in asdict(run_reference(job, tell)).items() if key not in known}

        run = Run(config=job.run, **job.files, **self.ranks.once(task))
        # Not every model has a second implementation of attention.
        return run if run.again is None or run.again.is_file() else replace(run, again=None)

    def _run_megatron(self, job: LogitsJob, tell: Tell) -> Run:
        answers = self.ranks.run(job, tell)
        run = Run(config=job.run, **job.files, **answers[0])
        for answer in answers[1:]:
            run.seen.extend(answer["seen"])
            run.feeds.update(answer["feeds"])
            for module, count in answer["modules"].items():
                run.modules[module] = run.modules.get(module, 0) + count
        check_how_it_ran(job, run.seen)
        return replace(run, rows=answers[-1]["rows"])


def check_how_it_ran(job: LogitsJob, seen: Sequence[Seen]) -> None:
    """Whether every rank ran as asked.

    Raises:
        VerificationError: One did not.
    """
    run = job.run
    asked = {
        "packed": run.packed,
        "sequence_parallel": run.sequence_parallel,
        "context_parallel": run.cp,
    }
    backwards = job.training is not None or job.trainability is not None
    replication = run.dp_kind if run.dp > 1 or backwards else None
    check_ran({**asked, "replication": replication}, seen)
