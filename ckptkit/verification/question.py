"""What is asked of `verify`, with an adapter or without, in one record.

A new field of `Question` is one of `VerifyKeywords`, too; how the models run is in `run_options`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack, cast

from ckptkit.checkpoints.source_options import SourceOptions
from ckptkit.errors import UsageError
from ckptkit.steps import Tell, nobody
from ckptkit.verification.ranks.pool import Ranks
from ckptkit.verification.run_options import BACKWARD, LEVELS, STEPS, RunKeywords, RunOptions


class VerifyKeywords(RunKeywords, total=False):
    """The fields of `Question`, and how the models run, as keyword arguments."""

    level: str
    prompts: Sequence[str] | None
    tokens: Sequence[Sequence[int]] | None
    keep_going: bool
    reference_source: SourceOptions
    candidate_source: SourceOptions
    progress: Callable[[int, int], None] | None
    tell: Tell
    pool: Ranks | None
    command: str | None
    hash: bool


@dataclass(frozen=True)
class Question:
    """A question about two checkpoints.

    Attributes:
        level: The last question to ask: `structure`, `weights`, `logits`, `gradients` or `training`; `train_steps` asks
            for the last one, too.
        prompts: Texts to compare on; a side must have a tokenizer.
        tokens: Token ids to compare on; pseudo-random ones where neither is given.
        keep_going: Run the remaining levels even after one has found a difference.
        reference_source: Facts about the reference that it does not record itself.
        candidate_source: Facts about the candidate that it does not record itself.
        progress: Called with (bytes compared, bytes in all) at the weights level.
        tell: Told what runs at the logits level, and how far it is.
        pool: Ranks to use instead of starting some.
        command: The command line, for the report.
        hash: Also give the SHA-256 of both sides' tensors, for which both are read once more; not with an adapter.
        run: How the sides run at the level logits and later ones: the fields of `RunOptions`; tp, pp and ep for a
            candidate that has no grid of its own, which megatron-core then runs.
    """

    level: str = "logits"
    prompts: Sequence[str] | None = None
    tokens: Sequence[Sequence[int]] | None = None
    keep_going: bool = False
    reference_source: SourceOptions = SourceOptions()  # noqa: RUF009  frozen
    candidate_source: SourceOptions = SourceOptions()  # noqa: RUF009  frozen
    progress: Callable[[int, int], None] | None = None
    tell: Tell = nobody
    pool: Ranks | None = None
    command: str | None = None
    hash: bool = False
    run: RunKeywords = field(default_factory=RunKeywords)

    @classmethod
    def of(cls, **asked: Unpack[VerifyKeywords]) -> Question:
        """The record. Steps of training ask for the last level, and that has some by default.

        Raises:
            UsageError: There is no such level.
        """
        given = cast(dict[str, Any], asked)
        run = {name: given.pop(name) for name in RunKeywords.__annotations__ if name in given}
        level = given.pop("level", cls.level)
        if level not in LEVELS:
            raise UsageError(f"no level {level!r}", hint=f"choose {', '.join(LEVELS)}")
        if run.get("train_steps") and level in ("logits", "gradients"):
            level = "training"
        if level == "training" and not run.get("train_steps"):
            run["train_steps"] = STEPS
        return cls(level=level, **given, run=cast(RunKeywords, run))

    @property
    def options(self) -> RunOptions:
        """How the sides run."""
        return RunOptions.of(**self.run)

    @property
    def levels(self) -> tuple[str, ...]:
        """All that is asked, the cheapest first."""
        return LEVELS[: LEVELS.index(self.level) + 1]

    @property
    def runs(self) -> bool:
        """Whether models run."""
        return self.level in LEVELS[2:]

    @property
    def backwards(self) -> bool:
        """Whether they run backwards."""
        return self.level in BACKWARD

    def refuse_unused(self) -> None:
        """Options have no meaning below the levels that they are of.

        Raises:
            UsageError: One was given that has none here.
        """
        options = self.options
        if self.runs:
            refuse_unused_backwards(self.level, options)
            return
        unused = options.for_logits_only()
        unused += [name for name, one in (("--prompt", self.prompts), ("--tokens", self.tokens)) if one is not None]
        if unused:
            need = "needs" if len(unused) == 1 else "need"
            what = f"{', '.join(unused)} {need} --level logits; this run stops at {self.level}"
            raise UsageError(what, hint="drop one or the other")


def refuse_unused_backwards(level: str, options: RunOptions) -> None:
    """Options that have a meaning only where the sides run backwards, or take steps.

    Raises:
        UsageError: One was given that has none at this level.
    """
    unused = [] if level in BACKWARD else options.for_backward_only()
    if level == "gradients":
        unused = [name for name in options.for_backward_only() if name not in ("--recompute", "--train-only")]
    if unused:
        need = "needs" if len(unused) == 1 else "need"
        hint = "--train-steps N" if level == "gradients" else "--level gradients, or --train-steps N"
        raise UsageError(f"{', '.join(unused)} {need} a later level; this run stops at {level}", hint=hint)
