"""The two levels that need no forward pass: do both describe the same model, and are its weights the same bytes?"""

from __future__ import annotations

from collections.abc import Iterator

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.inspection.structure import config_differences
from ckptkit.io.plan import Comparison
from ckptkit.io.reading import difference
from ckptkit.io.threads import Progress, Readers, read_all
from ckptkit.tensors import Tensor
from ckptkit.verification.reports.report import LevelResult
from ckptkit.verification.reports.results import Check

_SIDES = ("the reference", "the candidate")


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
    problems += _missing_towers(reference, candidate)
    count = len(reference.tensors)
    checks = [
        Check("config", not config, config[0] if config else "the configs agree"),
        Check("tensors", not problems, problems[0] if problems else f"{count} tensors, names and shapes agree"),
    ]
    everything = config + problems
    summary = everything[0] if everything else f"{count} tensors, names, shapes and config agree"
    return LevelResult("structure", not everything, summary, {"tensors": count, "problems": everything}, checks)


def _missing_towers(reference: Checkpoint, candidate: Checkpoint) -> list[str]:
    """What only one of two multimodal models has outside of the text model."""
    if reference.family.text_only is None:
        return []
    left, right = reference.sidecar.extras, candidate.sidecar.extras
    sides = [(name, "candidate" if name in left else "reference") for name in sorted(left.keys() ^ right.keys())]
    return [f"{name} is missing in the {side}" for name, side in sides]


def _used(reference: Checkpoint, candidate: Checkpoint, key: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, reference, candidate) of what the model uses of a tensor: all of it, or the parts beside unused slots."""
    left, right, item = reference.tensors[key], candidate.tensors[key], reference.items[key]
    if not item.slots:
        yield key, left, right
        return
    others = item.unpack(right)
    for name, part in item.unpack(left).items():
        yield f"{key} ({name})", part, others[name]


def _difference(readers: Readers, comparison: Comparison) -> str:
    """What is wrong with a pair that should be equal, or nothing."""
    how = difference(comparison.left, comparison.right, readers=(readers.first, readers.second))
    return "" if how is None else f"{comparison.what}: they {how}"


def check_weights(reference: Checkpoint, candidate: Checkpoint, progress: Progress | None = None) -> LevelResult:
    """Every byte that the model uses equal after translation, streamed; replicated shards and tied copies equal too.

    Where the two differ in dtype, the reference is cast to the candidate's, as a conversion with `--dtype` does.
    """
    replicas = [*reference.comparisons, *candidate.comparisons]
    across = [
        Comparison(left.astype(right.out_dtype), right, what)
        for key in reference.tensors
        for what, left, right in _used(reference, candidate, key)
    ]
    extras = candidate.sidecar.extras
    across += [
        Comparison(left.astype(extras[name].out_dtype), extras[name], name)
        for name, left in reference.sidecar.extras.items()
        if name in extras
    ]
    comparisons = replicas + across
    found = read_all(comparisons, _difference, lambda comparison: comparison.left.nbytes, progress=progress)
    apart, differ = ([text for text in part if text] for part in (found[: len(replicas)], found[len(replicas) :]))
    total = sum(comparison.left.nbytes for comparison in comparisons)
    problems = apart + differ
    cast = sorted(
        {
            f"{tensor.out_dtype} -> {candidate.tensors[key].out_dtype}"
            for key, tensor in reference.tensors.items()
            if tensor.out_dtype != candidate.tensors[key].out_dtype
        }
    )
    how_many = f"{len(problems)} tensors differ" if len(problems) > 1 else "1 tensor differs"
    summary = f"{how_many}: {problems[0]}" if problems else f"{total:,} bytes equal"
    if cast and not problems:
        summary += f" after the cast {', '.join(cast)}"
    details = {"bytes": total, "tensors": len(reference.tensors), "casts": cast, "problems": problems[:20]}
    checks = [
        Check("replicas", not apart, apart[0] if apart else f"{len(replicas)} copies within a side are equal"),
        Check("bytes", not differ, differ[0] if differ else f"{len(across)} tensors are equal"),
    ]
    return LevelResult("weights", not problems, summary, details, checks)
