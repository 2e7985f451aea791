"""Scales of quantised tensors, read once: their SHA-256, and which of them give codes back from numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckptkit.dtypes import DType
from ckptkit.io.codes import scale_numbers
from ckptkit.io.threads import Readers, read_all
from ckptkit.tensors import Tensor

Bytes = NDArray[np.uint8]

_MAGNITUDES = {"fp8": (2.0**-9, 448.0), "mxfp4": (0.5, 6.0), "int4": (1.0, 8.0)}
"""Kind -> the smallest magnitude of a code that is not 0, and the largest."""
_RANGES = {"BF16": (2.0**-133, 2.0**127), "F16": (2.0**-24, 2.0**15), "F32": (2.0**-149, 2.0**127)}
"""Type of numbers -> its smallest magnitude, and a power of two that it holds. Numbers in F64 are products in F32."""
_STEPS = 4
"""The smallest number of a code, in steps of the type: rounding then moves no code to its neighbour."""


@dataclass(frozen=True)
class Scales:
    """The scales of a quantised tensor.

    Attributes:
        codes: Name of the codes, which names the tensor.
        kind: `fp8`, `mxfp4` or `int4`.
        scales: The scales.
    """

    codes: str
    kind: str
    scales: Tensor


def bounds(kind: str, dtype: DType) -> tuple[float, float]:
    """The smallest and the largest magnitude of a scale with which all codes follow from the numbers.

    A code is rounded to its number once, which moves it by less than half of the format's step: requantised with the
    same scale the number gives the code again. That fails where the type has too few numbers near 0, or ends.

    Args:
        kind: `fp8`, `mxfp4` or `int4`.
        dtype: The type of the numbers.
    """
    least, most = _MAGNITUDES[kind]
    smallest, largest = _RANGES.get(dtype.name, _RANGES["F32"])
    return _STEPS * smallest / least, largest / most


def survey(
    scales: list[Scales], others: Mapping[str, Tensor], dtype: DType, threads: int | None = None
) -> tuple[str, frozenset[str]]:
    """The SHA-256 of what is stored beside codes, in hexadecimal, and the codes that do not follow from numbers.

    Args:
        scales: The scales of every quantised tensor.
        others: Stored name -> tensor of what else belongs to codes; the SHA-256 covers it.
        dtype: The type of the numbers.
        threads: How many threads read, as of `read_all`.

    Raises:
        InputError: A file is gone or ends early.
        StorageError: A file cannot be read.
    """
    tasks = [(one.codes, one.kind, one.scales) for one in scales]
    tasks += [(name, "", tensor) for name, tensor in others.items()]

    def read(readers: Readers, task: tuple[str, str, Tensor]) -> tuple[str, bool]:
        _, kind, tensor = task
        digest, sound = hashlib.sha256(), True
        for chunk in readers.first.chunks(tensor):
            digest.update(chunk.data)
            sound = sound and (not kind or _within(chunk, tensor.dtype, bounds(kind, dtype)))
        return digest.hexdigest(), sound

    found = read_all(tasks, read, lambda task: task[2].nbytes, threads=threads)
    whole = hashlib.sha256()
    for (name, _, _), (digest, _) in sorted(zip(tasks, found, strict=True), key=lambda pair: pair[0][:2]):
        whole.update(f"{name}\0{digest}\n".encode())
    return whole.hexdigest(), frozenset(task[0] for task, (_, sound) in zip(tasks, found, strict=True) if not sound)


def _within(data: Bytes, dtype: DType, limits: tuple[float, float]) -> bool:
    """Whether the magnitudes of all scales lie within limits; NaN lies nowhere."""
    with np.errstate(all="ignore"):
        magnitudes = np.abs(scale_numbers(data, dtype))
    return bool(((magnitudes >= limits[0]) & (magnitudes <= limits[1])).all())
