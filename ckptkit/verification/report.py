"""What a verification found: typed, JSON-able, and as a table."""

from __future__ import annotations

import math
import platform
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

PACKAGES = ("ckptkit", "torch", "transformers", "megatron-core")


@dataclass(frozen=True)
class LevelResult:
    """Answer of one level.

    Attributes:
        name: `structure`, `weights`, `logits`, ...
        passed: Whether the two sides agree on this level.
        summary: One line.
        details: Figures and lists behind it, JSON types.
    """

    name: str
    passed: bool
    summary: str
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Location:
    """Where two models part.

    Attributes:
        place: `embedding`, `layer 3 self_attention`, `layer 3 mlp`, `layer 3 output`, `final norm` or `head`.
        relative_error: Error of the hidden state there, relative to its own size.
        error_before: Largest relative error at any place before it.
        tensors: The candidate's tensors between the place before and this one.
    """

    place: str
    relative_error: float
    error_before: float
    tensors: list[str]

    def __str__(self) -> str:
        fed = ", ".join(self.tensors) or "no tensors"
        return (
            f"the models part at {self.place}: relative error {self.relative_error:.1e}, {self.error_before:.1e} before"
            f" it; it is fed by {fed}, and by the configuration"
        )


@dataclass(frozen=True)
class Agreement:
    """Figures of a comparison of logits; positions are counted from 0.

    Attributes:
        max_abs_error: Largest difference of two logits.
        max_abs_logit: Largest logit of the reference.
        relative_error: The first over the second.
        worst: (row, position) of the largest difference.
        top1_agreement: Share of positions with the same most likely token.
        kl_mean: Mean over positions of KL(reference || candidate), in nats.
        kl_max: Largest of them.
        non_finite: Side -> how many of its logits are not finite.
        per_position: Largest difference at each position of each row, over `max_abs_logit`.
    """

    max_abs_error: float
    max_abs_logit: float
    relative_error: float
    worst: tuple[int, int]
    top1_agreement: float
    kl_mean: float
    kl_max: float
    non_finite: dict[str, int]
    per_position: list[list[float]]

    @property
    def finite(self) -> bool:
        """Whether all logits of both sides are finite."""
        return not any(self.non_finite.values())


@dataclass(frozen=True)
class NoiseFloor:
    """The candidate's low-precision error in units of the reference's own, over positions.

    r = RMS(candidate_low - reference_fp32) / RMS(reference_low - reference_fp32).

    Attributes:
        median: Median of r.
        p99: 99th percentile of r.
        median_limit: Largest median that passes.
        p99_limit: Largest 99th percentile that passes.
    """

    median: float
    p99: float
    median_limit: float
    p99_limit: float

    @property
    def passed(self) -> bool:
        """Whether the candidate is as good as the reference in that precision (never if r is not a number)."""
        return self.median <= self.median_limit and self.p99 <= self.p99_limit


@dataclass(frozen=True)
class Greedy:
    """The reference's greedy continuation and whether the candidate would have written it.

    Attributes:
        continuation: Tokens that the reference appended to each row.
        steps: How many tokens in all.
        equal: At how many of them the candidate, fed the reference's text, picks the same token.
        ties: At how many it picks another one that the reference holds equally likely.
    """

    continuation: list[list[int]]
    steps: int
    equal: int
    ties: int

    @property
    def passed(self) -> bool:
        """Whether both would write the same text."""
        return self.equal + self.ties == self.steps


@dataclass(frozen=True)
class LogitsReport:
    """Answer of the logits level.

    Attributes:
        passed: Whether the two sides are one model.
        summary: One line.
        device: Where both ran.
        dtype: What the candidate ran in.
        tolerance: Largest relative error that passes; judged in fp32 only.
        rows: Token ids that both saw, the greedy continuation included.
        agreement: Candidate against the reference (in fp32).
        greedy: The greedy continuation.
        noise: Only below fp32: the noise-floor figures.
        location: Only on failure: where the two part.
        messages: What else to know, one line each.
        megatron_modules: Classes of megatron-core that ran -> how many.
        own_modules: Classes of ckptkit that ran in their place -> how many.
        versions: Package -> version.
        seconds: `<side>.<phase>` -> wall-clock seconds.
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
    location: Location | None = None
    messages: list[str] = field(default_factory=list)
    megatron_modules: dict[str, int] = field(default_factory=dict)
    own_modules: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; a number that is not finite becomes null."""
        result: dict[str, Any] = _jsonable(asdict(self))
        return result

    def level(self) -> LevelResult:
        """As one level of a `VerificationReport`."""
        return LevelResult("logits", self.passed, self.summary, self.to_dict())


@dataclass(frozen=True)
class VerificationReport:
    """All levels of a verification.

    Attributes:
        reference: What was trusted.
        candidate: What was questioned.
        levels: The levels that ran, in order; the first that fails ends the verification.
        messages: What else to know, one line each.
    """

    reference: str
    candidate: str
    levels: list[LevelResult]
    messages: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether at least one level ran and all passed."""
        return bool(self.levels) and all(level.passed for level in self.levels)

    @property
    def verdict(self) -> str:
        """`same` or `differs`."""
        return "same" if self.passed else "differs"

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; a number that is not finite becomes null."""
        result: dict[str, Any] = _jsonable({**asdict(self), "verdict": self.verdict})
        return result


def render(report: VerificationReport) -> Table:
    """The levels as a table."""
    from rich.table import Table
    from rich.text import Text

    def answer(passed: bool) -> Text:
        return Text("same", style="green") if passed else Text("differs", style="red")

    caption = Text("\n").join([answer(report.passed), *map(Text, report.messages)])
    table = Table(title=Text(f"{report.candidate} against {report.reference}"), caption=caption)
    table.add_column("level", no_wrap=True)
    table.add_column("answer", no_wrap=True)
    table.add_column("because", overflow="fold")
    for level in report.levels:
        lines = [level.summary, *level.details.get("messages", [])]
        table.add_row(level.name, answer(level.passed), Text("\n".join(lines)))
    return table


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what runs; absent ones are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
