"""The two levels that need no forward pass: do both describe the same model, and are its weights the same bytes?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.dtypes import DTYPES_BY_TORCH_NAME
from ckptkit.formats.quantised.stored import Stored
from ckptkit.inspection.structure import config_differences
from ckptkit.inspection.values import Gap, gap
from ckptkit.io.plan import Comparison
from ckptkit.io.reading import difference, hash_file, in_step
from ckptkit.io.threads import Progress, Readers, read_all
from ckptkit.sharding.grid import Parallelism
from ckptkit.tensors import Tensor
from ckptkit.verification.guilt import guilty_ranks
from ckptkit.verification.quantised import Noise, noise, stored_of
from ckptkit.verification.reports.report import LevelResult
from ckptkit.verification.reports.results import Check, TensorDifference

NAMED = 5
"""How many of the worst tensors a message names."""
LISTED = 50
"""How many of them the details list, with the ranks that hold the difference."""
_SIDES = ("the reference", "the candidate")
_TOKENIZER = (
    "tokenizer",
    "special_tokens",
    "added_tokens",
    "vocab",
    "merges",
    "spiece",
    "sentencepiece",
    "chat_template",
)


def check_structure(reference: Checkpoint, candidate: Checkpoint) -> LevelResult:
    """Names, shapes and config of one side against the other; opening has checked each against its own config."""
    contradictions = [*candidate.disagreements, *(f"reference: {text}" for text in reference.disagreements)]
    config = [*config_differences(reference.config, candidate.config, _SIDES), *contradictions]
    problems = []
    for key in sorted(reference.tensors.keys() ^ candidate.tensors.keys()):
        side = "candidate" if key in reference.tensors else "reference"
        problems.append(f"{key} is missing in the {side}")
    for key in sorted(reference.tensors.keys() & candidate.tensors.keys()):
        left, right = reference.tensors[key].shape, candidate.tensors[key].shape
        if left != right:
            problems.append(f"{key} is {list(left)} in the reference, {list(right)} in the candidate")
    problems += _beside(reference, candidate)
    count = len(reference.tensors)
    checks = [
        Check("config", not config, config[0] if config else "the configs agree"),
        Check("tensors", not problems, problems[0] if problems else f"{count} tensors, names and shapes agree"),
    ]
    everything = config + problems
    summary = everything[0] if everything else f"{count} tensors, names, shapes and config agree"
    details = {"tensors": count, "problems": everything, "messages": _small_differences(reference, candidate)}
    return LevelResult("structure", not everything, summary, details, checks)


def _beside(reference: Checkpoint, candidate: Checkpoint) -> list[str]:
    """Differences in name or shape between tensors that have no place in Megatron, as `convert --to hf` writes them."""
    left, right = _extras(reference), _extras(candidate)
    problems = [
        f"{name} is {list(left[name].shape)} in the reference, {list(right[name].shape)} in the candidate"
        for name in sorted(left.keys() & right.keys())
        if left[name].shape != right[name].shape
    ]
    if reference.family.text_only is None:  # what a text model has besides, transformers ignores or makes anew
        return problems
    sides = [(name, "candidate" if name in left else "reference") for name in sorted(left.keys() ^ right.keys())]
    return [*problems, *(f"{name} is missing in the {side}" for name, side in sides)]


def _extras(side: Checkpoint) -> dict[str, Tensor]:
    """Tensors that `convert --to hf` writes beside those of the table: stored extras, and buffers made again."""
    held, dtype = side.sidecar.extras, DTYPES_BY_TORCH_NAME[side.main_dtype]
    return {**held, **side.family.missing_buffers(held, side.config, dtype)}


def _small_differences(reference: Checkpoint, candidate: Checkpoint) -> list[str]:
    """Files of the tokenizer in which the sides differ: no word about the model, but the user should know."""
    left, right = reference.sidecar.small, candidate.sidecar.small
    both = sorted(name for name in left.keys() & right.keys() if name.startswith(_TOKENIZER))
    differ = [name for name in both if hash_file(left[name]) != hash_file(right[name])]
    return [f"the two sides differ in {', '.join(differ)}"] if differ else []


@dataclass(frozen=True)
class _Gap:
    """How two tensors that should be equal differ.

    Attributes:
        what: Description of the two.
        how: In words after "they".
        differing: How many elements have other bits, or None where shapes or types differ.
        elements: How many there are.
        largest: Largest |difference| of two finite elements.
    """

    what: str
    how: str
    differing: int | None = None
    elements: int = 0
    largest: float = 0.0

    def __str__(self) -> str:
        if self.differing is None:
            return f"{self.what}: they {self.how}"
        count = f"{self.differing:,} of {self.elements:,} elements"
        return f"{self.what}: they {self.how}; {count} differ, by at most {self.largest:.3g}"


def _used(reference: Checkpoint, candidate: Checkpoint, key: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, reference, candidate) of what the model uses of a tensor: all of it, or the parts beside unused slots."""
    left, right, item = reference.tensors[key], candidate.tensors[key], reference.items[key]
    if not item.slots:
        yield key, left, right
        return
    others = item.unpack(right)
    for name, part in item.unpack(left).items():
        yield f"{key} ({name})", part, others[name]


