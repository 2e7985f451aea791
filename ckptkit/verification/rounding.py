"""Weights that the candidate stores in a narrower type: the reference is judged with weights rounded to it, too.

`verify F32 BF16` asks whether the candidate is the model that the conversion with `--dtype bfloat16` makes. How far
such a model is from the one in float32 is no question of conversion.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.dtypes import DTYPES_BY_TORCH_NAME, TORCH_DTYPE_NAMES, DType
from ckptkit.errors import VerificationError
from ckptkit.inspection.values import common_type
from ckptkit.io.castable import CASTABLE

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

EVERY = "*"
"""Stands for all weights."""


@dataclass(frozen=True)
class Rounding:
    """How a side's weights are rounded before it runs in float32.

    Attributes:
        dtypes: Name of a weight, or `EVERY` -> torch's name of the type that it is rounded to.
        casts: The casts in words, as `F32 -> BF16`.
    """

    dtypes: dict[str, str] = field(default_factory=dict)
    casts: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"the reference ran with its weights rounded as the candidate stores them ({', '.join(self.casts)})"


def loses(source: DType, target: DType) -> bool:
    """Whether a cast between floating-point types rounds."""
    castable = {source.name, target.name} <= set(CASTABLE)
    return castable and common_type(source, target) != target


def rounding_of(reference: Checkpoint, candidate: Checkpoint, *, hf_names: bool) -> Rounding:
    """The rounding of the reference's weights to the candidate's types.

    Args:
        reference: The side that is trusted.
        candidate: The side in question.
        hf_names: Whether weights are called by their Hugging Face names, or by canonical ones.
    """
    targets: dict[str, DType | None] = {}
    casts = set()
    for key in reference.tensors.keys() & candidate.tensors.keys():
        source, target = reference.tensors[key].out_dtype, candidate.tensors[key].out_dtype
        rounded = loses(source, target)
        if rounded:
            casts.add(f"{source} -> {target}")
        for name in reference.items[key].parts if hf_names else [key]:
            targets[name] = target if rounded else None
    if not casts:
        return Rounding()
    kinds = set(targets.values())
    if len(kinds) == 1:
        (only,) = kinds
        targets = {EVERY: only}
    names = {name: TORCH_DTYPE_NAMES[target] for name, target in sorted(targets.items()) if target is not None}
    return Rounding(names, tuple(sorted(casts)))


def rounding_to(stored: Checkpoint) -> Rounding:
    """The rounding of float32 weights to the types in which a model stores them, by Hugging Face names."""
    wide = DTYPES_BY_TORCH_NAME["float32"]
    types = {name: stored.tensors[key].out_dtype for key, item in stored.items.items() for name in item.parts}
    rounded = {name: TORCH_DTYPE_NAMES[dtype] for name, dtype in types.items() if loses(wide, dtype)}
    if len(rounded) == len(types) and len(set(rounded.values())) == 1:
        rounded = {EVERY: next(iter(rounded.values()))}
    return Rounding(rounded, tuple(sorted({f"{wide} -> {types[name]}" for name in types if loses(wide, types[name])})))


def round_model(model: torch.nn.Module, dtypes: Mapping[str, str], where: object) -> None:
    """Rounds a model's weights in place.

    Args:
        model: The model, in float32.
        dtypes: As `Rounding.dtypes`.
        where: Name of the model in an error.

    Raises:
        VerificationError: The weights of the model have other names than in its files, so the narrower ones among them
            cannot be found.
    """
    import torch

    weights = model.state_dict()
    if EVERY in dtypes:
        dtypes = {name: dtypes[EVERY] for name, weight in weights.items() if weight.is_floating_point()}
    if missing := sorted(dtypes.keys() - weights.keys()):
        raise VerificationError(
            f"only some weights of the candidate are in a narrower type, and transformers calls {missing[0]} otherwise",
            where=where,
            hint="compare with a reference in the candidate's types (ckptkit convert --dtype)",
        )
    with torch.no_grad():
        for name, dtype in dtypes.items():
            weights[name].copy_(weights[name].to(getattr(torch, dtype)))
