"""Quantised tensors as computed ones: the numbers that codes and scales stand for, made tile by tile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ckptkit.dtypes import DType
from ckptkit.io.computed import TILE, as_matrix, made
from ckptkit.tensors import Tensor, vstack

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

LARGEST = 4 * TILE
"""Elements of the largest tile that is made of whole blocks."""


def dequantised_fp8(codes: Tensor, scales: Tensor, block: tuple[int, int], dtype: DType) -> Tensor:
    """The numbers of an FP8 tensor.

    Args:
        codes: E4M3, [..., rows, columns].
        scales: [..., ceil(rows / block height), ceil(columns / block width)].
        block: Height and width of a block.
        dtype: F64, F32, F16 or BF16.
    """
    if len(codes.shape) > 2:
        pairs = zip(slices(codes), slices(scales), strict=True)
        return vstack([dequantised_fp8(*pair, block, dtype) for pair in pairs]).reshape(codes.shape)
    height = block[0]

    def make(start: int, stop: int) -> Bytes:
        from ckptkit.io.codes import from_fp8, scale_numbers
        from ckptkit.io.reading import read_tensor

        found = scales.rows(start // height, -(-stop // height))
        numbers = scale_numbers(read_tensor(found), scales.out_dtype).reshape(found.shape)
        some = read_tensor(codes.rows(start, stop)).reshape(stop - start, -1)
        return from_fp8(some, numbers, block, dtype, start % height)

    unit = height if height * codes.shape[1] <= LARGEST else 1
    return made(dtype, codes.shape, [codes, scales], ("fp8", block), make, unit, any_rows=True)


def dequantised_mxfp4(codes: Tensor, scales: Tensor, dtype: DType) -> Tensor:
    """The numbers of an MXFP4 tensor, [..., groups * 32].

    Args:
        codes: U8, [..., groups, 16].
        scales: U8 or F8_E8M0, [..., groups].
        dtype: F64, F32, F16 or BF16.
    """
    shape = (*scales.shape[:-1], scales.shape[-1] * 32)
    narrow = as_matrix(scales)
    wide = codes.reshape((narrow.shape[0], narrow.shape[1] * 16))

    def make(start: int, stop: int) -> Bytes:
        from ckptkit.io.codes import from_mxfp4
        from ckptkit.io.reading import read_tensor

        rows = stop - start
        packed, powers = (read_tensor(tensor.rows(start, stop)).reshape(rows, -1) for tensor in (wide, narrow))
        return from_mxfp4(packed, powers, dtype)

    flat = (narrow.shape[0], narrow.shape[1] * 32)
    return made(dtype, flat, [codes, scales], "mxfp4", make, any_rows=True).reshape(shape)


def dequantised_int4(codes: Tensor, scales: Tensor, group: int, dtype: DType) -> Tensor:
    """The numbers of an INT4 tensor, [rows, columns].

    Args:
        codes: I32, [rows, columns / 8].
        scales: F32, F16 or BF16, [rows, columns / group].
        group: Numbers that share a scale.
        dtype: F64, F32, F16 or BF16.
    """

    def make(start: int, stop: int) -> Bytes:
        from ckptkit.io.codes import from_int4, scale_numbers
        from ckptkit.io.reading import read_tensor

        numbers = scale_numbers(read_tensor(scales.rows(start, stop)), scales.out_dtype).reshape(stop - start, -1)
        packed = read_tensor(codes.rows(start, stop)).reshape(stop - start, -1)
        return from_int4(packed, numbers, group, dtype)

    shape = (codes.shape[0], codes.shape[1] * 8)
    return made(dtype, shape, [codes, scales], ("int4", group), make, any_rows=True)


def slices(tensor: Tensor) -> Sequence[Tensor]:
    """The matrices of a tensor of more axes."""
    *_, rows, columns = tensor.shape
    count = tensor.numel // (rows * columns) if rows * columns else 0
    folded = tensor.reshape((count, rows, columns))
    return [folded.rows(number, number + 1).reshape((rows, columns)) for number in range(count)]
