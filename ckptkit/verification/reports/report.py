"""The report of a verification: as typed objects, and as JSON types."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

from ckptkit.verification.reports.placement import SideReport
from ckptkit.verification.reports.results import (
    Agreement,
    CandidateRan,
    Check,
    Greedy,
    Location,
    NoiseFloor,
    RoutingReport,
    StateError,
)
from ckptkit.version import __version__

DISTRIBUTION = "ckptkit-megatron"
PACKAGES = ("torch", "transformers", "megatron-core", "flash-linear-attention")
TRAINABILITY = "trainability"
"""The level that has one side only: its verdict is other words."""
SCHEMA = 1
"""Version of the JSON report; docs/report-schema.md describes its fields. Only a field that goes away, or changes its
meaning, raises it."""


@dataclass(frozen=True)
class LevelResult:
    """Answer of one level.

    Attributes:
        name: `structure`, `weights`, `logits`, ...
        passed: Whether the two sides agree on this level.
        summary: One line.
        details: Figures and lists behind it, JSON types.
        checks: The questions of the level, in order; it passes if all of them do.
        seconds: Wall-clock seconds that it took.
    """

    name: str
    passed: bool
    summary: str
    details: dict[str, Any] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def messages(self) -> list[str]:
        """What else to know, one line each."""
        return list(self.details.get("messages", []))


@dataclass(frozen=True)
class LogitsReport:
    """Answer of the logits level.

    Attributes:
        passed: Whether the two sides are one model.
        summary: One line.
        device: Where both ran.
        dtype: Type that the candidate computed in.
        tolerance: Largest relative error that passes; judged in fp32 only.
        rows: Token ids that both saw, the greedy continuation included.
        agreement: Candidate against the reference (in fp32).
        greedy: The greedy continuation.
        noise: Only below fp32: the noise-floor figures.
        routing: Only with experts and replayed routing: what the routers did.
        hidden_states: Error of the candidate's hidden states, layer by layer.
        checks: The questions asked.
        location: Only on failure: where the two part.
        messages: What else to know, one line each.
        megatron_modules: Classes of megatron-core that ran -> how many.
        own_modules: Classes of ckptkit that ran in their place -> how many.
        versions: Package -> version.
        candidate_ran: How the candidate ran on its ranks; None if transformers ran it.
        seconds: `<side>.<phase>` -> wall-clock seconds.
        reference_rounded: Casts, as `F32 -> BF16`, that the reference's weights went through before it ran, as the
            candidate stores them so; empty if both store the same numbers.
    """

    passed: bool
    summary: str
    device: str
    dtype: str
    tolerance: float
    rows: list[list[int]]
    agreement: Agreement | None = None
    greedy: Greedy | None = None
    noise: NoiseFloor | None = None
    routing: RoutingReport | None = None
    hidden_states: list[StateError] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    location: Location | None = None
    messages: list[str] = field(default_factory=list)
    megatron_modules: dict[str, int] = field(default_factory=dict)
    own_modules: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    candidate_ran: CandidateRan | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    reference_rounded: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; a number that is not finite becomes null."""
        result: dict[str, Any] = jsonable(asdict(self))
        return result

    def level(self) -> LevelResult:
        """As one level of a `VerificationReport`."""
        details = self.to_dict()
        for of_the_level in ("passed", "summary", "checks"):
            del details[of_the_level]
        return LevelResult("logits", self.passed, self.summary, details, self.checks)


@dataclass(frozen=True)
class VerificationReport:
    """All levels of a verification.

    Attributes:
        reference: The trusted checkpoint.
        candidate: The checkpoint in question.
        levels: The levels that ran, in order; the first that fails ends the verification.
        messages: What else to know, one line each.
        sides: `reference` and `candidate` -> what each is, and which rank holds what of it.
        not_run: Levels that were asked for and not reached.
        command: The command line, or None where there was none.
        started: Date and time at the beginning, ISO 8601 in UTC; empty if unknown.
        versions: Package -> version, of the process that asked.
        schema: Version of the JSON.
    """

    reference: str
    candidate: str
    levels: list[LevelResult]
    messages: list[str] = field(default_factory=list)
    sides: dict[str, SideReport] = field(default_factory=dict)
    not_run: list[str] = field(default_factory=list)
    command: str | None = None
    started: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def passed(self) -> bool:
        """Whether at least one level ran and all passed."""
        return bool(self.levels) and all(level.passed for level in self.levels)

    @property
    def verdict(self) -> str:
        """`same` or `differs`; of the level trainability `learns` or `does not learn`."""
        return verdict_of([level.name for level in self.levels], self.passed)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; a number that is not finite becomes null."""
        result: dict[str, Any] = jsonable({**asdict(self), "verdict": self.verdict})
        return result


def verdict_of(levels: Sequence[str], passed: bool) -> str:
    """An answer in words: `same` or `differs`, `learns` or `does not learn`.

    Args:
        levels: Names of the levels that it is about.
        passed: Whether they passed.
    """
    if TRAINABILITY in levels:
        return "learns" if passed else "does not learn"
    return "same" if passed else "differs"


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what runs; absent ones are left out."""
    found = {"python": platform.python_version(), DISTRIBUTION: __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def jsonable(value: Any) -> Any:
    """As JSON types; a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
