"""Codes with their scales: finds the parts of every quantised tensor by name and checks their shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from ckptkit.dtypes import DType
from ckptkit.errors import InputError, UnsupportedError
from ckptkit.formats.quantised.scheme import FP8, INT4, MXFP4, Scheme
from ckptkit.io.dequantised import dequantised_fp8, dequantised_int4, dequantised_mxfp4
from ckptkit.io.plan import Comparison
from ckptkit.tensors import Tensor

SCALE_INV = "_scale_inv"
BLOCKS, SCALES = "_blocks", "_scales"
PACKED, SCALE, SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"
_FLOATS, _E8M0 = ("F32", "BF16", "F16"), ("F8_E8M0", "U8")
_ACTIVATIONS = (".activation_scale", ".input_scale")
"""Ends of the names of scales that an engine multiplies activations by; the weights do not depend on them."""


@dataclass(frozen=True)
class Stored:
    """A quantised tensor as it is stored.

    Attributes:
        name: The name under which tables know its numbers: without the marks of codes, but for `_blocks`.
        shape: The shape of its numbers.
        kind: `fp8`, `mxfp4` or `int4`.
        codes: Name of the codes.
        scales: Name of the scales.
        parts: Stored name -> tensor: codes, scales, and for `int4` the shape.
        block: Height and width of the blocks that share a scale.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    codes: str
    scales: str
    parts: Mapping[str, Tensor] = field(repr=False)
    block: tuple[int, int]

    @property
    def plain(self) -> tuple[str, tuple[int, ...]]:
        """Its name and shape in an archive without codes: there, experts of MXFP4 are transposed."""
        if self.kind != MXFP4:
            return self.name, self.shape
        *lead, rows, columns = self.shape
        return self.name.removesuffix(BLOCKS), (*lead, columns, rows) if lead else self.shape

    @property
    def nbytes(self) -> int:
        """Bytes of its parts."""
        return sum(part.nbytes for part in self.parts.values())

    def numbers(self, dtype: DType) -> Tensor:
        """The tensor in a floating-point type: computed in float32 and rounded once."""
        codes, scales = self.parts[self.codes], self.parts[self.scales]
        if self.kind == FP8:
            grid = tuple(-(-size // block) for size, block in zip(self.shape[-2:], self.block, strict=True))
            return dequantised_fp8(codes, scales.reshape((*self.shape[:-2], *grid)), self.block, dtype)
        if self.kind == MXFP4:
            return dequantised_mxfp4(codes, scales, dtype)
        return dequantised_int4(codes, scales, self.block[1], dtype)

    def comparisons(self) -> Iterator[Comparison]:
        """What the bytes of its parts must say for its shape to be right."""
        name = self.name.removesuffix(".weight") + SHAPE
        if (stated := self.parts.get(name)) is not None:
            data = b"".join(size.to_bytes(stated.dtype.itemsize, "little") for size in self.shape)
            what = f"{name} is not {list(self.shape)}, the shape of the codes"
            yield Comparison(stated, Tensor.from_bytes(data, stated.dtype, stated.shape), what)


class _Finder:
    """The quantised tensors found so far, and all that is wrong with them."""

    def __init__(self, tensors: Mapping[str, Tensor], scheme: Scheme, path: Path) -> None:
        self.tensors, self.scheme, self.path = tensors, scheme, path
        self.found: dict[str, Stored] = {}
        self.problems: list[str] = []

    def find(self) -> dict[str, Stored]:
        """The quantised tensors by the name of their codes.

        Raises:
            InputError: Codes lack scales, scales have no codes, or a shape or type is wrong.
            UnsupportedError: There are zero points, or an order of groups.
        """
        find: Callable[[], None] = {FP8: self._fp8, MXFP4: self._mxfp4, INT4: self._int4}[self.scheme.kind]
        find()
        if self.problems:
            more = f" ({len(self.problems):,} such problems)" if len(self.problems) > 1 else ""
            raise InputError(f"{self.problems[0]}{more}", where=self.path, hint="fetch or make the checkpoint again")
        return self.found

    def _fp8(self) -> None:
        for name, codes in self.tensors.items():
            if codes.dtype.name == "F8_E4M3" and (scales := self._part(name, name + SCALE_INV)) is not None:
                self._add_fp8(name, codes, scales)
        self._orphans(SCALE_INV, lambda name: self.tensors.get(name.removesuffix(SCALE_INV)), "F8_E4M3")

    def _add_fp8(self, name: str, codes: Tensor, scales: Tensor) -> None:
        block = self._block(codes.shape, scales.shape)
        if block is None:
            blocks = "{} x {}".format(*self.scheme.block) if self.scheme.block else "a tensor or a row"
            self.problems.append(
                f"{name}{SCALE_INV} is {list(scales.shape)}, which is no scale for blocks of {blocks} of"
                f" {name}, {list(codes.shape)}"
            )
        elif self._typed(name + SCALE_INV, scales, (*_FLOATS, *_E8M0)):
            parts = {name: codes, name + SCALE_INV: scales}
            self.found[name] = Stored(name, codes.shape, FP8, name, name + SCALE_INV, parts, block)

    def _block(self, shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int] | None:
        """The blocks that these scales belong to, or None if they do not fit."""
        if len(shape) < 2:
            return None
        *lead, rows, columns = shape
        if self.scheme.block is not None:
            height, width = self.scheme.block
            return self.scheme.block if scales == (*lead, -(-rows // height), -(-columns // width)) else None
        if scales in (tuple(lead), (*lead, 1, 1), () if not lead else None, (1,) if not lead else None):
            return rows, columns
        return (1, columns) if scales in ((*lead, rows), (*lead, rows, 1)) else None

    def _mxfp4(self) -> None:
        for codes, blocks in self.tensors.items():
            if not codes.endswith(BLOCKS):
                continue
            name = codes.removesuffix(BLOCKS)
            scales = self._part(codes, name + SCALES)
            if scales is None or not self._typed(codes, blocks, ("U8",)):
                continue
            if len(blocks.shape) < 3 or blocks.shape != (*scales.shape, 16):
                self.problems.append(f"{name}{SCALES} is {list(scales.shape)}, {codes} is {list(blocks.shape)}")
            elif self._typed(name + SCALES, scales, _E8M0):
                shape = (*scales.shape[:-1], scales.shape[-1] * 32)
                parts = {codes: blocks, name + SCALES: scales}
                self.found[codes] = Stored(codes, shape, MXFP4, codes, name + SCALES, parts, (1, 32))
        self._orphans(SCALES, lambda name: self.tensors.get(name.removesuffix(SCALES) + BLOCKS), "U8")

    def _int4(self) -> None:
        for ending in (".weight_zero_point", ".weight_g_idx"):
            if odd := next((name for name in self.tensors if name.endswith(ending)), None):
                raise UnsupportedError(
                    f"quantised weights (INT4 with {odd})", where=self.path, hint="convert from the unquantised model"
                )
        for name, codes in self.tensors.items():
            if not name.endswith(PACKED):
                continue
            module = name.removesuffix(PACKED)
            scales, shape = self._part(name, module + SCALE), self._part(name, module + SHAPE)
            if scales is not None and shape is not None and self._typed(name, codes, ("I32",)):
                self._add_int4(module, codes, scales, shape)
        self._orphans(SCALE, lambda name: self.tensors.get(name.removesuffix(SCALE) + PACKED), "I32")
        self._orphans(SHAPE, lambda name: self.tensors.get(name.removesuffix(SHAPE) + PACKED), "I32")

    def _add_int4(self, module: str, codes: Tensor, scales: Tensor, shape: Tensor) -> None:
        columns = codes.shape[-1] * 8 if len(codes.shape) == 2 else 0
        group = self.scheme.group or columns
        if not columns or scales.shape != (codes.shape[0], columns // group) or columns % group:
            self.problems.append(
                f"{module}{SCALE} is {list(scales.shape)}, which is no scale for groups of {group} of {module}{PACKED},"
                f" {list(codes.shape)}"
            )
        elif shape.shape != (2,):
            self.problems.append(f"{module}{SHAPE} is {list(shape.shape)}, and should be two numbers")
        elif self._typed(module + SCALE, scales, _FLOATS) and self._typed(module + SHAPE, shape, ("I64", "I32")):
            parts = {module + PACKED: codes, module + SCALE: scales, module + SHAPE: shape}
            self.found[module + PACKED] = Stored(
                f"{module}.weight", (codes.shape[0], columns), INT4, module + PACKED, module + SCALE, parts, (1, group)
            )

    def _part(self, codes: str, name: str) -> Tensor | None:
        found = self.tensors.get(name)
        if found is None:
            self.problems.append(f"{codes} is quantised, and {name} is missing")
        return found

    def _typed(self, name: str, tensor: Tensor, allowed: tuple[str, ...]) -> bool:
        if tensor.dtype.name not in allowed:
            self.problems.append(f"{name} is {tensor.dtype}, and should be {' or '.join(allowed)}")
        return tensor.dtype.name in allowed

    def _orphans(self, ending: str, codes_of: Callable[[str], Tensor | None], dtype: str) -> None:
        """Notes scales without codes of a type."""
        for name in self.tensors:
            if name.endswith(ending):
                codes = codes_of(name)
                if codes is None or codes.dtype.name != dtype:
                    kind = "missing" if codes is None else str(codes.dtype)
                    self.problems.append(f"{name} is a scale whose {dtype} tensor is {kind}")


def find_stored(tensors: Mapping[str, Tensor], scheme: Scheme, path: Path) -> dict[str, Stored]:
    """The quantised tensors of a directory, by the name of their codes.

    Args:
        tensors: Everything that it stores, by name.
        scheme: How its config.json says that it is quantised.
        path: The directory, for messages.

    Raises:
        InputError: Codes lack scales, scales have no codes, or a shape or type is wrong.
        UnsupportedError: There are zero points, or an order of groups.
    """
    return _Finder(tensors, scheme, path).find()


def scales_of_activations(stored: Mapping[str, Stored], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The scales of activations that belong to quantised modules."""
    modules = {item.name.removesuffix(".weight") for item in stored.values()}
    return {
        name: tensor
        for name, tensor in tensors.items()
        for ending in _ACTIVATIONS
        if name.endswith(ending) and name.removesuffix(ending) in modules and prod(tensor.shape) <= 1
    }
