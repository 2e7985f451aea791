"""Numbers as quantised tensors: codes and scales as computed ones, new or those of a reference.

A tensor that is still what a reference holds gets the reference's codes and scales. Whether it is shows only when its
bytes pass, so a `Likeness` reads all of it before the first of them is written; its threads share that work.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from ckptkit.dtypes import DTYPES, DType
from ckptkit.errors import InputError
from ckptkit.io.cache import Cache
from ckptkit.io.computed import BLOCK, TILE, Once, made, tile_rows
from ckptkit.io.dequantised import LARGEST
from ckptkit.tensors import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Floats = NDArray[np.float32]
    Values = NDArray[np.float32] | NDArray[np.float64]


CODES = {"fp8": ("F8_E4M3", 1), "mxfp4": ("U8", 2), "int4": ("I32", 8)}
"""Kind -> type of an element of codes, and the numbers in it."""


_scales: Cache[Bytes] = Cache(8 << 20, lambda found: found.nbytes)
"""New scales by tensor and first row of blocks of a tile of codes."""


class NotFiniteError(Exception):
    """A block has a number that is not finite."""


@dataclass(frozen=True)
class Coding:
    """How numbers become codes and scales.

    Attributes:
        kind: `fp8`, `mxfp4` or `int4`.
        block: Height and width of the blocks that share a scale.
        scales: Type of the scales.
        powers: Whether new scales of `fp8` are powers of two.
    """

    kind: str
    block: tuple[int, int]
    scales: DType
    powers: bool = False

    def new_scales(self, values: Floats) -> Bytes:
        """The bytes of the scales for rows of numbers, the first of which begins a block; errors as `scales_for`."""
        return self.scales_for(self.largest(values))

    def largest(self, values: Floats) -> Floats:
        """The largest magnitude of each block of rows of numbers, the first of which begins a block."""
        from ckptkit.io.codes import largest_of_blocks, largest_of_groups

        return largest_of_blocks(values, self.block) if self.kind == "fp8" else largest_of_groups(values, self.block[1])

    def scales_for(self, largest: Floats) -> Bytes:
        """The bytes of the scales for blocks with these largest magnitudes.

        Raises:
            NotFiniteError: One is not finite, or its scale is beyond the range of the scales' type: none serves its
                block.
        """
        import numpy as np

        from ckptkit.io.codes import mxfp4_scales, scale_numbers

        if not np.isfinite(largest).all():
            raise NotFiniteError
        if self.kind == "mxfp4":
            return mxfp4_scales(largest).reshape(-1)
        found = self._encoded_scales(largest)
        with np.errstate(all="ignore"):
            numbers = scale_numbers(found, self.scales).reshape(-1)
        if not np.isfinite(numbers).all() or ((numbers == 0) & (largest.reshape(-1) > 0)).any():
            raise NotFiniteError
        return found

    def _encoded_scales(self, largest: Floats) -> Bytes:
        import numpy as np

        from ckptkit.io.casts import encode
        from ckptkit.io.codes import fp8_scales, int4_scales

        if self.kind == "int4":
            return encode(int4_scales(largest, self.scales), self.scales)
        found = fp8_scales(largest, powers=self.powers or self.scales.itemsize == 1)
        if self.scales.itemsize == 1:
            return (np.frexp(found)[1] + 126).astype(np.uint8).reshape(-1)
        return encode(found, self.scales)

    def codes(self, values: Floats, scales: Bytes, above: int = 0) -> Bytes:
        """The bytes of the codes for rows of numbers. The numbers are lost.

        Args:
            values: [rows, columns].
            scales: Bytes of the scales of their blocks.
            above: Rows of the first blocks that are above the first row.
        """
        from ckptkit.io.codes import scale_numbers, to_fp8, to_int4, to_mxfp4

        if self.kind == "mxfp4":
            return to_mxfp4(values, scales.reshape(len(values), -1))
        numbers = scale_numbers(scales, self.scales)
        if self.kind == "int4":
            return to_int4(values, numbers.reshape(len(values), -1), self.block[1])
        return to_fp8(values, numbers.reshape(-1, -(-values.shape[1] // self.block[1])), self.block, above)

    def numbers(self, codes: Bytes, scales: Bytes, rows: int, dtype: DType, above: int = 0) -> Bytes:
        """The bytes of the numbers that the codes of rows stand for; arguments as of `codes`."""
        from ckptkit.io.codes import from_fp8, from_int4, from_mxfp4, scale_numbers

        packed = codes.reshape(rows, -1)
        if self.kind == "mxfp4":
            return from_mxfp4(packed, scales.reshape(rows, -1), dtype)
        found = scale_numbers(scales, self.scales)
        if self.kind == "int4":
            return from_int4(packed, found.reshape(rows, -1), self.block[1], dtype)
        return from_fp8(packed, found.reshape(-1, -(-packed.shape[1] // self.block[1])), self.block, dtype, above)


class Verdict(IntEnum):
    """What a tensor is to the one of a reference, worst last."""

    SAME = 0
    """Its bits are those of the reference."""
    FITS = 1
    """The scales of the reference represent it without loss."""
    NEW = 2
    """It needs new scales."""


class Likeness:
    """A matrix of numbers beside the codes and scales of a reference, or beside its scales alone.

    Without codes it is the same if requantising it with the scales and dequantising gives its bits back.

    Args:
        name: Its name, for messages.
        numbers: The numbers.
        coding: How the reference is quantised.
        codes: The codes of the reference, as many rows of bytes as `numbers` has rows; None if only scales are known.
        scales: Its scales, as rows for rows of blocks.
    """

    def __init__(self, name: str, numbers: Tensor, coding: Coding, codes: Tensor | None, scales: Tensor) -> None:
        self.name, self.numbers, self.coding, self.codes, self.scales = name, numbers, coding, codes, scales
        height = coding.block[0]
        self._tiles = iter(_tiles(numbers.shape, height if height * numbers.shape[1] <= LARGEST else 1))
        self._state = threading.Condition()
        self._running = 0
        self._worst = Verdict.SAME
        self._error: BaseException | None = None

    def __call__(self) -> Verdict:
        """The verdict on the whole matrix. Every thread that asks compares some tiles, until all are done."""
        while (tile := self._next()) is not None:
            error, found = None, Verdict.NEW
            try:
                found = self.of_rows(*tile)[0]
            except BaseException as caught:
                error = caught
            with self._state:
                self._running -= 1
                self._worst = max(self._worst, found)
                self._error = self._error or error
                self._state.notify_all()
        with self._state:
            self._state.wait_for(lambda: not self._running)
            if self._error is not None:
                raise self._error
            return self._worst

    def _next(self) -> tuple[int, int] | None:
        with self._state:
            tile = None if self._worst == Verdict.NEW or self._error is not None else next(self._tiles, None)
            self._running += tile is not None
            return tile

    def of_rows(self, start: int, stop: int) -> tuple[Verdict, Bytes]:
        """The verdict on rows, and their codes if the old scales serve."""
        import numpy as np

        from ckptkit.io.casts import decode
        from ckptkit.io.reading import read_tensor

        coding, dtype, above = self.coding, self.numbers.out_dtype, start % self.coding.block[0]
        found, scales = read_tensor(self.numbers.rows(start, stop)), self.scales_of(start, stop)
        if self.codes is not None:
            codes = read_tensor(self.codes.rows(start, stop))
            if _equal(found, coding.numbers(codes, scales, stop - start, dtype, above)):
                return Verdict.SAME, codes
        values = decode(found, dtype).astype(np.float32).reshape(stop - start, -1)
        codes = coding.codes(values, scales, above)
        fits = _equal(found, coding.numbers(codes, scales, stop - start, dtype, above))
        return (Verdict.FITS if self.codes is not None else Verdict.SAME) if fits else Verdict.NEW, codes

    def old_codes(self, verdict: Verdict, start: int, stop: int) -> Bytes:
        """The codes of rows for the scales of the reference, after a verdict that these serve."""
        from ckptkit.io.reading import read_tensor

        if verdict == Verdict.SAME and self.codes is not None:
            return read_tensor(self.codes.rows(start, stop))
        above = start % self.coding.block[0]
        return self.coding.codes(_values(self.numbers, start, stop), self.scales_of(start, stop), above)

    def scales_of(self, start: int, stop: int) -> Bytes:
        """The bytes of the reference's scales for rows."""
        from ckptkit.io.reading import read_tensor

        height = self.coding.block[0]
        return read_tensor(self.scales.rows(start // height, -(-stop // height)))

    def moved(self) -> tuple[float, float] | tuple[None, None]:
        """How far the numbers moved from those of the reference: (largest difference, RMS of it / RMS of these).

        None where the codes of the reference are not known. Elements for which it has no finite number are left out:
        its scale may be none.
        """
        import numpy as np

        from ckptkit.io.casts import decode
        from ckptkit.io.reading import read_tensor

        if self.codes is None:
            return None, None
        most, squares, size, dtype = 0.0, 0.0, 0.0, self.numbers.out_dtype
        height = self.coding.block[0]
        for start, stop in _tiles(self.numbers.shape, height if height * self.numbers.shape[1] <= LARGEST else 1):
            above, codes = start % self.coding.block[0], read_tensor(self.codes.rows(start, stop))
            raw = self.coding.numbers(codes, self.scales_of(start, stop), stop - start, dtype, above)
            new, part = read_tensor(self.numbers.rows(start, stop)), BLOCK * dtype.itemsize
            for at in range(0, len(raw), part):
                found = _distance(decode(raw[at : at + part], dtype), decode(new[at : at + part], dtype))
                most = float(np.maximum(most, found[0]))
                squares, size = squares + found[1], size + found[2]
        return most, (squares / size) ** 0.5 if size else float(squares > 0)


def _equal(left: Bytes, right: Bytes) -> bool:
    """Whether bytes are equal; eight are compared at a time."""
    import numpy as np

    whole = len(left) // 8 * 8
    return (
        len(left) == len(right)
        and np.array_equal(left[:whole].view(np.uint64), right[:whole].view(np.uint64))
        and np.array_equal(left[whole:], right[whole:])
    )


def _distance(old: Values, new: Values) -> tuple[float, float, float]:
    """(Largest difference, sum of squared differences, sum of squares of `old`), where `old` is finite."""
    import numpy as np

    with np.errstate(all="ignore"):
        finite = np.isfinite(old)
        if not finite.all():
            old, new = old[finite], new[finite]
        difference = np.subtract(new, old, dtype=np.float64)
        most = max(difference.max(initial=0), -difference.min(initial=0))
        old = old.astype(np.float64, copy=False)
        return float(most), float(np.dot(difference, difference)), float(np.dot(old, old))


def compared_with_reference(likenesses: Sequence[Likeness], threads: int | None = None) -> dict[str, object]:
    """The verdicts on tensors, and how far those moved that are not what the reference holds.

    Args:
        likenesses: The tensors.
        threads: How many threads read, as of `read_all`.
    """
    from ckptkit.io.threads import read_all

    def judge(_: object, likeness: Likeness) -> tuple[Verdict, tuple[float, float] | tuple[None, None]]:
        verdict = likeness()
        return verdict, likeness.moved() if verdict == Verdict.NEW else (0.0, 0.0)

    found = read_all(likenesses, judge, lambda likeness: likeness.numbers.nbytes, threads=threads)
    verdicts = [(likeness, verdict) for likeness, (verdict, _) in zip(likenesses, found, strict=True)]
    new = [
        (one.name, *moved) for one, (verdict, moved) in zip(likenesses, found, strict=True) if verdict == Verdict.NEW
    ]
    return {
        "same": sum(verdict == Verdict.SAME for _, verdict in verdicts),
        "old_scales": [likeness.name for likeness, verdict in verdicts if verdict == Verdict.FITS],
        "new_scales": [
            {"tensor": name, "max_abs_difference": most, "relative_rms": share} for name, most, share in new
        ],
    }


def quantised(name: str, numbers: Tensor, coding: Coding, likeness: Likeness | None = None) -> tuple[Tensor, Tensor]:
    """A matrix of numbers as codes and scales.

    Args:
        name: Its name, for messages.
        numbers: [rows, columns] of F64, F32, F16 or BF16.
        coding: How to quantise.
        likeness: The same matrix beside a reference whose codes and scales it keeps where it can; None: all are new.

    Returns:
        The codes, a matrix of `rows`, and the scales, [rows of blocks, columns of blocks].
    """
    rows, columns = numbers.shape
    height, width = coding.block
    grid = (-(-rows // height), -(-columns // width))
    inputs = [numbers] if likeness is None else [numbers, likeness.scales]
    inputs += [] if likeness is None or likeness.codes is None else [likeness.codes]
    what = ("quantised", coding, likeness is not None, len(inputs))

    tall = height * columns > LARGEST

    def new_scales(start: int, stop: int, values: Floats | None = None) -> Bytes:
        """The bytes of the scales of rows of blocks, for these numbers of theirs."""
        try:
            if not tall:
                return coding.new_scales(_values(numbers, start * height, stop * height) if values is None else values)
            size = coding.scales.itemsize * grid[1]
            return scales_of_tall()[start * size : stop * size]
        except NotFiniteError:
            what = f"{name} has numbers for which {coding.scales} has no scale: not finite, too large or too small"
            raise InputError(what) from None

    scales_of_tall = Once(lambda: coding.scales_for(_largest(numbers, coding)))

    def make_codes(start: int, stop: int) -> Bytes:
        if likeness is not None and (verdict := likeness()) != Verdict.NEW:
            return likeness.old_codes(verdict, start, stop)
        values = _values(numbers, start, stop)
        first, last = start // height, -(-stop // height)
        scales = new_scales(first, last) if tall else scales_of_tile(first, last, values)
        return coding.codes(values, scales, start % height)

    def scales_of_tile(start: int, stop: int, values: Floats | None = None) -> Bytes:
        """Scales for a tile of codes. Codes and scales are written one after the other: they are found once."""
        return _scales.get((this, start), lambda: new_scales(start, stop, values))

    def make_scales(start: int, stop: int) -> Bytes:
        import numpy as np

        if likeness is not None and likeness() != Verdict.NEW:
            return likeness.scales_of(start * height, min(stop * height, rows))
        if tall:
            return new_scales(start, stop)
        step, size = tile_rows(shape[1], height, TILE // in_element) // height, coding.scales.itemsize * grid[1]
        first = start // step * step
        found = [scales_of_tile(row, min(row + step, grid[0])) for row in range(first, stop, step)]
        return np.concatenate(found)[(start - first) * size : (stop - first) * size]

    this = object()
    dtype, in_element = CODES[coding.kind]
    unit = 1 if tall else height
    shape = (rows, columns // in_element)
    codes = made(DTYPES[dtype], shape, inputs, ("codes", *what), make_codes, unit, tile=TILE // in_element)
    return codes, made(coding.scales, grid, inputs, ("scales", *what), make_scales)


def _values(numbers: Tensor, start: int, stop: int) -> Floats:
    """Rows of numbers as float32."""
    import numpy as np

    from ckptkit.io.casts import decode
    from ckptkit.io.reading import read_tensor

    stop = min(stop, numbers.shape[0])
    raw = read_tensor(numbers.rows(start, stop))
    values: Floats = decode(raw, numbers.out_dtype).astype(np.float32, copy=False).reshape(stop - start, -1)
    return values


def _largest(numbers: Tensor, coding: Coding) -> Floats:
    """The largest magnitude of each block, where blocks are too tall to be read at once."""
    import numpy as np

    found: list[Floats] = []
    for first in range(0, numbers.shape[0], coding.block[0]):
        tiles = _tiles(numbers.shape, 1, first, min(first + coding.block[0], numbers.shape[0]))
        found.append(np.maximum.reduce([coding.largest(_values(numbers, *tile)) for tile in tiles]))
    return np.concatenate(found)


def _tiles(shape: tuple[int, ...], height: int, first: int = 0, last: int | None = None) -> Iterator[tuple[int, int]]:
    """Rows in whole blocks, about a tile at a time: (first row, row after the last)."""
    last = shape[0] if last is None else last
    step = max(TILE // max(shape[1] * height, 1), 1) * height
    yield from ((row, min(row + step, last)) for row in range(first, last, step))
