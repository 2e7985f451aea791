"""The two levels that need no forward pass: do both describe the same model, and are its weights the same bytes?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

from ckptkit.checkpoint import Checkpoint
from ckptkit.errors import InputError
from ckptkit.families.config import LayerConfig, ModelConfig
from ckptkit.io.engine import compare
from ckptkit.io.plan import Comparison
from ckptkit.verification.report import LevelResult

_NOT_THE_MODEL = {"dtype", "init_std", "max_position_embeddings", "layers"}
"""Fields of a `ModelConfig` that change no logit."""


def check_structure(reference: Checkpoint, candidate: Checkpoint) -> LevelResult:
    """Names, shapes and config of one side against the other; opening has checked each against its own config."""
    problems = [*_config_problems(reference.config, candidate.config), *candidate.disagreements]
    problems += [f"reference: {text}" for text in reference.disagreements]
    for key in reference.tensors.keys() ^ candidate.tensors.keys():
        side = "candidate" if key in reference.tensors else "reference"
        problems.append(f"{key} is missing in the {side}")
    for key in reference.tensors.keys() & candidate.tensors.keys():
        left, right = reference.tensors[key].shape, candidate.tensors[key].shape
        if left != right:
            problems.append(f"{key} is {list(left)} in the reference, {list(right)} in the candidate")
    count = len(reference.tensors)
    summary = problems[0] if problems else f"{count} tensors, names, shapes and config agree"
    return LevelResult("structure", not problems, summary, {"tensors": count, "problems": problems})


def _config_problems(reference: ModelConfig, candidate: ModelConfig) -> list[str]:
    problems = [
        f"{name} is {getattr(reference, name)!r} in the reference, {getattr(candidate, name)!r} in the candidate"
        for name in (f.name for f in fields(ModelConfig) if f.name not in _NOT_THE_MODEL)
        if getattr(reference, name) != getattr(candidate, name)
    ]
    if reference.num_layers != candidate.num_layers:
        problems.append(f"{reference.num_layers} layers in the reference, {candidate.num_layers} in the candidate")
        return problems
    for index, (left, right) in enumerate(zip(reference.layers, candidate.layers, strict=True)):
        for name in (f.name for f in fields(LayerConfig) if getattr(left, f.name) != getattr(right, f.name)):
            values = f"{getattr(left, name)} in the reference, {getattr(right, name)} in the candidate"
            return [*problems, f"layer {index}: {name} is {values}"]
    return problems


def check_weights(
    reference: Checkpoint, candidate: Checkpoint, progress: Callable[[int, int], None] | None = None
) -> LevelResult:
    """Every byte equal after translation, streamed; replicated shards and tied copies equal too.

    Where the two differ in dtype, the reference is cast to the candidate's, as a conversion with `--dtype` does.
    """
    comparisons = [
        *reference.comparisons,
        *candidate.comparisons,
        *(
            Comparison(tensor.astype(candidate.tensors[key].out_dtype), candidate.tensors[key], key)
            for key, tensor in reference.tensors.items()
        ),
    ]
    total = sum(comparison.left.nbytes for comparison in comparisons)
    done, problems = 0, []
    for comparison in comparisons:
        try:
            compare(comparison)
        except InputError as error:
            problems.append(str(error))
        done += comparison.left.nbytes
        if progress is not None:
            progress(done, total)
    cast = sorted(
        {
            f"{tensor.out_dtype} -> {candidate.tensors[key].out_dtype}"
            for key, tensor in reference.tensors.items()
            if tensor.out_dtype != candidate.tensors[key].out_dtype
        }
    )
    summary = f"{len(problems)} tensors differ, first: {problems[0]}" if problems else f"{total:,} bytes equal"
    if cast and not problems:
        summary += f" after the cast {', '.join(cast)}"
    details = {"bytes": total, "tensors": len(reference.tensors), "casts": cast, "problems": problems[:20]}
    return LevelResult("weights", not problems, summary, details)