@dataclass
class _Noisy:
    """The quantised tensors of a candidate, and those whose difference their format explains.

    Attributes:
        stored: Name -> quantised tensor.
        explained: Name -> its noise.
    """

    stored: dict[str, Stored]
    explained: dict[str, Noise] = field(default_factory=dict)

    def explain(self, gap: _Gap, comparison: Comparison) -> list[_Gap]:
        """The gap, unless the format explains it."""
        item = self.stored.get(comparison.what)
        if item is None or comparison.left.shape != comparison.right.shape:
            return [gap]
        found = noise(comparison.left, item)
        if not found.beyond:
            self.explained[comparison.what] = found
            return []
        how = f"{gap.how}, and {found.beyond:,} elements by more than its format explains"
        return [replace(gap, how=how)]

    def summary(self) -> str:
        """What the format explains, as the end of a sentence."""
        if not self.explained:
            return ""
        kinds = sorted({self.stored[name].kind.upper() for name in self.explained})
        worst = max(self.explained.values(), key=lambda found: found.relative)
        return (
            f"; {len(self.explained):,} quantised tensors are within the noise of {', '.join(kinds)} (at most"
            f" {worst.relative:.3g} of a tensor's RMS)"
        )


def _difference(readers: Readers, comparison: Comparison, noisy: _Noisy) -> list[_Gap]:
    """How a pair that should be equal is not, or nothing."""
    return [one for gap in _gap(readers, comparison) for one in noisy.explain(gap, comparison)]


def _gap(readers: Readers, comparison: Comparison) -> list[_Gap]:
    """How the bytes of a pair differ, or nothing."""
    left, right = comparison.left, comparison.right
    how = difference(left, right, readers=(readers.first, readers.second))
    if how is None:
        return []
    if (left.shape, left.out_dtype) != (right.shape, right.out_dtype):
        return [_Gap(comparison.what, how)]
    total, done = Gap(), 0
    for a, b in in_step(readers.first.chunks(left), readers.second.chunks(right)):
        total = total.then(gap(a, b, left.out_dtype), done)
        done += len(a) // left.out_dtype.itemsize
    return [_Gap(comparison.what, how, total.differing, left.numel, total.largest)]


def check_weights(
    reference: Checkpoint,
    candidate: Checkpoint,
    progress: Progress | None = None,
    diff: str = "ckptkit diff",
    grid: Parallelism | None = None,
) -> LevelResult:
    """Every byte that the model uses equal after translation, streamed; replicated shards and tied copies equal too.

    Where the two differ in dtype, the reference is cast to the candidate's, as a conversion with `--dtype` does.

    Args:
        reference: The side that is trusted.
        candidate: The side in question.
        progress: Called with (bytes compared, bytes in all).
        diff: The command that shows every difference of the two.
        grid: The grid of the ranks that are blamed for a difference; the candidate's own by default.
    """
    replicas = [*reference.comparisons, *candidate.comparisons]
    keys = [key for key in reference.tensors if _alike(reference, candidate, key)]
    noisy = _Noisy(stored_of(candidate))
    pairs = _stored_pairs(reference, candidate) if noisy.stored and len(keys) == len(reference.tensors) else None
    across = [
        Comparison(left.astype(right.out_dtype), right, what)
        for what, left, right in pairs or (pair for key in keys for pair in _used(reference, candidate, key))
    ]
    extras = _extras(candidate)
    across += [
        Comparison(left.astype(extras[name].out_dtype), extras[name], name)
        for name, left in _extras(reference).items()
        if name in extras
    ]
    comparisons = replicas + across
    compare = partial(_difference, noisy=noisy)
    found = read_all(comparisons, compare, lambda comparison: comparison.left.nbytes, progress=progress)
    apart, differ = (
        [gap for gaps in part for gap in gaps] for part in (found[: len(replicas)], found[len(replicas) :])
    )
    alone = len(reference.tensors.keys() | candidate.tensors.keys()) - len(keys)
    problems = [str(gap) for gap in apart + differ]
    problems += [f"{alone:,} tensors could not be compared: their names or shapes differ"] if alone else []
    total = sum(comparison.left.nbytes for comparison in comparisons)
    casts = _casts(reference, candidate, keys)
    after = f" with the reference rounded as the candidate is ({', '.join(casts)})" if casts else ""
    how_many = f"{len(problems):,} tensors differ" if len(problems) > 1 else "1 tensor differs"
    equal = total - sum(comparison.left.nbytes for comparison in across if comparison.what in noisy.explained)
    summary = f"{how_many}{after}: {problems[0]}" if problems else f"{equal:,} bytes equal{after}{noisy.summary()}"
    details = {
        "bytes": total,
        "noise": [
            {"tensor": name, "relative_rms": found.relative, "largest_of_explained": found.largest}
            for name, found in sorted(noisy.explained.items())
        ],
        "tensors": len(reference.tensors),
        "casts": casts,
        "problems": problems[:20],
        "differences": _differences(reference, candidate, differ, grid or candidate.grid),
        "messages": _worst(differ, diff),
    }
    unequal = [str(gap) for gap in differ] + problems[len(apart) + len(differ) :]
    checks = [
        Check("replicas", not apart, str(apart[0]) if apart else f"{len(replicas)} copies within a side are equal"),
        Check("bytes", not unequal, unequal[0] if unequal else _equal(len(across), after, noisy)),
    ]
    return LevelResult("weights", not problems, summary, details, checks)


