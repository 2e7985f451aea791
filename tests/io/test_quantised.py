"""Numbers as computed codes and scales, in tiles that do not end where blocks do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ckptkit.dtypes import DTYPES
from ckptkit.io.quantised import Coding, Likeness, Verdict, quantised
from ckptkit.io.reading import read_tensor
from ckptkit.tensors import Tensor
from tests.quantised import read_fp8, read_mxfp4


def stored(values: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(values).bfloat16()
    return Tensor.from_bytes(tensor.view(torch.uint8).numpy().tobytes(), DTYPES["BF16"], values.shape)


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("block", [(128, 128), (3000, 1700), (1, 1700), (1111, 128)])
def test_tiles_and_tall_blocks(block: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptkit.io.computed.TILE", 1 << 17)
    monkeypatch.setattr("ckptkit.io.quantised.TILE", 1 << 17)
    monkeypatch.setattr("ckptkit.io.quantised.LARGEST", 1 << 18)
    numbers = stored(weights(3000, 1700))
    exact = torch.frombuffer(bytearray(read_tensor(numbers)), dtype=torch.bfloat16).reshape(3000, 1700).float().numpy()
    codes, scales = quantised("a", numbers, Coding("fp8", block, DTYPES["F32"]))
    found = read_tensor(scales).view(np.float32).reshape(scales.shape)
    for down, across in np.ndindex(*scales.shape):
        rows, columns = slice(down * block[0], (down + 1) * block[0]), slice(across * block[1], (across + 1) * block[1])
        assert found[down, across] == np.abs(exact[rows, columns]).max() / np.float32(448)
    again = read_fp8(read_tensor(codes).reshape(codes.shape), found, block)
    assert (np.abs(again - exact) <= np.abs(exact) * 2**-4 + np.abs(exact).max() * 2**-18).all()


def test_mxfp4() -> None:
    numbers = stored(weights(700, 96))
    codes, scales = quantised("a", numbers, Coding("mxfp4", (1, 32), DTYPES["U8"]))
    blocks, powers = read_tensor(codes).reshape(700, 3, 16), read_tensor(scales).reshape(700, 3)
    exact = torch.frombuffer(bytearray(read_tensor(numbers)), dtype=torch.bfloat16).reshape(700, 96).float().numpy()
    step = np.repeat(np.float32(2.0) ** (powers.astype(np.float32) - 127), 32, axis=1)
    assert (np.abs(read_mxfp4(blocks, powers) - exact) <= 2 * step).all()


def test_verdicts() -> None:
    numbers, coding = stored(weights(500, 256)), Coding("fp8", (128, 128), DTYPES["F32"])
    codes, scales = quantised("a", numbers, coding)
    old = Tensor.from_bytes(read_tensor(codes).tobytes(), codes.dtype, codes.shape)
    old_scales = Tensor.from_bytes(read_tensor(scales).tobytes(), scales.dtype, scales.shape)
    same = read_fp8(
        read_tensor(codes).reshape(500, 256), read_tensor(scales).view(np.float32).reshape(4, 2), (128, 128)
    )
    fits, new = same.copy(), same.copy()
    fits[:128, :128] = same[:128, :128].T
    new[499, 0] = 55.5
    for values, verdict in ((same, Verdict.SAME), (fits, Verdict.FITS), (new, Verdict.NEW)):
        likeness = Likeness("a", stored(values), coding, old, old_scales)
        assert likeness() == verdict == likeness()
        found, found_scales = quantised("a", likeness.numbers, coding, likeness)
        pairs = ((found, old), (found_scales, old_scales))
        kept = [read_tensor(left).tobytes() == read_tensor(right).tobytes() for left, right in pairs]
        assert kept == {Verdict.SAME: [True, True], Verdict.FITS: [False, True], Verdict.NEW: [False, False]}[verdict]
        assert (likeness.moved() == (0.0, 0.0)) == (verdict == Verdict.SAME)
