"""Within its bounds a scale gives every code back from its number; beyond them codes are kept."""

from __future__ import annotations

import numpy as np
import pytest

from ckptkit.dtypes import DTYPES
from ckptkit.io.casts import decode
from ckptkit.io.quantised import Coding
from ckptkit.io.scales import Scales, bounds, survey
from ckptkit.tensors import Tensor

BLOCKS = {"fp8": (1, 256), "mxfp4": (1, 32), "int4": (1, 32)}


def all_codes(kind: str) -> np.ndarray:
    """A row with every code."""
    if kind == "fp8":
        return np.arange(256, dtype=np.uint8)
    return np.arange(16, dtype=np.uint8) * 16 + np.arange(15, -1, -1, dtype=np.uint8)


def comes_back(kind: str, scale: float, dtype: str) -> bool:
    powers = kind == "mxfp4"
    coding = Coding(kind, BLOCKS[kind], DTYPES["F8_E8M0" if powers else "F32"])
    data = np.array([np.log2(scale) + 127], np.uint8) if powers else np.array([scale], np.float32).view(np.uint8)
    codes = all_codes(kind)
    numbers = coding.numbers(codes, data, 1, DTYPES[dtype])
    values = decode(numbers, DTYPES[dtype]).astype(np.float32).reshape(1, -1)
    return bool(np.array_equal(coding.codes(values, data), codes))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_every_code_comes_back_within_the_bounds(kind: str, dtype: str) -> None:
    least, most = bounds(kind, DTYPES[dtype])
    least = max(least, 2.0**-127)
    scales = np.geomspace(least, most, 200).astype(np.float32).clip(np.float32(least), np.float32(most))
    if kind == "mxfp4":
        scales = 2.0 ** np.arange(np.ceil(np.log2(least)), np.floor(np.log2(most)) + 1)
    assert all(comes_back(kind, float(scale), dtype) for scale in scales)


@pytest.mark.parametrize(("kind", "scale"), [("fp8", 2.0**-130), ("fp8", 2.0**121), ("int4", 2.0**-140)])
def test_beyond_them_codes_are_lost(kind: str, scale: float) -> None:
    assert not comes_back(kind, scale, "BF16")


@pytest.mark.parametrize("bad", [0.0, -0.0, np.inf, np.nan, 2.0**-130, 2.0**121])
def test_the_codes_that_are_kept(bad: float) -> None:
    good = np.linspace(1e-4, 1e2, 12, dtype=np.float32)
    good[3] *= -1
    odd = good.copy()
    odd[7] = bad
    found = {
        name: Scales(name, "fp8", Tensor.from_bytes(data.tobytes(), DTYPES["F32"], (3, 4)))
        for name, data in (("good", good), ("odd", odd))
    }
    digest, apart = survey(list(found.values()), {}, DTYPES["BF16"])
    assert apart == {"odd"}
    other, _ = survey(list(found.values()), {"more": found["good"].scales}, DTYPES["BF16"])
    again, _ = survey(list(found.values())[::-1], {}, DTYPES["BF16"], threads=1)
    assert digest == again != other and len(digest) == 64