def _equal(count: int, after: str, noisy: _Noisy) -> str:
    return f"{count - len(noisy.explained)} tensors are equal{after}{noisy.summary()}"


def _stored_pairs(reference: Checkpoint, candidate: Checkpoint) -> list[tuple[str, Tensor, Tensor]]:
    """(name, reference, candidate) of every tensor of the table, under the candidate's names."""
    quantised = candidate.sidecar.quantised
    names = candidate.stored_names if quantised is None else quantised.names
    left, right = (side.hf_tensors(names) for side in (reference, candidate))
    return [(name, left[name], right[name]) for name in right if name in left and name not in candidate.sidecar.extras]


def _alike(reference: Checkpoint, candidate: Checkpoint, key: str) -> bool:
    """Whether a tensor of the reference can be compared."""
    return key in candidate.tensors and candidate.tensors[key].shape == reference.tensors[key].shape


def _casts(reference: Checkpoint, candidate: Checkpoint, keys: Sequence[str]) -> list[str]:
    """The casts that bring the reference to the candidate's types, as `F32 -> BF16`."""
    pairs = {(reference.tensors[key].out_dtype, candidate.tensors[key].out_dtype) for key in keys}
    return sorted(f"{source} -> {target}" for source, target in pairs if source != target)


def _differences(
    reference: Checkpoint, candidate: Checkpoint, gaps: Sequence[_Gap], grid: Parallelism
) -> list[dict[str, Any]]:
    """The tensors that differ most, as JSON types, and the ranks that hold the difference."""
    found = []
    for one in _by_size(gaps)[:LISTED]:
        key = one.what.partition(" (")[0]
        known = key in candidate.items  # an extra is on no rank
        layer = candidate.items[key].layer if known else None
        ranks = guilty_ranks(reference, candidate, key, grid) if known else []
        found.append(TensorDifference(one.what, layer, one.differing or 0, one.elements, one.largest, ranks))
    return [asdict(difference) for difference in found]


def _by_size(gaps: Sequence[_Gap]) -> list[_Gap]:
    """Those that were counted, the largest difference first."""
    counted = [gap for gap in gaps if gap.differing is not None]
    return sorted(counted, key=lambda gap: (-gap.largest, -(gap.differing or 0) / max(gap.elements, 1)))


def _worst(gaps: Sequence[_Gap], diff: str) -> list[str]:
    """How much differs in all, the tensors that differ most, and how to see the rest."""
    worst = counted = _by_size(gaps)
    if not counted:
        return []
    named = ", ".join(f"{gap.what} (by {gap.largest:.3g})" for gap in worst[:NAMED])
    rest = f" and {len(worst) - NAMED} more" if len(worst) > NAMED else ""
    differing, elements = sum(gap.differing or 0 for gap in counted), sum(gap.elements for gap in counted)
    return [
        f"{differing:,} of {elements:,} elements of these tensors differ, by at most {worst[0].largest:.3g}; worst:"
        f" {named}{rest}",
        f"every difference: {diff}",
    ]
