"""The figures of a verification: the measurements, their limits, and their words."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

NAMED = 8
"""How many tensors a sentence names before it counts the rest; a layer may have hundreds of experts."""


@dataclass(frozen=True)
class Check:
    """One question of a level.

    Attributes:
        name: Name of the check, e.g. `config`, `bytes`, `noise floor`, `router logits`.
        passed: Whether the two sides agree.
        summary: The figures, or the first difference; one line.
    """

    name: str
    passed: bool
    summary: str


@dataclass(frozen=True)
class TensorDifference:
    """A tensor whose bytes differ.

    Attributes:
        tensor: The canonical name, and which part of it where only a part is compared.
        layer: Number of its layer, or None outside of layers.
        differing: How many elements have other bits.
        elements: How many there are.
        largest: Largest |difference| of two finite elements.
        ranks: Global ranks of the candidate whose shards hold the difference.
    """

    tensor: str
    layer: int | None
    differing: int
    elements: int
    largest: float
    ranks: list[int]


@dataclass(frozen=True)
class Location:
    """Where two models part.

    Attributes:
        place: `embedding`, `layer 3 self_attention`, `layer 3 router`, `layer 3 mlp`, `layer 3 output`,
            `layer 3 adapter`, `final norm` or `head`.
        relative_error: Error of the hidden state there, relative to its own size.
        error_before: Largest relative error at any place before it.
        tensors: The candidate's tensors between the place before and this one.
    """

    place: str
    relative_error: float
    error_before: float
    tensors: list[str]

    def __str__(self) -> str:
        rest = len(self.tensors) - NAMED
        ordered = sorted(self.tensors, key=lambda name: ".experts." in name)  # there may be hundreds of those
        fed = ", ".join(ordered[:NAMED]) + (f" and {rest} more" if rest > 0 else "") or "no tensors"
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
        constant: Whether all logits of the reference are one number, as with a head of zeros: then they say nothing
            of what is below the head.
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
    constant: bool = False

    @property
    def finite(self) -> bool:
        """Whether all logits of both sides are finite."""
        return not any(self.non_finite.values())


@dataclass(frozen=True)
class NoiseFloor:
    """The candidate's low-precision error in units of the reference's own, over positions.

    r = RMS(candidate_low - reference_fp32) / RMS(reference_low - reference_fp32). Where the reference has two
    implementations of attention, the denominator is the root of the mean square of two runs: one of them may be close
    to fp32 at some position by luck.

    Attributes:
        median: Median of r.
        p99: 99th percentile of r.
        median_limit: Largest median that passes.
        p99_limit: Largest 99th percentile that passes.
        samples: Runs of the reference behind the denominator: one where there is no second, or where the second is so
            far from the first that its error is more than rounding.
        repeat_median: Median of r of the reference's second run in units of its first: what a correct implementation
            may get; null without a second.
        repeat_p99: The 99th percentile of that.
    """

    median: float
    p99: float
    median_limit: float
    p99_limit: float
    samples: int = 1
    repeat_median: float | None = None
    repeat_p99: float | None = None

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
class StateError:
    """How far a hidden state of the candidate is from the reference's, over the last positions of every row.

    Attributes:
        place: `embedding`, `layer 3`, ..., `final norm` or `head`.
        rms_error: RMS of the difference over RMS of the reference's state.
        max_error: Largest RMS of the difference at one position, over the same.
        noise: RMS error of the reference itself in the candidate's dtype; null in fp32.
    """

    place: str
    rms_error: float
    max_error: float
    noise: float | None = None


@dataclass(frozen=True)
class RouterLayer:
    """The router of one layer, candidate against reference, both fed what the chosen experts of the reference gave.

    Attributes:
        layer: Number of the layer, from 0.
        relative_error: Largest difference of two router logits over the largest |logit| of the reference's router.
        noise_ratio: Below fp32: RMS of the difference over that of the reference's own error in that dtype; else null.
        near_ties: Tokens for which the candidate would choose other experts, which the reference holds all but equal.
        disagreements: Tokens for which it would choose other experts although the reference is sure.
        largest_margin: Largest margin of the reference over all those tokens, over its largest |logit|, or |score| if
            it chooses by scores; 0 without any.
        margin_limit: Largest margin that is within the noise, over the same.
    """

    layer: int
    relative_error: float
    noise_ratio: float | None
    near_ties: int
    disagreements: int
    largest_margin: float
    margin_limit: float


@dataclass(frozen=True)
class RoutingReport:
    """The agreement of the routers while the candidate used the reference's choice of experts.

    Attributes:
        tokens: Tokens that each router saw.
        experts_per_token: Side -> experts that its routers choose for a token.
        tolerance: Largest `relative_error` that passes; judged in fp32 only.
        median_limit: Largest median over layers of `noise_ratio` that passes; judged below fp32 only.
        layer_limit: Largest `noise_ratio` of a layer that passes; judged below fp32 only.
        layers: The layers that have a router, in order.
    """

    tokens: int
    experts_per_token: dict[str, int]
    tolerance: float
    median_limit: float
    layer_limit: float
    layers: list[RouterLayer]

    @property
    def near_ties(self) -> int:
        """Choices that differ within the noise."""
        return sum(layer.near_ties for layer in self.layers)

    @property
    def disagreements(self) -> int:
        """Choices that differ beyond it."""
        return sum(layer.disagreements for layer in self.layers)

    @property
    def logits_passed(self) -> bool:
        """Whether the router logits agree: within the tolerance in fp32, within the noise floor below."""
        ratios = [layer.noise_ratio for layer in self.layers if layer.noise_ratio is not None]
        if not ratios:
            return all(layer.relative_error <= self.tolerance for layer in self.layers)
        return median(ratios) <= self.median_limit and all(ratio <= self.layer_limit for ratio in ratios)

    @property
    def choice_passed(self) -> bool:
        """Whether the candidate would have chosen the same experts wherever the reference is sure."""
        return not self.disagreements and len(set(self.experts_per_token.values())) == 1

    def checks(self) -> list[Check]:
        """The two questions about routers."""
        worst = max(self.layers, key=lambda layer: layer.noise_ratio or layer.relative_error)
        if worst.noise_ratio is None:
            figures = f"{worst.relative_error:.1e} of the largest (tolerance {self.tolerance:.0e})"
        else:
            middle = median(layer.noise_ratio or 0.0 for layer in self.layers)
            figures = (
                f"{middle:.2f} (median of the layers) and {worst.noise_ratio:.2f} (worst) times the reference's own"
                f" error (limits {self.median_limit:g} and {self.layer_limit:g})"
            )
        choices = f"{self.tokens * len(self.layers)} choices of experts, {self.near_ties} near-ties among them differ"
        if len(set(self.experts_per_token.values())) > 1:
            counts = " and ".join(f"{count} in the {side}" for side, count in self.experts_per_token.items())
            choices = f"experts per token: {counts}"
        elif self.disagreements:
            worst_choice = max(self.layers, key=lambda layer: layer.largest_margin)
            choices += (
                f" and {self.disagreements} beyond the noise: in layer {worst_choice.layer} the reference's margin is"
                f" {worst_choice.largest_margin:.1e} of the largest |logit|, the noise {worst_choice.margin_limit:.1e}"
            )
        return [
            Check("router logits", self.logits_passed, f"off by {figures}, most in layer {worst.layer}"),
            Check("chosen experts", self.choice_passed, choices),
        ]


@dataclass(frozen=True)
class CandidateRan:
    """How megatron-core ran the candidate.

    Attributes:
        packed: Whether the logits come from packed rows.
        sequence_parallel: Whether the sequence was split over tensor parallel ranks.
        context_parallel: Ranks that shared out every sequence.
        replicas: How many replicas of the grid there were.
        replication: Wrapper of the replicas, `ddp` or `fsdp2`, or None.
        devices: Names of the devices, each once.
    """

    packed: bool
    sequence_parallel: bool
    context_parallel: int
    replicas: int
    replication: str | None
    devices: list[str]

    def __str__(self) -> str:
        words = ["packed rows" if self.packed else "plain rows", *(["sequence parallel"] * self.sequence_parallel)]
        if self.context_parallel > 1:
            words.append(f"{self.context_parallel} context parallel ranks")
        if self.replicas > 1:
            words.append(f"{self.replicas} replicas ({self.replication})")
        return f"the candidate ran on {' and '.join(self.devices)}: {', '.join(words)}"
