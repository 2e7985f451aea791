"""Bytes that are made on demand are made a few rows at a time, where only columns of wide rows are wanted."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ckptkit.dtypes import DTYPES
from ckptkit.io.gather import Gatherer, Placement
from ckptkit.io.source import Sources
from ckptkit.tensors import Tensor

ROWS, WIDTH, SCRATCH = 50, 1000, 4000


@dataclass(eq=False)
class Counted:
    """Bytes that say where they are, and how many were asked for at once."""

    asked: list[int] = field(default_factory=list)
    digest: str = "counted"
    files: tuple[str, ...] = ()

    def __len__(self) -> int:
        return ROWS * WIDTH

    def read(self, start: int, stop: int) -> bytes:
        self.asked.append(stop - start)
        return (np.arange(start, stop) % 251).astype(np.uint8).tobytes()


def test_columns_of_made_bytes() -> None:
    made = Counted()
    whole = Tensor.from_bytes(made, DTYPES["U8"], (ROWS, WIDTH))
    (piece,) = whole.cols(100, 130).bands[0].pieces
    out = np.empty(ROWS * 30, np.uint8)
    with Sources() as sources:
        Gatherer(sources, SCRATCH).fill([Placement(piece, 0, 30)], out)
    expected = (np.arange(ROWS * WIDTH) % 251).astype(np.uint8).reshape(ROWS, WIDTH)[:, 100:130]
    assert np.array_equal(out.reshape(ROWS, 30), expected)
    assert max(made.asked) <= SCRATCH and len(made.asked) == -(-ROWS // (SCRATCH // WIDTH))


def test_rows_of_made_bytes_are_made_at_once() -> None:
    made = Counted()
    (piece,) = Tensor.from_bytes(made, DTYPES["U8"], (ROWS, WIDTH)).rows(3, 40).bands[0].pieces
    out = np.empty(37 * WIDTH, np.uint8)
    with Sources() as sources:
        Gatherer(sources, SCRATCH).fill([Placement(piece, 0, WIDTH)], out)
    assert made.asked == [37 * WIDTH]
    assert out.tobytes() == made.read(3 * WIDTH, 40 * WIDTH)
