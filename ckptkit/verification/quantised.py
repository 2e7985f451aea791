"""The noise of quantised weights: how far a number may be from the one that was quantised.

The bounds follow from the formats. A number of E4M3 with a normal exponent is within 2^-4 of its magnitude, half a step
of its three bits; below that within half of the smallest step, 2^-10 of the scale; E2M1 has one bit, INT4 steps of one
scale. The scale of a bound is the one that the reference's numbers ask for, so a wrong scale in the candidate is no
excuse: FP8 may have the next power of two, and INT4 one of 7 steps in place of 7.5 up to the largest magnitude.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.errors import UsageError
from ckptkit.formats.quantised.scheme import FP8, INT4
from ckptkit.formats.quantised.stored import Stored
from ckptkit.io.computed import recast
from ckptkit.io.dequantised import slices
from ckptkit.tensors import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_SLACK = 1 + 2.0**-6
"""For the rounding of numbers and scales to bfloat16."""
_ROWS = 1 << 20


@dataclass
class Noise:
    """The difference between a quantised tensor and the numbers that it was made from.

    Attributes:
        beyond: Numbers that no rounding of the format explains.
        largest: The largest difference, as a share of what the format explains.
        squares: Sum of squared differences.
        size: Sum of squared numbers of the reference.
    """

    beyond: int = 0
    largest: float = 0.0
    squares: float = 0.0
    size: float = 0.0

    @property
    def relative(self) -> float:
        """RMS of the difference / RMS of the reference."""
        return float((self.squares / self.size) ** 0.5) if self.size else 0.0


def stored_of(checkpoint: Checkpoint) -> dict[str, Stored]:
    """Name in the tables -> quantised tensor, of a Hugging Face directory whose weights are quantised."""
    quantised = checkpoint.sidecar.quantised if checkpoint.format == "hf" else None
    return {} if quantised is None else {item.name: item for item in quantised.stored.values()}


def refuse_to_run(checkpoint: Checkpoint, which: str) -> None:
    """Refuses levels at which models run, for a directory whose weights are quantised.

    Raises:
        UsageError: They are.
    """
    if stored_of(checkpoint):
        raise UsageError(
            f"{which} is quantised: no level above weights runs it",
            where=checkpoint.path,
            hint="take --level weights, or convert it with --to hf first",
        )


def noise(reference: Tensor, item: Stored) -> Noise:
    """How far a quantised tensor is from the numbers of a reference.

    Args:
        reference: Its numbers, in its shape.
        item: The quantised tensor.
    """
    if reference.cast is not None:
        reference = recast(reference, reference.cast)
    candidate = item.numbers(reference.out_dtype)
    found = Noise()
    for left, right in zip(slices(reference), slices(candidate), strict=True):
        _add(found, left, right, item)
    return found


def _add(found: Noise, reference: Tensor, candidate: Tensor, item: Stored) -> None:
    import numpy as np

    from ckptkit.io.computed import numbers

    rows, columns = reference.shape
    height = min(item.block[0], rows)
    step = max(_ROWS // (height * columns), 1) * height
    for top in range(0, rows, step):
        bottom = min(top + step, rows)
        exact = numbers(reference.rows(top, bottom)).astype(np.float32)
        with np.errstate(all="ignore"):
            apart = np.abs(numbers(candidate.rows(top, bottom)).astype(np.float32) - exact)
            share = apart / bounds(exact, item)
        share[apart == 0] = 0
        found.beyond += int(np.count_nonzero(~(share <= 1)))
        found.largest = max(found.largest, float(np.nan_to_num(share, nan=np.inf).max(initial=0)))
        found.squares += float(np.square(apart, dtype=np.float64).sum())
        found.size += float(np.square(exact, dtype=np.float64).sum())


def bounds(exact: Floats, item: Stored) -> Floats:
    """How far each number may be from the one that a format makes of it.

    Args:
        exact: Rows of numbers, the first of which begins a block.
        item: The format and its blocks.
    """
    import numpy as np

    from ckptkit.io.codes import largest_of_blocks

    height, width = item.block
    largest = largest_of_blocks(exact, item.block)
    largest = np.repeat(np.repeat(largest, height, axis=0), width, axis=1)[: len(exact), : exact.shape[1]]
    if item.kind == FP8:
        found = np.maximum(np.abs(exact) * np.float32(2.0**-4), largest * np.float32(2.0**-9 / 448))
    elif item.kind == INT4:
        found = largest / np.float32(14)
    else:
        found = np.maximum(np.abs(exact), largest / np.float32(4)) * np.float32(2.0**-2)
    tolerated: Floats = found * np.float32(_SLACK)
    return tolerated
