"""Whether the bytes of weights are numbers by themselves: FP8 and packed integers are none without their scales."""

from __future__ import annotations

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.errors import UnsupportedError

WEIGHTS = ("F64", "F32", "F16", "BF16")
"""Element types that weights have; of all others the numbers need scales, or a table, to be any."""


def check_element_types(checkpoint: Checkpoint) -> None:
    """Refuses weights whose element type says that something is missing, whatever config.json says of them.

    Raises:
        UnsupportedError: They are FP8, or integers. Beside the model there may be integers.
    """
    odd = {
        name: tensor.dtype
        for key, tensor in checkpoint.tensors.items()
        if tensor.dtype.name not in WEIGHTS
        for name in checkpoint.items[key].parts
    }
    odd |= {name: tensor.dtype for name, tensor in checkpoint.sidecar.extras.items() if tensor.dtype.name[:2] == "F8"}
    if odd:
        name, dtype = min(odd.items())
        kind = "FP8 without the scales that it is to be multiplied by" if dtype.name[:2] == "F8" else "no weight"
        raise UnsupportedError(
            f"{name} is {dtype}, which is {kind} ({len(odd):,} such tensors)",
            where=checkpoint.path,
            hint="convert from the unquantised model",
        )
